"""Solvers: pure maps from one level to another, affine in the state and in the network's answer.

    x_stop = a * x_start + b * m

where m is what the network answers (noise, velocity or image, after guidance) and the scalars a and b have a closed form
for ANY two levels. Because the map is affine, "the network's answer is a constant" leaves exactly the linear carry a.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from chainrule.noise import Schedule


class Prediction(Enum):
    """What the network answers. The values are diffusers' names for `prediction_type`."""

    EPSILON = "epsilon"  # the noise
    VELOCITY = "v_prediction"  # alpha * noise - sigma * image (arXiv:2202.00512)
    SAMPLE = "sample"  # the image
    FLOW = "flow"  # noise - image (rectified flow)


@dataclass(frozen=True, slots=True)
class DDIM:
    """Deterministic DDIM (arXiv:2010.02502, Eq. 12 with eta = 0) and, for flow models, the Euler step.

    x_stop = alpha' * x0 + sigma' * epsilon, with x0 and epsilon read off x_start and m. With stop = 0 this is the
    one-step prediction x0. For a flow model it is x + (sigma' - sigma) * m.
    """

    schedule: Schedule
    prediction: Prediction

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

    def renoise(self, start: int, stop: int) -> tuple[float, float]:
        """(a, b) of the jump up: x_stop = a * x_start + b * fresh noise has the marginal of level `stop`."""
        (alpha, sigma), (alpha2, sigma2) = self.schedule(start), self.schedule(stop)
        ratio = alpha2 / alpha
        return ratio, max(sigma2**2 - (ratio * sigma) ** 2, 0.0) ** 0.5
