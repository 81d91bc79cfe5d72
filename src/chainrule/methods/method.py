"""What a method is, and what it may say about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from chainrule.errors import UserError
from chainrule.plan import Grid, Levels, Plan


@dataclass(frozen=True, slots=True)
class Pathwise:
    """The reward is differentiated, and its gradient goes back along the chain as the plan says."""


@dataclass(frozen=True, slots=True)
class LikelihoodRatio:
    """The steps that led to better images are made likelier (REINFORCE, arXiv:2305.13301): the reward needs no gradient.

    An image's advantage is its reward less the mean, over the standard deviation: of the `group` images of its prompt in the
    batch, or where `group` is 1 of its prompt's last rewards. Each rollout serves `reuse` updates, whose likelihood ratios are
    cut at 1 +- `clip`.
    """

    group: int = 1
    reuse: int = 1
    clip: float = 1e-4


@dataclass(frozen=True, slots=True)
class Critic:
    """The reward's own network with a LoRA of this `rank` foresees the reward after one call (arXiv:2309.17400, C.2).

    It learns at `rate` times the run's learning rate. The plan has two branches: the finished image, and the one-step clean
    prediction after the live call.
    """

    rank: int = 8
    rate: float = 1.0


Estimator = Pathwise | LikelihoodRatio | Critic
"""How the rewards of a batch become a gradient."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a method needs beside the model and the reward.

    `members` are the names it jumps by besides "base". `adapters` are its own adapters by name, each with the levels it is on at
    in the base model's calls, while training and afterwards (None: at all levels). `trained` names those that are trained, by
    default all of them. `estimator` is how rewards become a gradient. A method that says nothing trains one adapter, on
    everywhere, with the gradient of the reward.
    Raises ValueError when an adapter is trained that is not among the adapters.
    """

    members: tuple[str, ...] = ()
    adapters: Mapping[str, Levels | None] = field(default_factory=lambda: {"default": None})
    trained: tuple[str, ...] = ()
    estimator: Estimator = field(default_factory=Pathwise)

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained", self.trained or tuple(self.adapters))
        if not set(self.trained) <= set(self.adapters):
            raise ValueError(f"trained are {self.trained}, but the adapters are {tuple(self.adapters)}")


class Method(Protocol):
    """A small frozen dataclass whose fields are its options, with a plan.

    It may also define:

    * `needs(grid) -> Needs`: what it needs on this grid, if more than one adapter that is on everywhere. Raises UserError for a
      chain with too few calls. It never depends on chance, and it covers all stages. Options that name levels are `plan`'s to
      refuse: a command asks for the needs before it knows the model's own levels.
    * `stages() -> tuple[Method, ...]`: the methods that are trained one after the other, with the same adapters.
    """

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """The plan of one update on a grid, with the random choices drawn from `rng`. Raises UserError where it does not fit."""
        ...


def needs(method: Method, grid: Grid) -> Needs:
    """What a method needs on this grid: members, adapters, estimator. Raises UserError for a chain with too few calls."""
    own: Callable[[Grid], Needs] | None = getattr(method, "needs", None)
    return own(grid) if own else Needs()


def stages(method: Method) -> tuple[Method, ...]:
    """What is trained in turn: the stages of a method that has them, or the method itself."""
    own: Callable[[], tuple[Method, ...]] | None = getattr(method, "stages", None)
    return own() if own else (method,)


def within(name: str, value: float | None, low: int, high: int | None = None) -> None:
    """Raises UserError for a number outside [low, high]; None is anywhere."""
    if value is not None and not (value >= low and (high is None or value <= high)):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} is {value}, but must be {wanted}")
