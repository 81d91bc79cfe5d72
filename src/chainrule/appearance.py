"""What images look like, in numbers that no network has a say in: edges, colors, brightness, saturation, sharpness, difference.

A reward that is hacked often leaves its mark on them: flat colors, or noise, or the same picture for every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE = 0.1  # a step of brightness between neighbours, of the range from black to white, from which on there is an edge
LEVELS = 8  # of each color, for the entropy


def luminance(images: Tensor) -> Tensor:
    """(n, 3, h, w) in [0, 1] to (n, 1, h, w): the brightness of every pixel (ITU-R BT.601)."""
    return (images.float() * images.new_tensor([0.299, 0.587, 0.114], dtype=torch.float32).view(1, 3, 1, 1)).sum(1, keepdim=True)


def edges(images: Tensor) -> Tensor:
    """The share of pixels on an edge, (n,) in [0, 1]: where Sobel's gradient is at least `EDGE` per pixel. Borders are left out."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    found = F.conv2d(luminance(images), torch.stack([across, across.T])[:, None])
    return (found.square().sum(1).sqrt() >= EDGE).float().mean((1, 2))


def colors(images: Tensor) -> Tensor:
    """The entropy of the colors in bits, (n,) from 0, one color, to 9: of a histogram by `LEVELS` levels of red, green and blue."""
    level = (images.float() * LEVELS).long().clamp(0, LEVELS - 1)
    codes = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]
    shares = torch.stack([torch.bincount(each.flatten(), minlength=LEVELS**3) for each in codes]).float() / codes[0].numel()
    return -torch.special.xlogy(shares, shares).sum(1) / torch.tensor(2.0).log().to(shares)


def brightness(images: Tensor) -> Tensor:
    """The mean brightness, (n,) in [0, 1]."""
    return luminance(images).mean((1, 2, 3))


def saturation(images: Tensor) -> Tensor:
    """The mean saturation as in HSV, (n,) from 0, gray, to 1."""
    high, low = images.float().amax(1), images.float().amin(1)
    return ((high - low) / high.clamp(min=1e-6)).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """The standard deviation of the brightness's Laplacian, (n,) from 0, flat: its square is a usual measure of focus."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device)
    return F.conv2d(luminance(images), kernel[None, None]).flatten(1).std(1, correction=0)


def apart(images: Tensor) -> Tensor:
    """The mean distance of every image to the others, (n,) from 0, all alike: root mean square over 16x16 averaged pixels.

    Their mean is `evaluate`'s diversity of these images. NaN for a single image.
    """
    small = F.adaptive_avg_pool2d(images.float(), 16).flatten(1)
    distances = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[1] ** 0.5
    return distances.sum(1) / (len(images) - 1) if len(images) > 1 else distances.new_full((1,), torch.nan)


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "diversity": apart, "edges": edges, "colors": colors, "brightness": brightness, "saturation": saturation,
    "sharpness": sharpness,
}  # fmt: skip
"""What is measured of the watched images of a run, by the names in `watched.jsonl`."""
