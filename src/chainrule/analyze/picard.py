"""Parallel sampling by Picard iteration, and how good the one-step gradient is (SDO, arXiv:2505.07477, sections 3.2, 4.2, 4.4).

In y = x / A, with A the product of the solver's linear factors so far, a chain is y_i = y_0 + sum_{j<i} c_j m(A_j y_j),
c_j = b_j / A_{j+1}: a fixed point of the map F that evaluates the whole trajectory at once (Eq. 6-9). SDO's gradient is that
of one more application of F.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.chain import Chain
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.objective import Objective, read
from chainrule.plan import Grad, Jump, Plan, walk
from chainrule.report.tables import markdown
from chainrule.rewards import RewardFunction

DONE = 1e-6  # a trajectory whose last state moved by less than this share of its norm has converged


@dataclass(frozen=True, slots=True)
class Picard:
    """What `picard` measured, an estimate over images for each quantity.

    `change` and `error` have a row per iteration: how far the trajectory moved, and how far it is from the sequential one, as
    root mean squares of the final latent over that latent's. `converged` is the first iteration whose image differs from the
    sequential one by less than `tolerance`. `ratio` is the observed contraction, the geometric mean of successive changes'
    ratios; `norm` the operator norm of dF/dy on the trajectory, the constant lambda of Theorem 4.1. `cosine` and `apart`
    compare SDO's gradient at the initial noise with the exact one; `bound` is the theorem's, relative to the exact
    gradient's norm like `apart`, and infinite where the norm is not below 1.
    """

    steps: int
    tolerance: float
    change: list[Estimate]
    error: list[Estimate]
    figures: dict[str, Estimate]

    def __str__(self) -> str:
        rows = [(k + 1, moved, apart) for k, (moved, apart) in enumerate(zip(self.change, self.error, strict=True))]
        unbounded = "none: the norm is not below 1"
        figures = [(name, unbounded if value.mean == math.inf else value) for name, value in self.figures.items()]
        curves = markdown(("iteration", "moved by", "from the sequential image"), rows)
        return f"{curves}\n\n{markdown((f'{self.steps} steps', 'mean over images'), figures)}"


def picard(
    model: Model, prompts: Sequence[str], reward: RewardFunction, *, steps: int = 50,
    guidance: AnyGuidance = None, seeds: int = 1,
    tolerance: float = 1e-2, powers: int = 8, on_call: Callable[[], None] = lambda: None,
) -> Picard:  # fmt: skip
    """Iterate every trajectory to its fixed point, measure the contraction, and compare SDO's gradient with the exact one.

    Every prompt is run with `seeds` seeds. `powers` power iterations find the operator norm; products with dF/dy use central
    differences, and those with its transpose are exact. Raises UserError for a solver other than DDIM.
    """
    if model.solver.reads or model.solver.stochastic:
        raise UserError(f"Picard iteration is written for DDIM's map, and the solver is {model.sampler.name}; take the solver ddim")
    model = model.guided(guidance)
    found: list[dict[str, list[float]]] = []
    for prompt in prompts:
        for seed in range(seeds):
            chain = model.chain([prompt], [seed], on_call=on_call)
            found.append(_one(model, chain, [prompt], reward, steps, tolerance, powers, seed))
    rows = {key: [one[key] for one in found] for key in found[0]}
    columns = {key: [Estimate.of(list(values)) for values in zip(*rows[key], strict=True)] for key in ("change", "error")}
    names = {
        "converged": "iterations until the image is the sequential one's", "ratio": "observed contraction",
        "norm": "operator norm of dF/dy", "cosine": "cosine of SDO's gradient and the exact one",
        "apart": "their distance over the exact one's norm", "bound": "Theorem 4.1's bound on it",
    }  # fmt: skip
    figures = {name: _estimate([values[0] for values in rows[key]]) for key, name in names.items()}
    return Picard(steps, tolerance, columns["change"], columns["error"], figures)


def _estimate(values: list[float]) -> Estimate:
    return Estimate(math.inf, math.inf) if math.inf in values else Estimate.of(values)


def _one(
    model: Model, chain: Chain, prompts: list[str], reward: RewardFunction, steps: int, tolerance: float, powers: int, seed: int
) -> dict[str, list[float]]:
    ode = Trajectory(chain, walk(model.grid(steps)))
    x = model.noise([seed])
    sequential = torch.cat([x, *chain.states(x, walk(model.grid(steps)))]) / ode.factors.to(x)
    whole, final = sequential.clone(), sequential[-1].norm()
    whole[:] = sequential[:1]
    change: list[float] = []
    error: list[float] = []
    for _ in range(steps):
        moved = ode(whole) if not change or change[-1] > DONE else whole
        change.append(float((moved[-1] - whole[-1]).norm() / final))
        error.append(float((moved[-1] - sequential[-1]).norm() / final))
        whole = moved
    converged = next((k + 1 for k, far in enumerate(error) if far < tolerance), steps)
    moves = [(b / a) for a, b in itertools.pairwise(change) if a > 1e-5 and b > 0]
    ratio = math.exp(sum(map(math.log, moves)) / len(moves)) if moves else 0.0
    exact, quick, at_image = (_gradient(model, chain, prompts, reward, x, steps, every) for every in (True, False, None))
    apart, norm = float((quick - exact).norm() / exact.norm()), ode.norm(sequential, powers)
    # rho bounds dJ/dy_N, which is A_N dJ/dx_N.
    rho = float(at_image.norm()) * float(ode.factors[-1])
    bound = norm**2 * rho / (1 - norm) / float(exact.norm()) if norm < 1 else math.inf
    cosine = float(torch.cosine_similarity(quick.flatten(), exact.flatten(), dim=0))
    single = {"converged": converged, "ratio": ratio, "norm": norm, "cosine": cosine, "apart": apart, "bound": bound}
    return {"change": change, "error": error} | {key: [float(value)] for key, value in single.items()}


def _gradient(
    model: Model, chain: Chain, prompts: list[str], reward: RewardFunction, x: Tensor, steps: int, every: bool | None
) -> Tensor:
    """d(-reward) at the noise through every call or through the first one; with None, at the finished latent."""
    path = walk(model.grid(steps))
    live = tuple(Jump(j.start, j.stop, j.via, Grad.FULL if every or not i else Grad.NONE, j.finish) for i, j in enumerate(path))
    (branch,) = chain.walk(Plan((), (live,)), x)
    _, gradient = read(model.codec.decode, Objective.of(reward), branch.image, prompts)
    return gradient if every is None else branch.pull(gradient)


class Trajectory:
    """The map F of one chain (Eq. 6-9), on trajectories (steps + 1, c, h, w) in the variable y = x / A."""

    def __init__(self, chain: Chain, path: tuple[Jump, ...]) -> None:
        self.chain, self.path = chain, path
        moves = [chain.solver.process.coefficients(j.start, j.stop, j.finish) for j in path]
        factors = [1.0]
        for a, _ in moves:
            factors.append(factors[-1] * a)
        weights = [b / f for (_, b), f in zip(moves, factors[1:], strict=True)]
        self.factors, self.weights = (
            torch.tensor(values, dtype=torch.float64, device=chain.condition.positive.states.device).view(-1, 1, 1, 1)
            for values in (factors, weights)
        )

    def __call__(self, whole: Tensor) -> Tensor:
        with torch.no_grad():
            added = self.weights.to(whole) * torch.cat([self._answer(whole[i], i) for i in range(len(self.path))])
        return torch.cat([whole[:1], whole[:1] + added.cumsum(0)])

    def _answer(self, y: Tensor, i: int) -> Tensor:
        self.chain.on_call()
        x = (self.factors[i].to(y) * y)[None]
        return self.chain.cast[self.path[i].via](x, self.path[i].start, self.chain.condition)

    def forward(self, whole: Tensor, direction: Tensor, step: float = 1e-2) -> Tensor:
        """dF/dy times a direction (steps + 1, c, h, w), by a central difference. The first state of the direction is zero."""
        scale = step * whole.norm() / direction.norm()
        both = [self(whole + sign * scale * direction) for sign in (1, -1)]
        return (both[0] - both[1]) / (2 * scale)

    def backward(self, whole: Tensor, direction: Tensor) -> Tensor:
        """The transpose of dF/dy times a direction (steps + 1, c, h, w), exactly."""
        later = direction.flip(0).cumsum(0).flip(0)  # sum over i >= j
        found = [torch.zeros_like(whole[0])]
        for i in range(1, len(self.path)):
            leaf = whole[i].detach().requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self._answer(leaf, i)[0], leaf, self.weights[i].to(leaf) * later[i + 1])
            found.append(gradient)
        return torch.stack([*found, torch.zeros_like(whole[0])])

    def norm(self, whole: Tensor, powers: int) -> float:
        """The largest singular value of dF/dy with the initial state held fixed, by `powers` power iterations."""
        direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole)
        direction[0] = 0
        size = 0.0
        for _ in range(powers):
            direction = direction / direction.norm()
            out = self.forward(whole, direction)
            size = float(out.norm())
            direction = self.backward(whole, out)
        return size
