"""The continuous adjoint of the sampling ODE (AdjointDPM, arXiv:2307.10711), by torchdiffeq.

With y = x / alpha and rho = sigma / alpha, the probability-flow ODE is dy/drho = epsilon(x, rho), and DDIM is Euler's method
on it. The adjoint a = dJ/dy obeys da/drho = -a^T d epsilon/dy, and is integrated back together with y, so nothing of
the way there is kept. Discretized backwards, it is not the gradient of the discrete chain; the two meet as the steps grow.
A rectified flow is solved in its own coordinates: dx/dsigma = velocity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from chainrule import half
from chainrule.solve import Prediction
from chainrule.steer.problem import Problem, Seen


@dataclass(frozen=True, slots=True)
class Adjoint:
    """`solver` is torchdiffeq's: "euler" is DDIM's own discretization, "midpoint" and "rk4" call between its levels."""

    solver: str = "euler"

    def __call__(self, problem: Problem, x: Tensor, rng: Random) -> Seen:
        from torchdiffeq import odeint_adjoint

        chain = problem.chain
        ode = Ode(problem)
        leaf = x.detach().requires_grad_()
        times = torch.tensor(ode.times, dtype=torch.float64, device=x.device)
        leaves = tuple(t for t in (chain.condition.positive.states, chain.condition.negative.states) if t.requires_grad)
        with torch.enable_grad():
            path = odeint_adjoint(
                ode, leaf / ode.scales[0], times[[0, -1]], method=self.solver, options=_steps(times), adjoint_params=leaves,
                adjoint_options=_steps(times),
            )  # fmt: skip
            end = path[-1] * ode.scales[-1]
            seen = problem.read(end.detach())
            half.backward(end, seen.gradient)
        assert leaf.grad is not None
        return replace(seen, gradient=leaf.grad)


def _steps(times: Tensor) -> dict[str, Callable[..., Tensor]]:
    """torchdiffeq's options for these rising times, falling on the way back."""
    return {"grid_constructor": lambda func, y0, t: times if t[0] < t[-1] else times.flip(0)}


class Ode:
    """dy/dt of a problem's chain in t = -rho, which rises. `times` are t at the grid's levels, `scales` alpha there."""

    def __init__(self, problem: Problem) -> None:
        self.chain, grid = problem.chain, problem.grid
        solver = self.chain.solver
        self.flow = solver.process.prediction is Prediction.FLOW
        ends = [solver.process.schedule(level, finish=level == 0) for level in grid]
        self.scales = [1.0 if self.flow else alpha for alpha, _ in ends]
        self.times = [-sigma if self.flow else -sigma / alpha for alpha, sigma in ends]

    def __call__(self, time: Tensor, y: Tensor) -> Tensor:
        rho, prediction, chain = -float(time.detach()), self.chain.solver.process.prediction, self.chain
        alpha = 1.0 if self.flow else (1 + rho**2) ** -0.5
        sigma, x = rho * alpha, alpha * y
        level = max(chain.solver.process.schedule.level(1 - rho if self.flow else alpha, sigma), 1.0)  # none is asked for below 1
        chain.on_call()
        answer = chain.cast["base"](x, level, chain.condition)
        if prediction is Prediction.VELOCITY:
            return -(alpha * answer + sigma * x)
        if prediction is Prediction.SAMPLE:
            return -(x - alpha * answer) / max(sigma, 1e-12)
        return -answer  # noise, or a flow's velocity
