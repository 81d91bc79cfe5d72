"""What a gradient is taken of: one chain, one grid, and the loss of the image it ends in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.chain import Chain, read
from chainrule.plan import Grid
from chainrule.rewards import Reward, checked


@dataclass(frozen=True, slots=True)
class Loss:
    """(1 - keep) * -reward + keep * distance to a reference, per image (SDO, arXiv:2505.07477, Eq. 23).

    The distance is the root mean square over pixels in [0, 1], (b,). Differs from the paper, whose norm sums over pixels and
    so means something else at every image size.
    """

    reward: Reward
    keep: float = 0.0
    reference: Tensor | None = None  # (b, 3, h, w) in [0, 1]; before it is known there is nothing to keep

    def __call__(self, images: Tensor, prompts: Sequence[str], part: slice) -> Tensor:
        before = None if self.reference is None else self.reference[part]
        reward = self.reward if before is None else self.reward.beside(before)
        loss = (self.keep - 1) * checked(reward, images, prompts)
        return loss if before is None or not self.keep else loss + self.keep * distance(images, before)


def distance(images: Tensor, reference: Tensor) -> Tensor:
    """(b,): root mean square over pixels. Its gradient at zero distance is zero, not infinite."""
    square = (images - reference.to(images)).flatten(1).square().mean(1)
    return torch.where(square > 0, square.clamp(min=1e-12).sqrt(), square)


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass: losses (b,), images (b, 3, h, w), and the gradient of the summed losses at the chain's first state."""

    losses: Tensor
    images: Tensor
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """`grid` falls from the variable's level to 0. Leaves in the chain's condition or controls get their `.grad`."""

    chain: Chain
    grid: Grid
    decode: Callable[[Tensor], Tensor]
    prompts: Sequence[str]
    loss: Loss
    part: int = 8

    def read(self, latent: Tensor) -> Seen:
        """Losses and images of finished latents, and d(sum of losses)/d(latent)."""
        at = iter(range(0, len(latent), self.part))

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            first = next(at)
            return -self.loss(images, prompts, slice(first, first + len(images)))

        values, images, gradient = read(self.decode, score, latent, self.prompts, self.part)
        return Seen(-values, images, gradient * len(latent))
