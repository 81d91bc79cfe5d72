"""Solvers: pure maps from one level to another, affine in the state and in the network's answer.

    x_stop = a * x_start + b * m

where m is what the network answers (noise, velocity or image, after guidance) and the scalars a and b have a closed form
for ANY two levels. Because the map is affine, "the network's answer is a constant" leaves exactly the linear carry a.
A multistep solver adds c times the clean prediction of the call before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import log
from typing import Protocol

from chainrule.noise import Schedule
from chainrule.plan import Grid, Jump, Path, consistency, walk


class Prediction(Enum):
    """What the network answers. The values are diffusers' names for `prediction_type`."""

    EPSILON = "epsilon"  # the noise
    VELOCITY = "v_prediction"  # alpha * noise - sigma * image (arXiv:2202.00512)
    SAMPLE = "sample"  # the image
    FLOW = "flow"  # noise - image (rectified flow)


@dataclass(frozen=True, slots=True)
class Step:
    """x_stop = a * x + b * m + c * (the clean prediction of the call before)."""

    a: float
    b: float
    c: float = 0.0


class Solver(Protocol):
    """What a chain asks of a solver."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def prediction(self) -> Prediction: ...

    @property
    def remembers(self) -> bool:
        """Whether a step reads the clean prediction of the call before."""
        ...

    def path(self, levels: Grid) -> Path:
        """The moves of a sampling run over these levels."""
        ...

    def step(self, jump: Jump, before: Jump | None) -> Step:
        """The move down of this jump; `before` is the one it follows in the same path."""
        ...

    def coefficients(self, start: int, stop: int, finish: bool = False) -> tuple[float, float]: ...

    def renoise(self, start: int, stop: int) -> tuple[float, float]: ...


@dataclass(frozen=True, slots=True)
class DDIM:
    """Deterministic DDIM (arXiv:2010.02502, Eq. 12 with eta = 0) and, for flow models, the Euler step.

    x_stop = alpha' * x0 + sigma' * epsilon, with x0 and epsilon read off x_start and m. With stop = 0 this is the
    one-step prediction x0. For a flow model it is x + (sigma' - sigma) * m.
    """

    schedule: Schedule
    prediction: Prediction

    @property
    def remembers(self) -> bool:
        return False

    def coefficients(self, start: int, stop: int, finish: bool = False) -> tuple[float, float]:
        """(a, b) of the step down from `start` to `stop`."""
        (alpha, sigma), (alpha2, sigma2) = self.schedule(start), self.schedule(stop, finish)
        if self.prediction is Prediction.EPSILON:
            return alpha2 / alpha, sigma2 - alpha2 / alpha * sigma
        if self.prediction is Prediction.VELOCITY:
            return alpha2 * alpha + sigma2 * sigma, sigma2 * alpha - alpha2 * sigma
        if self.prediction is Prediction.SAMPLE:
            return sigma2 / sigma, alpha2 - sigma2 / sigma * alpha
        return 1.0, sigma2 - sigma

    def path(self, levels: Grid) -> Path:
        return walk(levels)

    def step(self, jump: Jump, before: Jump | None) -> Step:
        return Step(*self.coefficients(jump.start, jump.stop, jump.finish))

    def renoise(self, start: int, stop: int) -> tuple[float, float]:
        """(a, b) of the jump up: x_stop = a * x_start + b * fresh noise has the marginal of level `stop`."""
        (alpha, sigma), (alpha2, sigma2) = self.schedule(start), self.schedule(stop)
        ratio = alpha2 / alpha
        return ratio, max(sigma2**2 - (ratio * sigma) ** 2, 0.0) ** 0.5


@dataclass(frozen=True, slots=True)
class DPMSolver:
    """DPM-Solver++(2M), data prediction, second order (arXiv:2211.01095, Algorithm 2).

    x_stop = sigma'/sigma x + (alpha' - sigma'/sigma alpha) D, with D = x0 + (x0 - x0_before) / (2 r), where r is the last
    step's share of log(alpha/sigma) over this one's. The first step and a step to 0 are first order, which is DDIM; so is
    a step that does not follow a call. Jumps by `coefficients` are DDIM's too.
    """

    first: DDIM

    @property
    def schedule(self) -> Schedule:
        return self.first.schedule

    @property
    def prediction(self) -> Prediction:
        return self.first.prediction

    @property
    def remembers(self) -> bool:
        return True

    def coefficients(self, start: int, stop: int, finish: bool = False) -> tuple[float, float]:
        return self.first.coefficients(start, stop, finish)

    def renoise(self, start: int, stop: int) -> tuple[float, float]:
        return self.first.renoise(start, stop)

    def path(self, levels: Grid) -> Path:
        return walk(levels)

    def step(self, jump: Jump, before: Jump | None) -> Step:
        if before is None or before.up or before.stop != jump.start or jump.stop == 0:
            return self.first.step(jump, before)
        (alpha, sigma), (alpha2, sigma2) = self.schedule(jump.start), self.schedule(jump.stop)
        alpha0, sigma0 = self.schedule(before.start)
        half = (log(alpha2 / sigma2) - log(alpha / sigma)) / (log(alpha / sigma) - log(alpha0 / sigma0)) / 2  # 1 / (2 r)
        clean = alpha2 - sigma2 / sigma * alpha
        p, q = self.coefficients(jump.start, 0)
        return Step(sigma2 / sigma + clean * (1 + half) * p, clean * (1 + half) * q, -clean * half)


@dataclass(frozen=True, slots=True)
class Consistency:
    """Multistep consistency sampling with latent consistency models' boundary scaling (arXiv:2310.04378, Eq. 9).

    Every call answers with c_skip x + c_out x0, c_skip = d^2 / ((10 t)^2 + d^2), c_out = 10 t / sqrt((10 t)^2 + d^2), d = 0.5,
    t = level - 1; what follows is fresh noise. A jump that is not to 0 is DDIM's.
    """

    first: DDIM

    @property
    def schedule(self) -> Schedule:
        return self.first.schedule

    @property
    def prediction(self) -> Prediction:
        return self.first.prediction

    @property
    def remembers(self) -> bool:
        return False

    def path(self, levels: Grid) -> Path:
        return consistency(levels)

    def coefficients(self, start: int, stop: int, finish: bool = False) -> tuple[float, float]:
        a, b = self.first.coefficients(start, stop)
        if stop != 0:
            return a, b
        time = 10 * (start - 1)
        skip, out = 0.25 / (time**2 + 0.25), time / (time**2 + 0.25) ** 0.5
        return skip + out * a, out * b

    def renoise(self, start: int, stop: int) -> tuple[float, float]:
        return self.first.renoise(start, stop)

    def step(self, jump: Jump, before: Jump | None) -> Step:
        return Step(*self.coefficients(jump.start, jump.stop))
