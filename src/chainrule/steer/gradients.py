"""Gradients of a sampling chain, interchangeable by name.

Each is `(problem, x, rng) -> Seen`: it runs the chain from `x` and returns the gradient there; leaves elsewhere (an embedding,
controls) get theirs in `.grad`. `sdo` and `full` are plans on the one walker; `adjoint` and `invertible` are chains of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from torch import Tensor

from chainrule.errors import UserError, unknown
from chainrule.plan import Grad, Plan, walk
from chainrule.steer.adjoint import Adjoint
from chainrule.steer.invertible import Coupled
from chainrule.steer.kinds import CONTROLS, KINDS, LATENT, NEGATIVE, PROMPT, Kind
from chainrule.steer.problem import Problem, Seen

Gradient = Callable[[Problem, Tensor, Random], Seen]
# What the loss reaches through each call, given the number of calls, the kind of variable and a random generator.
Grads = Callable[[int, Kind, Random], list[Grad]]
EVERY = tuple(KINDS.values())


def sdo(calls: int, kind: Kind, rng: Random) -> list[Grad]:
    """Shortcut diffusion optimization (arXiv:2505.07477): the graph of the one call that reads the variable."""
    return kind.live(calls, rng)


def full(calls: int, kind: Kind, rng: Random) -> list[Grad]:
    """Backpropagation through every call (arXiv:2505.07477, Eq. 11)."""
    return [Grad.FULL] * calls


def planned(grads: Grads, kind: Kind) -> Gradient:
    """The gradient of a plan, by the walker."""

    def gradient(problem: Problem, x: Tensor, rng: Random) -> Seen:
        path = walk(problem.grid)
        live = tuple(replace(jump, grad=grad) for jump, grad in zip(path, grads(len(path), kind, rng), strict=True))
        (branch,) = problem.chain.walk(Plan((), (live,)), x)
        seen = problem.read(branch.image)
        return replace(seen, gradient=branch.pull(seen.gradient))

    return gradient


def sampled(problem: Problem, x: Tensor) -> Tensor:
    """Where the sampler leads from x, without gradient."""
    return problem.chain.end(x, walk(problem.grid))


def coupled(problem: Problem, x: Tensor) -> Tensor:
    """Where the coupled chain leads from x, without gradient."""
    return Coupled().forward(problem, (x, x))[0]


@dataclass(frozen=True, slots=True)
class Way:
    """A gradient by name: what it is, the variables it is defined for, how it is made, and what goes with it."""

    about: str
    kinds: tuple[Kind, ...]
    make: Callable[[Kind], Gradient]
    end: Callable[[Problem, Tensor], Tensor] = sampled  # the image latent of its chain, without gradient
    any_solver: bool = False  # otherwise DDIM only
    inverts: bool = False  # whether it goes back through the chain's states
    renormalizes: bool = False  # whether the latent's norm is held unless asked otherwise


GRADIENTS: Mapping[str, Way] = {
    "sdo": Way(
        "the one call that reads the variable, and the solver's linear path (SDO)", EVERY, lambda kind: planned(sdo, kind),
        any_solver=True,
    ),
    "full": Way("every call, recomputed one at a time", EVERY, lambda kind: planned(full, kind), any_solver=True),
    "adjoint": Way(
        "the continuous adjoint of the sampling ODE (AdjointDPM)", (LATENT, PROMPT, NEGATIVE), lambda kind: Adjoint(), inverts=True
    ),
    "invertible": Way(
        "every call of an exactly invertible coupled chain (EDICT, DOODL)", (LATENT, PROMPT, NEGATIVE), lambda kind: Coupled(),
        end=coupled, inverts=True, renormalizes=True,
    ),
    "flowgrad": Way(
        "every call, for controls added to the network's answers (FlowGrad)", (CONTROLS,), lambda kind: planned(full, kind),
        any_solver=True,
    ),
}  # fmt: skip


def gradient_of(name: str, variable: str) -> Gradient:
    """The gradient by name, for a variable by name. Raises UserError for one that is not there or not defined for it."""
    if name not in GRADIENTS:
        raise unknown("gradient", name, GRADIENTS)
    way, kind = GRADIENTS[name], KINDS[variable]
    check_defined(name, kind, way.kinds)
    return way.make(kind)


def check_defined(gradient: str, kind: Kind, kinds: Sequence[Kind]) -> None:
    """Raises UserError for a kind of variable that is not among those a gradient is defined for."""
    if kind not in kinds:
        names = " and ".join(each.name for each in kinds)
        raise UserError(f"over is {kind.name!r}, but the gradient {gradient!r} is for {names}")
