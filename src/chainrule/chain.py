"""The one walker: runs a plan forwards, and pulls a gradient back through it.

Every step is x' = a * x + b * m + noise (solve.py), so the backward pass is written out instead of left to a tape: with v the
gradient at x', the call gets b * v, and v becomes a * v, plus the call's input gradient where the plan says FULL. A
multistep solver also carries the last calls' clean predictions, p * x + q * m, with a gradient w of each.
Nothing else is stored than the states that live calls started from. Under RECOMPUTE the forward pass is plain sampling
and the backward pass replays one live call at a time, so memory is one call's graph whatever N, K or M; KEEP holds the
graphs instead. Both run the same lines and give the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

import torch
from torch import Tensor

from chainrule import half
from chainrule.cast import Cast, in_float16
from chainrule.denoise import Condition
from chainrule.errors import UserError
from chainrule.noise import Noise
from chainrule.plan import Grad, Jump, Path, Plan
from chainrule.solve import Solver, moves
from chainrule.taken import Taken, leaps, taken


class Memory(Enum):
    """What is held between the forward and the backward pass. It never changes a number."""

    KEEP = "keep"  # every live call's activations
    RECOMPUTE = "recompute"  # the live calls' inputs; their activations are made again, one call at a time
    BLOCKS = "blocks"  # the same, and inside a call the inputs of its blocks; see `Model.blockwise`


FRESH = 1000  # the largest number of branches whose noise differs; `Noise.fresh` gets branch + FRESH * draw


# The gradient that terms on a call add at its answer: (answer, what was taken) -> the answer's shape, or None for nothing.
AtCall = Callable[[Tensor, Taken], Tensor | None]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a walk stands: its state, the last calls' clean predictions, most recent first, and the noise drawn so far."""

    x: Tensor
    cleans: tuple[Tensor, ...] = ()
    ups: int = 0


@dataclass(slots=True)
class Walk:
    """A finished branch: its image latent, and the way back."""

    image: Tensor
    deviations: list[Tensor]  # of each leap, the mean distance between where it lands and where the chain was, (b,)
    _steps: list[Taken]
    _call: Callable[[Tensor, Jump], Tensor]
    _clean: Callable[[Jump], tuple[float, float]]
    _half: Callable[[Jump], bool]

    def pull(self, gradient: Tensor, at_call: AtCall | None = None) -> Tensor:
        """Add d(loss)/d(leaf) to `.grad` of every trainable leaf, given d(loss)/d(image).

        `at_call` is asked at every call with live weights for what else the loss says of its answer, the call's state held
        constant.
        Returns the gradient at the branch's first state. Frees what it used: call it once.
        """
        v, ws = gradient.detach(), list[Tensor]()  # at the state, and at the last clean predictions that later steps read
        while self._steps:
            step = self._steps.pop()
            if step.back is None:
                continue
            w = ws.pop(0) if ws else None  # at this call's clean prediction
            p, q = self._clean(step.jump) if w is not None else (0.0, 0.0)
            if step.x is not None:
                answer = step.answer if step.answer is not None else _live(self._call, step.x, step.jump)
                upstream = step.jump.gain * (step.back.b * v if w is None else step.back.b * v + q * w)
                added = at_call(answer.detach(), step) if at_call and step.jump.grad.weights else None
                if added is not None and step.x.requires_grad:  # what it says of the answer does not reach the state
                    self._back(answer, added, step, again=True)
                elif added is not None:
                    upstream = upstream + added
                step.x.grad = None
                self._back(answer, upstream, step)
            read = [c * v for c in step.back.history]
            ws = [*map(torch.add, ws, read), *ws[len(read) :], *read[len(ws) :]]
            v = step.back.a * v if w is None else step.back.a * v + p * w
            if step.x is not None and step.x.grad is not None:
                v = v + step.jump.share * step.x.grad
        return v

    def _back(self, answer: Tensor, upstream: Tensor, step: Taken, again: bool = False) -> None:
        """Add the gradient at a call's answer to the leaves that the plan lets it reach; with `again` the graph is kept."""
        assert step.x is not None
        if not answer.requires_grad:
            return
        if step.jump.grad is Grad.INPUT:
            step.x.grad = half.gradient(answer, step.x, upstream)
        elif self._half(step.jump):
            half.backward(answer, upstream, again)
        else:
            answer.backward(upstream.to(answer.dtype), retain_graph=again)


def _live(call: Callable[[Tensor, Jump], Tensor], x: Tensor, jump: Jump) -> Tensor:
    with torch.enable_grad():
        return call(x, jump)


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor of the chain that other tensors were computed into, cut off from them by a leaf with the same value.

    The calls of a chain are pulled one by one, and each would go back through the computation they share. They stop at the
    leaf instead, where their gradients add up; `pull` sends the sum on, once.
    """

    value: Tensor
    leaf: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Computed:
        """A leaf with the value of this tensor."""
        return cls(value, value.detach().requires_grad_(value.requires_grad))

    def pull(self) -> None:
        """Send the leaf's gradient on to what the tensor was computed from."""
        if self.leaf.grad is not None:
            self.value.backward(self.leaf.grad)
            self.leaf.grad = None


@dataclass(frozen=True, slots=True)
class Chain:
    """A plan's surroundings: who answers, how steps are solved, for which prompts and noise.

    `computed` are tensors of the chain that learned parts compute; `pull_computed` follows the last branch's `pull`.
    """

    cast: Cast
    solver: Solver
    condition: Condition
    noise: Noise
    memory: Memory = Memory.RECOMPUTE
    on_call: Callable[[], None] = field(default=lambda: None)
    computed: tuple[Computed, ...] = ()

    def pull_computed(self) -> None:
        """Send what has arrived at the leaves of computed tensors on to what they were computed from. Call it once."""
        for tensor in self.computed:
            tensor.pull()

    def _call(self, x: Tensor, jump: Jump) -> Tensor:
        return self.cast[jump.via](x, jump.start, self.condition)

    def _take(self, place: _Place, step: Taken, branch: int) -> tuple[_Place, Tensor | None]:
        """The next place, and what the call counts of where a leap would have landed."""
        jump, move, cleans, landing = step.jump, step.move, tuple[Tensor, ...](), None
        after = move.a * place.x
        if not jump.up:
            answer = self._answer(place.x, jump, step)
            if step.leap is not None:
                landing = step.leap[1].a * place.x + step.leap[1].b * answer
            after = after + move.b * answer
            p, q = self._clean(jump)
            cleans = (p * place.x + q * answer, *place.cleans)[: self.solver.reads] if self.solver.reads else ()
        for c, clean in zip(move.history, place.cleans[: len(move.history)], strict=True):
            after = after + c * clean
        if move.d:
            after = after + move.d * self._fresh(branch, place.ups).to(after)
        return _Place(after, cleans, place.ups + bool(move.d)), landing

    def _answer(self, x: Tensor, jump: Jump, step: Taken) -> Tensor:
        """The call's answer as a constant; a live call's state, and under KEEP its graph, stay in `step`."""
        if jump.grad is not Grad.NONE:
            step.x = x.detach().requires_grad_(jump.grad.input)
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

    def _clean(self, jump: Jump) -> tuple[float, float]:
        """(p, q): the clean prediction of this jump's call is p * x + q * m."""
        return self.solver.process.coefficients(jump.start, 0)

    def _path(
        self, place: _Place, path: Path, branch: int, before: Path = (), after: Path = ()
    ) -> tuple[_Place, list[Taken], list[Tensor]]:
        """Walk a path; a solver also looks at the jumps `before` it, which led to `place`, and at those `after` it.

        Also how far each leap lands from where the chain was, (b,).
        """
        found = list(moves(self.solver, before + path + after))[len(before) :][: len(path)]
        steps, landings, deviations = taken(self.solver, path, found), dict[float, Tensor](), []
        for step in steps:
            place, landing = self._take(place, step, branch)
            if landing is not None and step.leap is not None:
                level, _ = step.leap
                landings[level] = landings[level] + landing if level in landings else landing
            if step.jump.stop in landings:
                deviations.append((landings.pop(step.jump.stop) - place.x).flatten(1).abs().mean(1))
        return place, steps, deviations

    @torch.no_grad()
    def states(self, x: Tensor, path: Path) -> Iterator[Tensor]:
        """The states after each jump of a path, without gradient: sampling."""
        place = _Place(x)
        for jump, move in zip(path, moves(self.solver, path), strict=True):
            place, _ = self._take(place, Taken(jump, move, move), 0)
            yield place.x

    def end(self, x: Tensor, path: Path) -> Tensor:
        """Where a path leads, without gradient; `x` itself if there is nothing to walk."""
        return deque(chain((x,), self.states(x, path)), maxlen=1).pop()

    def along(self, path: Path, states: Sequence[Tensor]) -> Walk:
        """The way back along a path that was walked before, through these `states`: where it began, and where each jump led to.

        What was kept of the walk decides, and not what the network answers now. `pull` asks its terms at every live call.
        """
        steps = taken(self.solver, path, list(moves(self.solver, path)))
        for step, after in zip(steps, states[1:], strict=True):
            step.after = after
        for step, state in zip(steps, states, strict=False):
            if step.jump.grad is not Grad.NONE:
                step.x = state.detach().requires_grad_(step.jump.grad.input)
        return self._walked(states[-1], steps, [])

    def _walked(self, image: Tensor, steps: list[Taken], deviations: list[Tensor]) -> Walk:
        return Walk(image, deviations, steps, self._call, self._clean, lambda jump: in_float16(self.cast[jump.via]))

    def walk(self, plan: Plan, x: Tensor) -> Iterator[Walk]:
        """Yield each branch finished; pull it before asking for the next and only one is held.

        `x` is the state at the plan's first level, (b, c, h, w).
        """
        check_members((jump.via for jump in plan.jumps if not jump.up), self.cast)
        with torch.no_grad():
            trunk, _, _ = self._path(_Place(x.detach()), plan.trunk, 0, after=plan.branches[0])
            first: _Place | None = None
            for number, branch in enumerate(plan.branches):
                if first is not None and branch[0].start == 0:
                    end, steps, deviations = self._path(_Place(first.x), branch, number)
                else:
                    end, steps, deviations = self._path(trunk, branch, number, before=plan.trunk)
                first = end if first is None else first
                yield self._walked(end.x, steps, deviations)


def check_leaps(solver: Solver, plan: Plan) -> None:
    """Raises UserError for a plan that leaps where the solver has no closed form for it."""
    for branch in plan.branches:
        leaps(solver, branch)


def check_members(members: Iterable[str], cast: Cast) -> None:
    """Raises UserError for members to jump by that the cast does not have; it names the members there are."""
    missing = sorted(set(members) - set(cast))
    if missing:
        hint = "; give the model one by model.with_student(...)" if "student" in missing else ""
        raise UserError(f"the plan jumps by {', '.join(missing)}, and the members are {', '.join(cast)}{hint}")
