"""Solvers: pure maps from one level to another, affine in the state and in the network's answer.

    x_stop = a * x_start + b * m

where m is what the network answers (noise, velocity or image, after guidance) and the scalars a and b have a closed form
for ANY two levels. Because the map is affine, "the network's answer is a constant" leaves exactly the linear carry a.
A multistep solver adds multiples of the clean predictions of the calls before, a stochastic one d times fresh noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby, pairwise
from math import floor, log
from typing import ClassVar, Protocol

import numpy as np

from chainrule.noise import Schedule
from chainrule.plan import Path


class Prediction(Enum):
    """What the network answers. The values are diffusers' names for `prediction_type`."""

    EPSILON = "epsilon"  # the noise
    VELOCITY = "v_prediction"  # alpha * noise - sigma * image (arXiv:2202.00512)
    SAMPLE = "sample"  # the image
    FLOW = "flow"  # noise - image (rectified flow)


@dataclass(frozen=True, slots=True)
class Step:
    """x_stop = a * x + b * m + sum over k of history[k] * (clean prediction k + 1 calls before this one) + d * fresh noise."""

    a: float
    b: float = 0.0
    history: tuple[float, ...] = ()
    d: float = 0.0


@dataclass(frozen=True, slots=True)
class Process:
    """What a network was trained on: a schedule, and what it answers. The moves here are those of its ODE, and up again."""

    schedule: Schedule
    prediction: Prediction

    def coefficients(self, start: float, stop: float, finish: bool = False) -> tuple[float, float]:
        """(a, b) of deterministic DDIM from `start` down to `stop` (arXiv:2010.02502, Eq. 12 with eta = 0).

        x_stop = alpha' * x0 + sigma' * epsilon, with x0 and epsilon read off x_start and m. With stop = 0 this is the
        one-step prediction x0. For a flow model it is Euler's step x + (sigma' - sigma) * m.
        """
        (alpha, sigma), (alpha2, sigma2) = self.schedule(start), self.schedule(stop, finish)
        if self.prediction is Prediction.EPSILON:
            return alpha2 / alpha, sigma2 - alpha2 / alpha * sigma
        if self.prediction is Prediction.VELOCITY:
            return alpha2 * alpha + sigma2 * sigma, sigma2 * alpha - alpha2 * sigma
        if self.prediction is Prediction.SAMPLE:
            return sigma2 / sigma, alpha2 - sigma2 / sigma * alpha
        return 1.0, sigma2 - sigma

    def leap(self, nodes: Sequence[float], stop: float, finish: bool = False) -> tuple[Step, ...]:
        """One long step from the first of these levels to `stop`, of the answers at all of them: a * x + b * m summed over nodes.

        The ODE is dx / d sigma = m for a flow, and d(x / alpha) / d(sigma / alpha) = noise otherwise. The polynomial through the
        nodes' answers is integrated (Lagrange, arXiv:2606.11075), so one node gives `coefficients`, and a's are those of the
        noise that a node's own state says there is. The first one's also has the carry. Raises ValueError for several nodes of
        which one has no signal: sigma / alpha has no value there.
        """
        if len(nodes) == 1:
            return (Step(*self.coefficients(nodes[0], stop, finish)),)
        scales = [*(self.schedule(level) for level in nodes), self.schedule(stop, finish)]
        alpha, _ = scales[-1]
        if self.prediction is Prediction.FLOW:
            weights = quadrature([sigma for _, sigma in scales])
            return tuple(Step(float(i == 0), weight) for i, weight in enumerate(weights))
        if not all(signal for signal, _ in scales):
            raise ValueError(f"level {nodes[0]:g} has no signal")
        weights, noises = quadrature([sigma / signal for signal, sigma in scales]), [self.noise(level) for level in nodes]
        found = [Step(alpha * weight * p, alpha * weight * q) for weight, (p, q) in zip(weights, noises, strict=True)]
        return (replace(found[0], a=alpha / scales[0][0] + found[0].a), *found[1:])

    def noise(self, level: float) -> tuple[float, float]:
        """(p, q): the noise that an answer m at state x says there is, epsilon = (x - alpha * x0) / sigma = p * x + q * m."""
        (alpha, sigma), (p, q) = self.schedule(level), self.coefficients(level, 0)
        return (1 - alpha * p) / sigma, -alpha * q / sigma

    def renoise(self, start: float, stop: float) -> tuple[float, float]:
        """(a, d) of the jump up: x_stop = a * x_start + d * fresh noise has the marginal of level `stop`."""
        (alpha, sigma), (alpha2, sigma2) = self.schedule(start), self.schedule(stop)
        ratio = alpha2 / alpha
        return ratio, max(sigma2**2 - (ratio * sigma) ** 2, 0.0) ** 0.5


class Solver(Protocol):
    """What a chain asks of a solver."""

    stochastic: ClassVar[bool]  # whether a step adds fresh noise

    @property
    def reads(self) -> int:
        """How many earlier calls' clean predictions a step reads at most: the length of its history."""
        ...

    @property
    def process(self) -> Process: ...

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]`. `run` holds the calls of a path, earlier and later ones, that no jump up interrupts.

        The step's history is at most `at` long: there are no more calls before it.
        """
        ...


def moves(solver: Solver, path: Path) -> Iterator[Step]:
    """The move of every jump of a path: down by the solver, up by the process's noise."""
    for up, jumps in groupby(path, key=lambda jump: jump.up):
        run = tuple(jumps)
        if not up:
            yield from (solver.step(run, at) for at in range(len(run)))
        else:
            pairs = (solver.process.renoise(jump.start, jump.stop) for jump in run)
            yield from (Step(a, d=d) for a, d in pairs)


def quadrature(places: Sequence[float]) -> list[float]:
    """The weights of a function's values at all places but the last for its integral from the first place to the last.

    They are exact for polynomials of a degree below the number of values: the solution of their moments' equations.
    """
    first, length = places[0], places[-1] - places[0]
    powers = np.arange(len(places) - 1)
    at = (np.array(places[:-1], dtype=np.float64) - first) / length
    weights: list[float] = np.linalg.solve(at[None, :] ** powers[:, None], length / (powers + 1)).tolist()
    return weights


@dataclass(frozen=True, slots=True)
class DDIM:
    """Deterministic DDIM; on a variance-preserving schedule Euler's method in sigma / alpha, and for flows Euler's step."""

    process: Process
    reads: ClassVar[int] = 0
    stochastic: ClassVar[bool] = False

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]` as coefficients."""
        jump = run[at]
        return Step(*self.process.coefficients(jump.start, jump.stop, jump.finish))

    def leap(self, nodes: Sequence[float], stop: float, finish: bool) -> tuple[Step, ...]:
        """The one long step from the first of these levels, as what the state and the answer at each of them count."""
        return self.process.leap(nodes, stop, finish)


@dataclass(frozen=True, slots=True)
class Ancestral:
    """DDPM's ancestral step (arXiv:2006.11239, Eq. 6-7): a draw from the posterior of x_stop given x_start and x0.

    It is DDIM's step with eta = 1 (arXiv:2010.02502, Eq. 12 and 16), and has the marginals of any schedule, a flow's too.
    Mean alpha' (1 - r^2) / sigma^2-weighted x0 and r sigma'^2 / sigma^2 x_start with r = alpha / alpha', and the posterior's own
    variance (diffusers' "fixed_small"). A step to 0 adds nothing.
    """

    process: Process
    reads: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]` as coefficients."""
        jump = run[at]
        (alpha, sigma), (alpha2, sigma2) = self.process.schedule(jump.start), self.process.schedule(jump.stop, jump.finish)
        ratio = alpha / alpha2
        spread = sigma**2 - (ratio * sigma2) ** 2  # of x_start given x_stop
        p, q = self.process.coefficients(jump.start, 0)
        clean = alpha2 * spread / sigma**2
        return Step(ratio * sigma2**2 / sigma**2 + clean * p, clean * q, d=sigma2 * max(spread, 0.0) ** 0.5 / sigma)


@dataclass(frozen=True, slots=True)
class DPMSolver:
    """DPM-Solver++, data prediction, multistep, of order 2 (2M, midpoint) or 3 (3M) (arXiv:2211.01095, Algorithm 2, Appendix B).

    With lambda = log(alpha / sigma), h = lambda' - lambda and x0, x1, x2 the clean predictions of this call and the two before,
    whose steps were r0 h and r1 h long:

        x_stop = sigma'/sigma x + alpha' (1 - e^-h) x0 + p D1 + q D2
        2M: D1 = (x0 - x1) / r0, p = alpha' (1 - e^-h) / 2, q = 0
        3M: D2 = ((x0 - x1) / r0 - (x1 - x2) / r1) / (r0 + r1), D1 = (x0 - x1) / r0 + r0 D2,
            p = alpha' (1 - (1 - e^-h) / h), q = alpha' / 2 - p / h

    The first call of a run is of order 1, which is DDIM; the second of order 2; a step to 0 of order 1. A run of fewer than
    `settle` calls takes the step before the sampler's last at order 2, as diffusers does (`lower_order_final`).
    3M is what the authors' code and diffusers compute. Taylor's expansion has 2 q D2 where they have q D2, so 3M converges with
    order 2 as well, with about 0.4 of 2M's error (tests/test_solvers.py).
    """

    process: Process
    order: int = 2
    settle: int = 15
    stochastic: ClassVar[bool] = False

    @property
    def reads(self) -> int:
        """How many earlier clean predictions a step reads."""
        return self.order - 1

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]` as coefficients."""
        jump, settled = run[at], len(run) < self.settle and at == len(run) - 2 and run[-1].finish
        order = 1 if jump.stop == 0 else min(self.order, at + 1, 2 if settled else self.order)
        if order == 1:
            return Step(*self.process.coefficients(jump.start, jump.stop, jump.finish))
        levels = (jump.stop, *(call.start for call in reversed(run[at + 1 - order : at + 1])))
        first, *history = self._weights([self.process.schedule(level) for level in levels])
        (_, sigma), (_, sigma2) = self.process.schedule(jump.start), self.process.schedule(jump.stop)
        p, q = self.process.coefficients(jump.start, 0)
        return Step(sigma2 / sigma + first * p, first * q, tuple(history))

    def _weights(self, scales: list[tuple[float, float]]) -> tuple[float, ...]:
        """What x0, x1 (and x2) are multiplied with, given (alpha, sigma) where the step stops and where those calls started."""
        (alpha2, sigma2), (alpha, sigma), *_ = scales
        clean = alpha2 - sigma2 / sigma * alpha  # alpha' (1 - e^-h)
        h, *lengths = (log(a2 / s2) - log(a / s) for (a2, s2), (a, s) in pairwise(scales))
        if len(lengths) == 1:
            half = h / lengths[0] / 2
            return clean * (1 + half), -clean * half
        r0, r1 = (length / h for length in lengths)
        p = alpha2 - clean / h
        second = (r0 * p + alpha2 / 2 - p / h) / (r0 + r1)  # what (x0 - x1) / r0 - (x1 - x2) / r1 is multiplied with
        newer, older = (p + second) / r0, second / r1  # the step adds newer * (x0 - x1) - older * (x1 - x2)
        return clean + newer, -newer - older, older


@dataclass(frozen=True, slots=True)
class Consistency:
    """Multistep consistency sampling (arXiv:2303.01469, Algorithm 1) with latent consistency models' boundary scaling.

    Every call answers with c_skip x + c_out x0, c_skip = d^2 / (s^2 + d^2), c_out = s / sqrt(s^2 + d^2), d = 0.5, s = `scaling`
    times the timestep, level - 1 (arXiv:2310.04378, Eq. 9); a step to a level above 0 noises that again.
    """

    process: Process
    scaling: float = 10.0
    reads: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]` as coefficients."""
        jump = run[at]
        a, b = self.process.coefficients(jump.start, 0)
        time = self.scaling * (jump.start - 1)
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25) ** 0.5
        alpha, sigma = self.process.schedule(jump.stop)
        return Step(alpha * (skip + out * a), alpha * out * b, d=sigma)


@dataclass(frozen=True, slots=True)
class TCD:
    """Strategic stochastic sampling of trajectory consistency models (TCD, arXiv:2402.19159, Algorithm 4).

    DDIM down to the timestep (1 - `gamma`) times that of `stop`, and noise up to `stop`. gamma 0 is DDIM, 1 goes to the
    clean image and noises that. A step to 0 adds nothing.
    """

    process: Process
    gamma: float = 0.3
    reads: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True

    def step(self, run: Path, at: int) -> Step:
        """The move of `run[at]` as coefficients."""
        jump = run[at]
        if jump.stop == 0:
            return Step(*self.process.coefficients(jump.start, 0, jump.finish))
        down = 1 + floor(round((1 - self.gamma) * (jump.stop - 1), 4))  # a product that is whole but for its last bit stays so
        a, b = self.process.coefficients(jump.start, down)
        ratio, d = self.process.renoise(down, jump.stop)
        return Step(ratio * a, ratio * b, d=d)
