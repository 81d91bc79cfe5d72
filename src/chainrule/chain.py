"""The one walker: runs a plan forwards, and pulls a gradient back through it.

Every step is x' = a * x + b * m + noise (solve.py), so the backward pass is written out instead of left to a tape: with v the
gradient at x', the call gets b * v, and v becomes a * v, plus the call's input gradient where the plan says FULL. A
multistep solver also carries the last call's clean prediction, p * x + q * m, with a gradient w of its own.
Nothing else is stored than the states that live calls started from. Under RECOMPUTE the forward pass is plain sampling
and the backward pass replays one live call at a time, so memory is one call's graph whatever N, K or M; KEEP holds the
graphs instead. Both run the same lines and give the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from chainrule import half
from chainrule.denoise import Cast, Condition
from chainrule.noise import Noise
from chainrule.plan import Grad, Jump, Path, Plan
from chainrule.solve import Solver, Step


class Memory(Enum):
    """What is held between the forward and the backward pass. It never changes a number."""

    KEEP = "keep"  # every live call's activations
    RECOMPUTE = "recompute"  # the live calls' inputs; their activations are made again, one call at a time
    BLOCKS = "blocks"  # the same, and inside a call the inputs of its blocks; see `Model.blockwise`


FRESH = 1000  # branches that can be told apart by the noise they draw
# The gradient a penalty adds to a call's answer: (answer, state, jump) -> same shape as the answer.
Penalty = Callable[[Tensor, Tensor, Jump], Tensor]


@dataclass(slots=True)
class _Step:
    """What the backward pass needs of one jump."""

    jump: Jump
    move: Step
    x: Tensor | None = None
    answer: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a walk stands: its state, the jump that led there, that call's clean prediction, and the noise drawn so far."""

    x: Tensor
    jump: Jump | None = None
    clean: Tensor | None = None
    ups: int = 0


@dataclass(slots=True)
class Walk:
    """A finished branch: its image latent, and the way back."""

    image: Tensor
    _steps: list[_Step]
    _call: Callable[[Tensor, Jump], Tensor]
    _clean: Callable[[Jump], tuple[float, float]]
    _half: Callable[[Jump], bool]

    @property
    def live(self) -> bool:
        return any(step.x is not None for step in self._steps)

    def pull(self, gradient: Tensor, penalty: Penalty | None = None) -> Tensor:
        """Add d(loss)/d(leaf) to `.grad` of every trainable leaf, given d(loss)/d(image).

        Returns the gradient at the branch's first state. Frees what it used: call it once.
        """
        v, w = gradient.detach(), None  # at the state, and at this call's clean prediction where a later step read it
        while self._steps:
            step = self._steps.pop()
            p, q = self._clean(step.jump) if w is not None else (0.0, 0.0)
            if step.x is not None:
                answer = step.answer if step.answer is not None else _live(self._call, step.x, step.jump)
                upstream = step.move.b * v if w is None else step.move.b * v + q * w
                if penalty:
                    upstream = upstream + penalty(answer.detach(), step.x.detach(), step.jump)
                step.x.grad = None
                if answer.requires_grad and self._half(step.jump):
                    half.backward(answer, upstream)
                elif answer.requires_grad:
                    answer.backward(upstream.to(answer.dtype))
            v, w = (
                step.move.a * v if w is None else step.move.a * v + p * w,
                step.move.c * v if step.move.c else None,
            )
            if step.x is not None and step.x.grad is not None:
                v = v + step.x.grad
        return v


def _live(call: Callable[[Tensor, Jump], Tensor], x: Tensor, jump: Jump) -> Tensor:
    with torch.enable_grad():
        return call(x, jump)


@dataclass(frozen=True, slots=True)
class Chain:
    """A plan's surroundings: who answers, how steps are solved, for which prompts and noise."""

    cast: Cast
    solver: Solver
    condition: Condition
    noise: Noise
    memory: Memory = Memory.RECOMPUTE
    on_call: Callable[[], None] = field(default=lambda: None)

    def _call(self, x: Tensor, jump: Jump) -> Tensor:
        return self.cast[jump.via](x, jump.start, self.condition)

    def _take(self, place: _Place, jump: Jump, branch: int) -> tuple[_Place, _Step]:
        step, clean = _Step(jump, self._move(jump, place.jump)), None
        after = step.move.a * place.x
        if not jump.up:
            answer = self._answer(place.x, jump, step)
            after = after + step.move.b * answer
            p, q = self._clean(jump)
            clean = p * place.x + q * answer if self.solver.remembers else None
        if step.move.c:
            assert place.clean is not None
            after = after + step.move.c * place.clean
        if step.move.d:
            after = after + step.move.d * self._fresh(branch, place.ups).to(after)
        return _Place(after, jump, clean, place.ups + bool(step.move.d)), step

    def _move(self, jump: Jump, before: Jump | None) -> Step:
        if not jump.up:
            return self.solver.step(jump, before)
        a, d = self.solver.process.renoise(jump.start, jump.stop)
        return Step(a, d=d)

    def _answer(self, x: Tensor, jump: Jump, step: _Step) -> Tensor:
        """The call's answer as a constant; a live call's state, and under KEEP its graph, stay in `step`."""
        if jump.grad is not Grad.NONE:
            step.x = x.detach().requires_grad_(jump.grad is Grad.FULL)
        if step.x is not None and self.memory is Memory.KEEP:
            answer = step.answer = _live(self._call, step.x, jump)
        else:
            with torch.no_grad():
                answer = self._call(x, jump)
        self.on_call()
        return answer.detach()

    def _fresh(self, branch: int, number: int) -> Tensor:
        """The noise of a branch's `number`-th draw; the first branch's, and so a sample's, are those of a diffusers pipeline."""
        return self.noise.fresh(branch + FRESH * number) if branch else self.noise.stream(number)

    def _half(self, jump: Jump) -> bool:
        """Whether the network of this jump's call computes in float16."""
        weights = self.cast[jump.via].denoiser.network.parameters()
        return any(weight.dtype == torch.float16 for weight in weights)

    def _clean(self, jump: Jump) -> tuple[float, float]:
        """(p, q): the clean prediction of this jump's call is p * x + q * m."""
        return self.solver.process.coefficients(jump.start, 0)

    def _path(self, place: _Place, path: Path, branch: int) -> tuple[_Place, list[_Step]]:
        steps = []
        for jump in path:
            place, step = self._take(place, jump, branch)
            steps.append(step)
        return place, steps

    @torch.no_grad()
    def states(self, x: Tensor, path: Path) -> Iterator[Tensor]:
        """The states after each jump of a path, without gradient: sampling."""
        place = _Place(x)
        for jump in path:
            place, _ = self._take(place, jump, 0)
            yield place.x

    def end(self, x: Tensor, path: Path) -> Tensor:
        """Where a path leads, without gradient; `x` itself if there is nothing to walk."""
        return deque(chain((x,), self.states(x, path)), maxlen=1).pop()

    def walk(self, plan: Plan, x: Tensor) -> Iterator[Walk]:
        """Yield each branch finished; pull it before asking for the next and only one is held.

        `x` is the state at the plan's first level, (b, c, h, w).
        """
        missing = {jump.via for jump in plan.jumps} - set(self.cast)
        if missing:
            raise ValueError(f"the plan calls {', '.join(sorted(missing))}, which the cast does not have")
        with torch.no_grad():
            trunk, _ = self._path(_Place(x.detach()), plan.trunk, 0)
            first: _Place | None = None
            for number, branch in enumerate(plan.branches):
                start = _Place(first.x) if first is not None and branch[0].start == 0 else trunk
                end, steps = self._path(start, branch, number)
                first = end if first is None else first
                yield Walk(end.x, steps, self._call, self._clean, self._half)


Score = Callable[[Tensor, Sequence[str]], Tensor]


class Decoder(Protocol):
    """Image latents to images in [0, 1], (b, 3, h, w), differentiable."""

    def __call__(self, latents: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Result:
    """What one pass saw: rewards (b,) and images (b, 3, h, w) of the first branch, and each branch's mean reward."""

    rewards: Tensor
    images: Tensor
    branch_rewards: tuple[float, ...]


def read(decode: Decoder, score: Score, latents: Tensor, prompts: Sequence[str], part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, images and d(-mean reward)/d(latents), in micro-batches on a leaf copy of the latents."""
    rewards, images, gradients = [], [], []
    for i in range(0, len(latents), part):
        leaf = latents[i : i + part].detach().requires_grad_()
        with torch.enable_grad():
            seen = decode(leaf)
            values = score(seen, prompts[i : i + part])
            (pixels,) = torch.autograd.grad(-values.sum() / len(latents), seen)
        rewards.append(values.detach())
        images.append(seen.detach())
        gradients.append(half.gradient(seen, leaf, pixels))
    return torch.cat(rewards), torch.cat(images), torch.cat(gradients)


def backpropagate(
    chain: Chain,
    plan: Plan,
    x: Tensor,
    decode: Decoder,
    score: Score,
    prompts: Sequence[str],
    *,
    part: int = 8,
    penalty: Penalty | None = None,
    scale: float = 1.0,
) -> Result:
    """Add the gradient of -mean(reward), summed over branches, to `.grad` of the trainable leaves.

    `part` images are decoded and scored at a time; `scale` multiplies the loss (1 / accumulation steps).
    """
    rewards = images = gradient = None
    means = []
    for walk in chain.walk(plan, x):
        if gradient is None or not plan.reuse_reward_gradient:
            values, seen, gradient = read(decode, score, walk.image, prompts, part)
            means.append(float(values.mean()))
            if rewards is None:
                rewards, images = values, seen
        walk.pull(scale * gradient, penalty)
    assert rewards is not None
    assert images is not None
    return Result(rewards, images, tuple(means))
