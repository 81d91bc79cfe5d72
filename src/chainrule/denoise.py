"""Members of the cast: a network, the adapters active at each level, and guidance, as one denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from chainrule.adapters import Active, selected


@dataclass(frozen=True, slots=True)
class Condition:
    """Prompt embeddings of a batch. Both (b, tokens, width)."""

    positive: Tensor
    negative: Tensor

    def __getitem__(self, part: slice) -> Condition:
        return Condition(self.positive[part], self.negative[part])


class Denoiser(Protocol):
    """The raw network of a model family: its answer for a state at a level and text states of the same batch size.

    Chains ask at whole levels; an ODE solver may ask between them.
    """

    @property
    def network(self) -> nn.Module: ...

    def __call__(self, x: Tensor, level: float, text: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Member:
    """One named answerer. `m = u + guidance * (c - u)`; with guidance 1 or below only c is computed, as in diffusers."""

    denoiser: Denoiser
    guidance: float = 1.0
    active: Active = field(default_factory=Active)

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        """The network's answer, (b, c, h, w), in whatever the model predicts."""
        with selected(self.denoiser.network, self.active.at(int(level))):
            if self.guidance <= 1:
                return self.denoiser(x, level, condition.positive)
            both = self.denoiser(torch.cat([x, x]), level, torch.cat([condition.negative, condition.positive]))
        u, c = both.chunk(2)
        return u + self.guidance * (c - u)


Cast = Mapping[str, Member]
