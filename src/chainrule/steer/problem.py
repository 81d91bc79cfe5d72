"""What a gradient is taken of: one chain, one grid, and the loss of the image it ends in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from chainrule.chain import Chain
from chainrule.objective import Decode, Objective, read
from chainrule.plan import Grid


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass: losses (b,), images (b, 3, h, w), the gradient of the summed losses at the chain's first state, rewards (b,).

    `terms` are the values of the objective's terms, (b,) each.
    """

    losses: Tensor
    images: Tensor
    gradient: Tensor
    rewards: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Problem:
    """`grid` falls from the variable's level to 0. Leaves in the chain's condition or controls get their `.grad`."""

    chain: Chain
    grid: Grid
    decode: Decode
    prompts: Sequence[str]
    objective: Objective
    part: int = 8

    def read(self, latent: Tensor) -> Seen:
        """Losses and images of finished latents, and d(sum of losses)/d(latent)."""
        reading, gradient = read(self.decode, self.objective, latent, self.prompts, self.part)
        return Seen(reading.loss, reading.images, gradient, reading.rewards, reading.terms)
