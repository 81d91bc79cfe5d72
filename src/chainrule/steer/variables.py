"""What steering optimizes: a latent on the chain, an embedding or controls beside the network, one per image; or weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from chainrule.cast import Answerer, networks_of
from chainrule.denoise import Condition
from chainrule.errors import UserError
from chainrule.plan import Grid

KINDS = ("latent", "prompt", "negative", "controls", "weights")


@dataclass(frozen=True, slots=True)
class Over:
    """A variable as it is written: `latent`, `latent@600`, `prompt`, `negative`, `controls`, `weights`.

    `weights` is a LoRA on every layer that all images share: with inverted pictures, directional CLIP and the gradient
    `full` it is DiffusionCLIP (arXiv:2110.02711), which trains all weights instead.
    `time` is the timestep of the latent, as diffusers counts it; None is the initial noise.
    """

    kind: str
    time: int | None = None

    def __str__(self) -> str:
        return self.kind if self.time is None else f"{self.kind}@{self.time}"

    @classmethod
    def parse(cls, text: str) -> Over:
        found = re.fullmatch(r"(\w+)(?:@(\d+))?", text.strip())
        if not found or found[1] not in KINDS or (found[2] and found[1] != "latent"):
            raise UserError(f"over is {text!r}, but must be one of {', '.join(KINDS)}, or latent@600 for the latent at t = 600")
        return cls(found[1], int(found[2]) if found[2] else None)

    def grid(self, levels: Grid, offset: int = 1) -> Grid:
        """The levels from the variable's own down to 0. The timestep t is level t + `offset`, to the nearest whole one.

        Raises UserError for a time that is not on the grid, naming its neighbors.
        """
        wanted = self.time
        if wanted is None:
            return levels
        calls = levels[:-1]
        near = [level for level in calls if abs(level - offset - wanted) <= 1]
        if not near:
            above = min((level - offset for level in calls if level - offset > wanted), default=None)
            below = max((level - offset for level in calls if level - offset < wanted), default=None)
            there = " and ".join(f"{t:.0f}" for t in (below, above) if t is not None)
            raise UserError(f"t = {wanted} is not on the {len(calls)}-step grid; its neighbors there are {there}")
        return levels[levels.index(min(near, key=lambda level: abs(level - offset - wanted))) :]


@dataclass(frozen=True, slots=True)
class Controlled:
    """A member with a control added to its answer at every level (FlowGrad, arXiv:2212.01365).

    FlowGrad adds controls to a velocity; here they are added to whatever the network predicts.
    """

    member: Answerer
    controls: Mapping[float, Tensor]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return tuple(networks_of({"base": self.member}))

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        return self.member(x, level, condition) + self.controls[level]
