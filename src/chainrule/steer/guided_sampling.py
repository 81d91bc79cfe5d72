"""Guidance within one sampling run: every step is bent by the loss of its own one-step clean prediction.

No variable is optimized and nothing is sampled twice, but the loss is read off x0-hat, which is blurred while noise is high.
Both methods move along the gradient of the summed losses at the state, rescaled per image: `strength` is its root mean
square as a share of what it is added to, so that it means the same for every loss. Differs from the papers, whose
scales are tuned per loss and, for FreeDoM's code, taken from classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from chainrule import half
from chainrule.plan import Jump, walk
from chainrule.steer.problem import Problem, Seen


@dataclass(frozen=True, slots=True)
class FreeDoM:
    """x' = DDIM(x, m) - rho grad_x loss(x0-hat), with time travel (arXiv:2303.09833, Algorithms 1 and 2).

    `strength` is rho as a share of the step the solver makes. In the middle of the chain, from `travel[0]` to `travel[1]` of
    its calls, every step is noised again and repeated, `repeats` times in all.
    """

    strength: float = 0.2
    repeats: int = 2
    travel: tuple[float, float] = (0.3, 0.7)
    needs_signal: ClassVar[bool] = False

    def __call__(self, problem: Problem, x: Tensor) -> Seen:
        path, noise = walk(problem.grid), Fresh(problem)
        for i, jump in enumerate(path):
            inside = self.travel[0] <= i / len(path) < self.travel[1]
            after = x
            for turn in range(self.repeats if inside else 1):
                start = noise.back(after, jump) if turn else x
                answer, gradient = _guide(problem, start, jump)
                a, b = problem.chain.solver.process.coefficients(jump.start, jump.stop, jump.finish)
                plain = a * start + b * answer
                after = plain - _scaled(gradient, self.strength * _rms(plain - start))
            x = after
        return problem.read(x)


@dataclass(frozen=True, slots=True)
class Universal:
    """Universal guidance (arXiv:2302.07121, Algorithm 1): the noise prediction is moved, epsilon + s sigma grad_x loss(x0-hat).

    `strength` is s as a share of epsilon. `backward` gradient steps of size `backward_lr` on x0-hat itself follow, and are
    written into epsilon; every step is noised again and repeated, `repeats` times in all.
    """

    strength: float = 0.2
    backward: int = 0
    backward_lr: float = 0.05
    repeats: int = 2
    needs_signal: ClassVar[bool] = True

    def __call__(self, problem: Problem, x: Tensor) -> Seen:
        solver, noise = problem.chain.solver, Fresh(problem)
        for jump in walk(problem.grid):
            (alpha, sigma), (alpha2, sigma2) = solver.process.schedule(jump.start), solver.process.schedule(jump.stop, jump.finish)
            p, q = solver.process.coefficients(jump.start, 0)
            after = x
            for turn in range(self.repeats):
                start = noise.back(after, jump) if turn else x
                answer, gradient = _guide(problem, start, jump)
                epsilon = (start - alpha * (p * start + q * answer)) / sigma
                epsilon = epsilon + _scaled(gradient, self.strength * sigma * _rms(epsilon))
                clean = (start - sigma * epsilon) / alpha
                for _ in range(self.backward):
                    clean = clean - _scaled(problem.read(clean).gradient, self.backward_lr * _rms(clean))
                if self.backward:
                    epsilon = (start - alpha * clean) / sigma
                after = alpha2 * clean + sigma2 * epsilon
            x = after
        return problem.read(x)


class Fresh:
    """Fresh noise for going back up, the same in every run and batch."""

    def __init__(self, problem: Problem) -> None:
        self.chain, self.count = problem.chain, 0

    def back(self, x: Tensor, jump: Jump) -> Tensor:
        """From where a jump led, noised again to where it started."""
        a, b = self.chain.solver.process.renoise(jump.stop, jump.start)
        self.count += 1
        return a * x + b * self.chain.noise.fresh(self.count).to(x)


def _guide(problem: Problem, x: Tensor, jump: Jump) -> tuple[Tensor, Tensor]:
    """The network's answer at x, and the gradient of the summed losses of its clean prediction."""
    chain = problem.chain
    chain.on_call()
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        answer = chain.cast[jump.via](leaf, jump.start, chain.condition)
        p, q = chain.solver.process.coefficients(jump.start, 0)
        clean = p * leaf + q * answer
    seen = problem.read(clean.detach())
    return answer.detach(), half.gradient(clean, leaf, seen.gradient)


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (x.ndim - 1))


def _scaled(gradient: Tensor, size: Tensor) -> Tensor:
    """The gradient with this root mean square, per image; nothing where it is zero."""
    return gradient * (size / _rms(gradient).clamp(min=1e-20))


class Guide(Protocol):
    """Guidance of one run: the problem and the chain's first state -> what it ends in."""

    needs_signal: ClassVar[bool]  # whether it divides by the signal's share, of which a flow's first level has none

    def __call__(self, problem: Problem, x: Tensor) -> Seen: ...


# What each guide is, and how it is made from a strength.
GUIDES: Mapping[str, tuple[str, Callable[[float], Guide]]] = {
    "freedom": ("guidance by one-step predictions, with time travel (FreeDoM)", FreeDoM),
    "universal": ("guidance by one-step predictions, with self-recurrence (universal guidance)", Universal),
}
