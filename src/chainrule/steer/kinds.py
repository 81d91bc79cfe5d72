"""The kinds of variables: how each starts, which call SDO keeps for it, which models it fits, and how it is written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from chainrule.adapters import Adapter
from chainrule.chain import Chain
from chainrule.denoise import guidance_is_input
from chainrule.errors import UserError
from chainrule.guidance import reads_negative
from chainrule.models import Model
from chainrule.plan import Grad, Grid
from chainrule.steer.variables import Controls, Embedding, Latent, Variable, Weights


class Kind(Protocol):
    """A kind of variable."""

    is_state: ClassVar[bool]  # whether it is the chain's own state, which can be bounded and renormalized

    @property
    def name(self) -> str: ...

    def start(self, chain: Chain, x: Tensor, grid: Grid, adapter: Adapter | None) -> tuple[Variable, Tensor]:
        """The variable before its first update, and the state the chain starts from, given where it would start by itself."""
        ...

    def live(self, calls: int, rng: Random) -> list[Grad]:
        """What the gradient of SDO reaches through every call (arXiv:2505.07477, section 4)."""
        ...

    def check(self, model: Model, images: int, batch: int) -> None:
        """Raises UserError for a model, or a number of images, that this kind cannot be steered for."""
        ...


def _one(calls: int, live: int) -> list[Grad]:
    return [Grad.FULL if i == live else Grad.NONE for i in range(calls)]


@dataclass(frozen=True, slots=True)
class LatentKind:
    """A latent is read by the first call of its own grid, which is the one SDO keeps (Eq. 15, 18-19, Fig. 4)."""

    name: ClassVar[str] = "latent"
    is_state: ClassVar[bool] = True

    def start(self, chain: Chain, x: Tensor, grid: Grid, adapter: Adapter | None) -> tuple[Variable, Tensor]:
        """The variable before its first update, and the state the chain starts from."""
        latent = nn.Parameter(x.clone())
        return Latent(latent), latent

    def live(self, calls: int, rng: Random) -> list[Grad]:
        """What the gradient of SDO reaches through every call."""
        return _one(calls, 0)

    def check(self, model: Model, images: int, batch: int) -> None:
        """Raises UserError for a model, or a number of images, that this kind cannot be steered for."""


@dataclass(frozen=True, slots=True)
class EmbeddingKind:
    """An embedding is read by every call, and SDO draws one of them (section 4.3, Fig. 5). `side` is its place in a condition."""

    name: str
    side: str
    fits: Callable[[Model], None]
    is_state: ClassVar[bool] = False

    def start(self, chain: Chain, x: Tensor, grid: Grid, adapter: Adapter | None) -> tuple[Variable, Tensor]:
        """The variable before its first update, and the state the chain starts from."""
        return Embedding(nn.Parameter(getattr(chain.condition, self.side).states.clone()), self.side), x

    def live(self, calls: int, rng: Random) -> list[Grad]:
        """What the gradient of SDO reaches through every call."""
        return _one(calls, rng.randrange(calls))

    def check(self, model: Model, images: int, batch: int) -> None:
        """Raises UserError for a model, or a number of images, that this kind cannot be steered for."""
        self.fits(model)
        known = model.defaults.labels[:1] or ("",)
        if not model.embed(list(known)).positive.states.is_floating_point():
            raise UserError(f"over is {self.name!r}, but {model.name} has classes instead of embeddings; use latent")


def _any(model: Model) -> None:
    pass


def _guided_away(model: Model) -> None:
    """Raises UserError for a model whose guidance reads no negative embedding."""
    if guidance_is_input(model.denoiser):
        raise UserError(f"over is 'negative', but {model.name} reads its guidance and no negative embedding; use prompt")
    if not reads_negative(model.guidance):
        used = model.guidance_spec or model.defaults.guidance
        raise UserError(f"guidance is {used}, with which the negative embedding is not used; give more than 1")


@dataclass(frozen=True, slots=True)
class ControlsKind:
    """Controls are added to the answers, so every call passes them its part of the linear path; the calls' graphs are empty."""

    name: ClassVar[str] = "controls"
    is_state: ClassVar[bool] = False

    def start(self, chain: Chain, x: Tensor, grid: Grid, adapter: Adapter | None) -> tuple[Variable, Tensor]:
        """The variable before its first update, and the state the chain starts from."""
        return Controls({level: nn.Parameter(torch.zeros_like(x)) for level in grid[:-1]}), x

    def live(self, calls: int, rng: Random) -> list[Grad]:
        """What the gradient of SDO reaches through every call."""
        return [Grad.WEIGHTS] * calls

    def check(self, model: Model, images: int, batch: int) -> None:
        """Raises UserError for a model, or a number of images, that this kind cannot be steered for."""


@dataclass(frozen=True, slots=True)
class WeightsKind:
    """A LoRA on every layer that all images share; SDO draws one of the calls that read it.

    With inverted pictures, directional CLIP and the gradient `full` it is DiffusionCLIP (arXiv:2110.02711), which trains all
    weights instead.
    """

    name: ClassVar[str] = "weights"
    is_state: ClassVar[bool] = False

    def start(self, chain: Chain, x: Tensor, grid: Grid, adapter: Adapter | None) -> tuple[Variable, Tensor]:
        """The variable before its first update, and the state the chain starts from."""
        assert adapter is not None
        return Weights(adapter), x

    def live(self, calls: int, rng: Random) -> list[Grad]:
        """What the gradient of SDO reaches through every call."""
        return _one(calls, rng.randrange(calls))

    def check(self, model: Model, images: int, batch: int) -> None:
        """Raises UserError for a model, or a number of images, that this kind cannot be steered for."""
        if images > batch:
            raise UserError(f"batch is {batch}, but over weights all {images} images are steered together; raise it")


LATENT, CONTROLS, WEIGHTS = LatentKind(), ControlsKind(), WeightsKind()
PROMPT = EmbeddingKind("prompt", "positive", _any)
NEGATIVE = EmbeddingKind("negative", "negative", _guided_away)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (LATENT, PROMPT, NEGATIVE, CONTROLS, WEIGHTS)}


@dataclass(frozen=True, slots=True)
class Over:
    """A variable as it is written: `latent`, `latent@600`, `prompt`, `negative`, `controls`, `weights`.

    `time` is the timestep of the latent, as diffusers counts it; None is the initial noise.
    """

    kind: Kind = field(default=LATENT)
    time: int | None = None

    def __str__(self) -> str:
        return self.kind.name if self.time is None else f"{self.kind.name}@{self.time}"

    @classmethod
    def parse(cls, text: str) -> Over:
        """The variable of a text. Raises UserError for one that is none."""
        found = re.fullmatch(r"(\w+)(?:@(\d+))?", text.strip())
        if not found or found[1] not in KINDS or (found[2] and not KINDS[found[1]].is_state):
            raise UserError(f"over is {text!r}, but must be one of {', '.join(KINDS)}, or latent@600 for the latent at t = 600")
        return cls(KINDS[found[1]], int(found[2]) if found[2] else None)

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
