"""Rewards without a network, each a formula of the pixels. All are means over pixels and channels.

Differs from the papers, which sum: a mean is the same for every image size, and so is a weight in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.jpeg import jpeg, quality_of


@dataclass(frozen=True)
class Symmetry(Reward):
    """Left-right symmetry: -mean |x - mirror(x)|. Range [-1, 0]; 0 is a perfect mirror image.

    The reward ShortFT (arXiv:2507.22604) trains on; its tables print the distance, so there lower is better.
    """

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "symmetry"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(images - images.flip(-1)).abs().mean((1, 2, 3))


@dataclass(frozen=True)
class RotationalAnticorrelation(Reward):
    """Difference from its own rotations: 1/3 sum over 90, 180, 270 degrees of mean (x - rotate(x))^2. Range [0, 1].

    DRaFT, Appendix B.9 (arXiv:2309.17400). Raises UserError for images that are not square.
    """

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "rotation"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        height, width = images.shape[-2:]
        if height != width:
            raise UserError(f"reward 'rotation' needs square images, got {height}x{width}")
        turned = [torch.rot90(images, quarter, (-2, -1)) for quarter in (1, 2, 3)]
        return torch.stack([(images - other).square().mean((1, 2, 3)) for other in turned]).mean(0)


@dataclass(frozen=True)
class JPEGCompressibility(Reward):
    """JPEG compressibility: -mean (x - d(c(x)))^2, with c and d compression and decompression. Range [-1, 0].

    DRaFT, section 5.3 and Appendix B.3 (arXiv:2309.17400). d(c(x)) is piecewise constant in x, so the exact derivative,
    almost everywhere, is that of the distance to a fixed image: -2 (x - d(c(x))) / n. Straight-through rounding would
    say that the codec is the identity, up to color subsampling, and leave the luminance without a gradient.

    `quality` is JPEG's, from 1 to 100. With a `ratio` every image has the highest quality that compresses it so much (see
    `jpeg.quality_of`), a constant in the gradient: the paper's is fixed at 4. Quality 50 compresses drawings 26 to 42 times.
    """

    quality: int = 50
    ratio: float | None = None

    def __post_init__(self) -> None:
        _check_strength(self.quality, self.ratio)

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("compressible", self.quality, self.ratio)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -_loss(images, self.quality, self.ratio)


@dataclass(frozen=True)
class JPEGIncompressibility(Reward):
    """JPEG incompressibility, the negation of `JPEGCompressibility`. Range [0, 1]."""

    quality: int = 50
    ratio: float | None = None

    def __post_init__(self) -> None:
        _check_strength(self.quality, self.ratio)

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("incompressible", self.quality, self.ratio)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _loss(images, self.quality, self.ratio)


def _loss(images: Tensor, quality: int, ratio: float | None) -> Tensor:
    if ratio is None:
        return (images - jpeg(images.detach(), quality)).square().mean((1, 2, 3))
    found = quality_of(images, ratio)
    return torch.cat([_loss(image[None], own, None) for image, own in zip(images, found, strict=True)])


def _check_strength(quality: int, ratio: float | None) -> None:
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        raise UserError(f"JPEG quality must be a whole number from 1 to 100, got {quality!r}")
    if ratio is not None and not 1 <= ratio <= 1000:
        raise UserError(f"a JPEG ratio must be from 1 to 1000, got {ratio!r}")
    if ratio is not None and quality != 50:
        raise UserError("JPEG takes a quality or a ratio; leave one out")


def _name(word: str, quality: int, ratio: float | None) -> str:
    if ratio is not None:
        return f"{word}:{ratio:g}x"
    return word if quality == 50 else f"{word}:{quality}"
