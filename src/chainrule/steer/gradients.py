"""Gradients of a sampling chain, interchangeable by name.

Each is `(problem, x, rng) -> Seen`: it runs the chain from `x` and returns the gradient there; leaves elsewhere (an embedding,
controls) get theirs in `.grad`. `sdo` and `full` are plans on the one walker; `adjoint` and `invertible` are chains of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from torch import Tensor

from chainrule.errors import unknown
from chainrule.methods import SDO, DRaFT
from chainrule.plan import Grad, Grid, Jump, Plan, walk
from chainrule.steer.problem import Problem, Seen

Gradient = Callable[[Problem, Tensor, Random], Seen]
Planner = Callable[[Grid, str, Random], Plan]


def sdo(grid: Grid, kind: str, rng: Random) -> Plan:
    """Shortcut diffusion optimization (arXiv:2505.07477): the graph of the one call that reads the variable.

    For a latent that is the first call of its own grid (Eq. 15, 18-19, Fig. 4). An embedding is read by all calls, and one of
    them is drawn (section 4.3). Controls are added to the answers, so every call passes them its own part of the linear
    path and no call needs a graph.
    """
    if kind == "latent":
        return Plan((), (_with(walk(grid), [Grad.FULL]),))
    if kind == "controls":
        return Plan((), (_with(walk(grid), [Grad.WEIGHTS] * (len(grid) - 1)),))
    return SDO().plan(grid, rng)


def full(grid: Grid, kind: str, rng: Random) -> Plan:
    """Backpropagation through every call (arXiv:2505.07477, Eq. 11)."""
    return DRaFT().plan(grid, rng)


def _with(path: tuple[Jump, ...], grads: list[Grad]) -> tuple[Jump, ...]:
    grads = grads + [Grad.NONE] * (len(path) - len(grads))
    return tuple(Jump(j.start, j.stop, j.via, g, j.finish) for j, g in zip(path, grads, strict=True))


def planned(planner: Planner, kind: str) -> Gradient:
    """The gradient of a plan, by the walker."""

    def gradient(problem: Problem, x: Tensor, rng: Random) -> Seen:
        (branch,) = problem.chain.walk(planner(problem.grid, kind, rng), x)
        seen = problem.read(branch.image)
        return Seen(seen.losses, seen.images, branch.pull(seen.gradient))

    return gradient


PLANNERS: Mapping[str, Planner] = {"sdo": sdo, "full": full}
# What each gradient is, and the variables it is defined for.
GRADIENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sdo": (
        "the one call that reads the variable, and the solver's linear path (SDO)",
        ("latent", "prompt", "negative", "controls"),
    ),
    "full": ("every call, recomputed one at a time", ("latent", "prompt", "negative", "controls")),
    "adjoint": ("the continuous adjoint of the sampling ODE (AdjointDPM)", ("latent", "prompt", "negative")),
    "invertible": ("every call of an exactly invertible coupled chain (EDICT, DOODL)", ("latent", "prompt", "negative")),
    "flowgrad": ("every call, for controls added to the network's answers (FlowGrad)", ("controls",)),
}


def gradient_of(name: str, kind: str) -> Gradient:
    """The gradient by name, for a variable of this kind. UserError for one it is not defined for."""
    if name in PLANNERS:
        return planned(PLANNERS[name], kind)
    if name == "flowgrad":
        return planned(full, kind)
    if name == "adjoint":
        from chainrule.steer.adjoint import Adjoint

        return Adjoint()
    if name == "invertible":
        from chainrule.steer.invertible import Coupled

        return Coupled()
    raise unknown("gradient", name, GRADIENTS)


def image_of(name: str, problem: Problem, x: Tensor) -> Tensor:
    """Where the chain of a gradient leads from x, without gradient: the sampler's own end, but for the coupled chain."""
    if name != "invertible":
        return problem.chain.end(x, walk(problem.grid))
    from chainrule.steer.invertible import Coupled

    return Coupled().forward(problem, (x, x))[0]
