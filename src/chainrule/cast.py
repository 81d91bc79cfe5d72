"""Who answers: the members of a cast by name, each a network with its adapters and its guidance, or anything else that answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from chainrule.adapters import Active, selected
from chainrule.denoise import Condition, Denoiser
from chainrule.guidance import CFG, Guidance


class Answerer(Protocol):
    """A member of the cast: its answer for a state (b, c, h, w) at a level, in whatever the model predicts.

    One that wraps other members may name the modules it calls as `networks`, so that `memory="blocks"` finds them.
    """

    def __call__(self, x: Tensor, level: float, condition: Condition, /) -> Tensor: ...


Cast = Mapping[str, Answerer]


@dataclass(frozen=True, slots=True)
class Member:
    """A network as an answerer: the adapters that are on at each level, and its guidance (by default none)."""

    denoiser: Denoiser
    guidance: Guidance = field(default_factory=lambda: CFG(1.0))
    active: Active = field(default_factory=Active)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules it calls."""
        return (self.denoiser.network,)

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        with selected(self.denoiser.network, self.active.at(level)):
            return self.guidance(self.denoiser, x, level, condition)


def in_float16(member: Answerer) -> bool:
    """Whether a member's answer may come through float16: one that does not name its networks may."""
    networks = getattr(member, "networks", None)
    return networks is None or any(w.dtype == torch.float16 for network in networks for w in network.parameters())


def networks_of(cast: Cast) -> list[nn.Module]:
    """The modules the members call, each once."""
    return list(dict.fromkeys(network for member in cast.values() for network in getattr(member, "networks", ())))
