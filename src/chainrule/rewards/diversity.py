"""DRaFT's two attempts to prevent collapse (arXiv:2309.17400, Appendix B.8): a diversity reward, and a reward with dropout.

The paper finds neither enough: with much dropout training still collapsed, and a large diversity weight lowered the score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, load_clip
from chainrule.rewards.reference import perceptual
from chainrule.rewards.scorers import AESTHETIC, CLIP_L, Aesthetic, features_and_head

PIXELS = "pixels"


@dataclass(frozen=True)
class Diversity(Reward):
    """How different the images of a batch are: the distance of image k of B to image B - 1 - k.

    Unlike every other reward it depends on the rest of the batch.

    Both images of a pair are given its distance and pull at it. The middle one of an odd batch, and a batch of one, has itself
    for a partner: 0, and no gradient. A run scores up to 8 images at a time, and pairs are formed among those. `features`
    "pixels" is the Euclidean distance over the root of the number of values, range [0, 1] (the paper's is not divided); a CLIP
    (a source as `CLIPScore`'s) is `perceptual`'s distance in place of the paper's LPIPS, range [0, 4].
    """

    features: str = PIXELS

    def __post_init__(self) -> None:
        if self.features != PIXELS:
            check_source(self.features, "clip")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "diversity" if self.features == PIXELS else f"diversity:{self.features}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        images = images if images.dtype == torch.float64 else images.float()
        half = len(images) // 2
        apart = self._between(images[:half], images.flip(0)[:half]) if half else images.new_zeros(0)
        itself = 0 * images[half : len(images) - half].mean((1, 2, 3))
        return torch.cat([apart, itself, apart.flip(0)])

    def _between(self, first: Tensor, second: Tensor) -> Tensor:
        if self.features != PIXELS:
            return perceptual(first, second, self.features)
        return torch.linalg.vector_norm(first - second, dim=(1, 2, 3)) / first[0].numel() ** 0.5

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        if self.features != PIXELS:
            load_clip(self.features, "clip", device)
        return self


@dataclass(frozen=True)
class Dropout(Reward):
    """`Aesthetic` with dropout at `rate` in its head. In expectation over masks the reward itself, the head being linear.

    Differs from the paper, which says neither where nor more than "rates such as 0.95": here at the head's own three dropout
    layers. The mask is drawn from `seed` and the image's own pixels, rounded to 8 bits: another for every image a run makes,
    the same when the same image is scored again, on its own or in a batch, or after a run is resumed. It is constant in the
    gradient. Sources, licences and preprocessing as `Aesthetic`; the larger the rate the wider the range.
    """

    rate: float = 0.95
    seed: int = 0
    source: str = AESTHETIC
    clip: str = CLIP_L

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UserError(f"a dropout rate is from 0 to less than 1, got {self.rate!r}")
        Aesthetic(self.source, self.clip)

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        where = "" if self.source == AESTHETIC else f":{self.source}"
        return "dropout" + (f":{self.rate:g}" if self.rate != 0.95 or where else "") + where

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        x, head = features_and_head(Aesthetic(self.source, self.clip), images)
        rows = [torch.Generator().manual_seed(self.seed ^ code) for code in _codes(images)]
        for layer in head:
            x = x * _masks(x, rows, self.rate) if isinstance(layer, nn.Dropout) else layer(x)
        return x[:, 0]

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        Aesthetic(self.source, self.clip).to(device)
        return self


def _masks(x: Tensor, rows: Sequence[torch.Generator], rate: float) -> Tensor:
    """Per row of x (b, width): 0 with probability `rate`, else 1 / (1 - rate)."""
    kept = torch.stack([torch.rand(x.shape[1], generator=row) >= rate for row in rows])
    return kept.to(x) / (1 - rate)


def _codes(images: Tensor) -> list[int]:
    """A number for each image's 8-bit values. In integers, whose sum does not depend on its order or on the device."""
    values = (images.detach().float().clamp(0, 1) * 255).round().long().flatten(1)
    weights = torch.arange(1, values.shape[1] + 1, device=images.device) * 2654435761 % 2**31
    return [int(code) for code in ((values * weights).sum(1) % 2**62).tolist()]
