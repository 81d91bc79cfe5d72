"""EDICT's coupled chain (arXiv:2211.12446) as DOODL uses it (arXiv:2303.13703): exactly invertible, so memory is constant.

Two states x and y stand on every level. One step, with the solver's x' = a x + b m:

    x1 = a x + b m(y)     x' = p x1 + (1 - p) y1
    y1 = a y + b m(x1)    y' = p y1 + (1 - p) x'

The backward pass inverts a step to get its inputs back, calls the network again, and pulls the gradient through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from chainrule import half
from chainrule.plan import Jump, walk
from chainrule.steer.problem import Problem, Seen

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Coupled:
    """The gradient through EDICT's chain; both states start at the variable, and x is the image (DOODL).

    `p` mixes the two: 1 leaves two separate chains, lower values hold them together; 0.93 is EDICT's.
    """

    p: float = 0.93

    def forward(self, problem: Problem, pair: Pair) -> Pair:
        """From the grid's first level to the image."""
        with torch.no_grad():
            for jump in walk(problem.grid):
                pair = self._step(problem, jump, pair)
        return pair

    def inverse(self, problem: Problem, pair: Pair) -> Pair:
        """From the image back to the grid's first level: exact but for rounding."""
        with torch.no_grad():
            for jump in reversed(walk(problem.grid)):
                pair = self._back(problem, jump, pair)[0]
        return pair

    def _moves(self, problem: Problem, jump: Jump) -> tuple[float, float]:
        return problem.chain.solver.process.coefficients(jump.start, jump.stop, jump.finish)

    def _call(self, problem: Problem, x: Tensor, jump: Jump) -> Tensor:
        chain = problem.chain
        chain.on_call()
        return chain.cast[jump.via](x, jump.start, chain.condition)

    def _step(self, problem: Problem, jump: Jump, pair: Pair) -> Pair:
        (x, y), (a, b), p = pair, self._moves(problem, jump), self.p
        x1 = a * x + b * self._call(problem, y, jump)
        y1 = a * y + b * self._call(problem, x1, jump)
        x2 = p * x1 + (1 - p) * y1
        return x2, p * y1 + (1 - p) * x2

    def _back(self, problem: Problem, jump: Jump, pair: Pair) -> tuple[Pair, Tensor]:
        """The pair before a step, and the x1 within it."""
        (x2, y2), (a, b), p = pair, self._moves(problem, jump), self.p
        y1 = (y2 - (1 - p) * x2) / p
        x1 = (x2 - (1 - p) * y1) / p
        y = (y1 - b * self._call(problem, x1, jump)) / a
        return ((x1 - b * self._call(problem, y, jump)) / a, y), x1

    def __call__(self, problem: Problem, x: Tensor, rng: Random) -> Seen:
        pair = self.forward(problem, (x.detach(), x.detach()))
        seen, p = problem.read(pair[0]), self.p
        v, w = seen.gradient, torch.zeros_like(seen.gradient)  # at x and at y
        for jump in reversed(walk(problem.grid)):
            with torch.no_grad():
                before, x1 = self._back(problem, jump, pair)
            a, b = self._moves(problem, jump)
            v = v + (1 - p) * w  # at x', which y' reads too
            v, w = p * v, p * w + (1 - p) * v  # at x1 and at y1
            v = v + self._pull(problem, jump, x1, b * w)
            w = a * w + self._pull(problem, jump, before[1], b * v)
            v, pair = a * v, before
        return replace(seen, gradient=v + w)

    def _pull(self, problem: Problem, jump: Jump, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at one call's input; leaves in it get theirs."""
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            half.backward(self._call(problem, leaf, jump), gradient)
        assert leaf.grad is not None
        return leaf.grad
