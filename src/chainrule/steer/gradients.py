"""Gradients of a sampling chain, interchangeable by name.

Each is `(problem, x, rng) -> Seen`: it runs the chain from `x` and returns the gradient there; leaves elsewhere (an embedding,
controls) get theirs in `.grad`. `sdo` and `full` are plans on the one walker; `adjoint` and `invertible` are chains of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random

from torch import Tensor

from chainrule.errors import unknown
from chainrule.plan import Grad, Plan, walk
from chainrule.steer.problem import Problem, Seen

Gradient = Callable[[Problem, Tensor, Random], Seen]
Grads = Callable[[int, str, Random], list[Grad]]  # of every call, from how many there are, the kind of variable and luck


def sdo(calls: int, kind: str, rng: Random) -> list[Grad]:
    """Shortcut diffusion optimization (arXiv:2505.07477): the graph of the one call that reads the variable.

    For a latent that is the first call of its own grid (Eq. 15, 18-19, Fig. 4). Embeddings and weights are read by all calls,
    and one of them is drawn (section 4.3, Fig. 5). Controls are added to the answers, so every call passes them its own part
    of the linear path; the calls' own graphs are empty.
    """
    if kind == "controls":
        return [Grad.WEIGHTS] * calls
    live = 0 if kind == "latent" else rng.randrange(calls)
    return [Grad.FULL if i == live else Grad.NONE for i in range(calls)]


def full(calls: int, kind: str, rng: Random) -> list[Grad]:
    """Backpropagation through every call (arXiv:2505.07477, Eq. 11)."""
    return [Grad.FULL] * calls


def planned(grads: Grads, kind: str) -> Gradient:
    """The gradient of a plan, by the walker."""

    def gradient(problem: Problem, x: Tensor, rng: Random) -> Seen:
        path = walk(problem.grid)
        live = tuple(replace(jump, grad=grad) for jump, grad in zip(path, grads(len(path), kind, rng), strict=True))
        (branch,) = problem.chain.walk(Plan((), (live,)), x)
        seen = problem.read(branch.image)
        return replace(seen, gradient=branch.pull(seen.gradient))

    return gradient


PLANNED: Mapping[str, Grads] = {"sdo": sdo, "full": full}
# What each gradient is, and the variables it is defined for.
GRADIENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "sdo": (
        "the one call that reads the variable, and the solver's linear path (SDO)",
        ("latent", "prompt", "negative", "controls", "weights"),
    ),
    "full": ("every call, recomputed one at a time", ("latent", "prompt", "negative", "controls", "weights")),
    "adjoint": ("the continuous adjoint of the sampling ODE (AdjointDPM)", ("latent", "prompt", "negative")),
    "invertible": ("every call of an exactly invertible coupled chain (EDICT, DOODL)", ("latent", "prompt", "negative")),
    "flowgrad": ("every call, for controls added to the network's answers (FlowGrad)", ("controls",)),
}


def gradient_of(name: str, kind: str) -> Gradient:
    """The gradient by name, for a variable of this kind. UserError for one it is not defined for."""
    if name in PLANNED:
        return planned(PLANNED[name], kind)
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
