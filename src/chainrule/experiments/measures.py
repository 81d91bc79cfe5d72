"""What is measured on steered images, beside the images as they were.

A measure is a reward ("100*clip:tiny:an angry face") or one of `PER_IMAGE` and `OVERALL` with what it needs after colons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chainrule.appearance import STATISTICS
from chainrule.errors import UserError
from chainrule.rewards import Reward, checked, parse, reward_of
from chainrule.rewards.classifier import load_classifier
from chainrule.rewards.clip import load_clip, normalize, resize_and_crop


@dataclass(frozen=True, slots=True)
class Pair:
    """Images before and after steering, (b, 3, h, w) in [0, 1], and their prompts."""

    before: Tensor
    after: Tensor
    prompts: list[str]


def scored(name: str, source: str | None) -> Reward:
    """A measure of single images by name: a reward, or what an image looks like ("sharpness", `chainrule.appearance`)."""
    if name not in STATISTICS:
        return parse(name, source)
    statistic = STATISTICS[name]
    return reward_of(lambda images, prompts: statistic(images), name=name)


def tensors(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (n, 3, h, w) in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255 for image in images])


def _embeddings(images: Tensor, source: str) -> Tensor:
    clip = load_clip(source, "clip")
    return clip.image(normalize(resize_and_crop(images, clip.size)))


def moved(pair: Pair, source: str) -> Tensor:
    """1 - cosine of a CLIP's embeddings before and after, (b,): a stand-in for face identity. `moved:tiny`."""
    return 1 - (_embeddings(pair.before, source) * _embeddings(pair.after, source)).sum(1)


def misled(pair: Pair, rest: str) -> Tensor:
    """100 where a classifier no longer sees a class, (b,). `misled:tiny:cat`."""
    return 100.0 * ~sees(pair.after, rest)


def sees(images: Tensor, rest: str) -> Tensor:
    """Whether a classifier takes images for a class, (b,) of bool. `tiny:cat`."""
    source, _, label = rest.partition(":")
    network = load_classifier(source)
    return network(images).argmax(1) == network.index(label)


def frechet(images: Tensor, rest: str, directions: int = 8) -> float:
    """Frechet distance x 1000 to the square tiles of a sheet, in the tiles' first principal directions of a CLIP's embedding.

    So few directions because a covariance of all cannot be had from a few dozen images. `frechet:tiny:64:sheet.png`: tiles of 64
    pixels.
    """
    source, side, sheet = rest.split(":", 2)
    with Image.open(sheet) as opened:
        whole = tensors([opened])
    tiles = whole.unfold(2, int(side), int(side)).unfold(3, int(side), int(side)).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    real, made = _embeddings(tiles, source), _embeddings(images, source)
    _, _, axes = torch.linalg.svd(real - real.mean(0), full_matrices=False)
    a, b = (real @ axes[:directions].T).double(), (made @ axes[:directions].T).double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt()
    return 1000 * float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots.sum())


PER_IMAGE: Mapping[str, Callable[[Pair, str], Tensor]] = {"moved": moved, "misled": misled}
OVERALL: Mapping[str, Callable[[Tensor, str], float]] = {"frechet": frechet}


@torch.no_grad()
def per_image(text: str, pair: Pair, source: str | None) -> tuple[Tensor | None, Tensor]:
    """A measure before and after, (b,) each; None before for what only compares. `source`: that of rewards that name none."""
    head, _, rest = text.partition(":")
    if head in PER_IMAGE:
        return None, PER_IMAGE[head](pair, rest)
    reward = parse(text, source).with_reference(pair.before)
    return checked(reward, pair.before, pair.prompts), checked(reward, pair.after, pair.prompts)


def overall(text: str) -> bool:
    """Whether a measure is of all images together. Raises UserError for a name that is neither that nor a reward."""
    return text.partition(":")[0] in OVERALL


@torch.no_grad()
def measured(
    pairs: Sequence[tuple[Pair, Mapping[str, str], Tensor]], source: str | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Means of every measure over the images that count, before and after: of (pair, measures by name, which count).

    Raises UserError when no image counts.
    """
    before: dict[str, list[Tensor]] = {}
    after: dict[str, list[Tensor]] = {}
    whole: dict[str, str] = {}
    for pair, measures, counts in pairs:
        for name, text in measures.items():
            if overall(text):
                whole[name] = text
                continue
            was, now = per_image(text, pair, source)
            after.setdefault(name, []).append(now[counts])
            if was is not None:
                before.setdefault(name, []).append(was[counts])
    if not sum(int(counts.sum()) for _, _, counts in pairs):
        raise UserError("no image counts: the classifier was wrong about all of them before")
    found = {name: float(torch.cat(parts).mean()) for name, parts in after.items()}
    kept = torch.cat([pair.after[counts] for pair, _, counts in pairs]) if whole else None
    found |= {
        name: OVERALL[text.partition(":")[0]](kept, text.partition(":")[2]) for name, text in whole.items() if kept is not None
    }
    return {name: float(torch.cat(parts).mean()) for name, parts in before.items()}, found
