"""ShortFT: shortcuts by a few-step student, adapters by level, progressive training (arXiv:2507.22604)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from chainrule.errors import UserError
from chainrule.methods.method import Needs, within
from chainrule.plan import Grad, Grid, Jump, Levels, Path, Plan, walk


@dataclass(frozen=True, slots=True)
class ShortFT:
    """Reach the early calls over a student's shortcuts, with adapters by level. `[############>#>#>#]`

    arXiv:2507.22604, section 3.3. The chain has `k` segments. The calls of the first and the last call of every other
    one carry adapters: segment i's carry adapters 1 to i (one adapter for all of them if `shared`, the ablation without
    timestep-aware LoRA). Stage i trains the adapters i to k: segments 1 to i are walked as they are, and in the later ones the
    student jumps over the calls without adapters, so that the whole way from the image back to the first trained call
    is differentiated, student included. Without `stage` all stages are trained in turn; `stage=1` is the ablation without
    progressive training. `depth` keeps only the last so many network calls live, as DRaFT-K does. A shared adapter is on in
    earlier calls too, and a later stage does not reach back to those.

    Levels are timesteps plus one. `levels` are those of the last call of every segment, by default the k-th parts of the
    grid: 762, 502, 262 and 2 for 50 steps of Stable Diffusion, the paper's timesteps 761, 501, 261, 1. `shortcuts` are the
    student's jumps, by default over all calls without an adapter: 742 to 502, 482 to 262, 242 to 2. A student of as many
    steps as `k` fits best: its own segments end where these jumps do.
    """

    k: int = 4
    stage: int | None = None
    shared: bool = False
    depth: int | None = None
    levels: tuple[float, ...] | None = None
    shortcuts: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            object.__setattr__(self, "k", len(self.levels))
        within("k", self.k, 1)
        within("depth", self.depth, 1)
        within("stage", self.stage, 1, self.k)

    def needs(self, grid: Grid) -> Needs:
        """A student where a later segment is jumped over, and every segment's adapter; see `Method`."""
        within("k", self.k, 1, len(grid) - 1)
        stage, last = self.stage or 1, [grid[end] for end in _equal(grid, self.k)] if self.levels is None else list(self.levels)
        without = {level for high, low in itertools.pairwise(last[stage - 1 :]) for level in grid if high > level > low}
        jumped = without if self.shortcuts is None else {start for start, _ in self.shortcuts if start < last[stage - 1]}
        below = [max(level for level in grid if level < end or level == 0) for end in last]
        on: Levels = ((below[0], None), *zip(below[1:], last[1:], strict=True))
        adapters = {"shared": on} if self.shared else {f"lora{i + 1}": on[i:] for i in range(self.k)}
        trained = tuple(adapters)[0 if self.shared else stage - 1 :]
        return Needs(("student",) if jumped else (), adapters, trained)

    def stages(self) -> tuple[ShortFT, ...]:
        """The stages this method trains in turn."""
        return (self,) if self.stage else tuple(replace(self, stage=i + 1) for i in range(self.k))

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        within("k", self.k, 1, len(grid) - 1)
        ends, spans, stage = self._ends(grid), self._spans(grid), self.stage or 1
        begins = [0, *(end + 1 for end in ends)]
        jumps: list[Jump] = []
        for i, (begin, end) in enumerate(zip(begins, ends, strict=False), 1):
            jumps += _over(grid[begin : end + 1], spans if i > stage else {})
            jumps += walk(grid[end : end + 2])
        first = 0 if stage == 1 else next(n for n, jump in enumerate(jumps) if jump.start == grid[ends[stage - 1]])
        first = max(first, len(jumps) - (self.depth or len(jumps)))
        live = tuple(replace(jump, grad=Grad.FULL) for jump in jumps[first:])
        return Plan(tuple(jumps[:first]), (live,))

    def _ends(self, grid: Grid) -> list[int]:
        """The last call of every segment, counted from 0."""
        if self.levels is None:
            return _equal(grid, self.k)
        ends = [_call(grid, level, "levels") for level in self.levels]
        if ends != sorted(set(ends)) or ends[-1] != len(grid) - 2:
            levels = ", ".join(f"{level:g}" for level in self.levels)
            raise UserError(f"levels are {levels}, but must fall and end with the last call's, {grid[-2]:g}")
        return ends

    def _spans(self, grid: Grid) -> dict[float, float]:
        """Where the student's jumps start, and where they lead. Raises UserError for one that passes a call with adapters."""
        ends = self._ends(grid)
        runs = [(grid[a + 1], grid[b]) for a, b in itertools.pairwise(ends) if b > a + 1]
        if self.shortcuts is None:
            return dict(runs)
        spans = [(grid[_call(grid, a, "shortcuts")], grid[_call(grid, b, "shortcuts")]) for a, b in self.shortcuts]
        for start, stop in spans:
            if not any(high >= start > stop >= low for high, low in runs):
                free = ", ".join(f"{high:g} to {low:g}" for high, low in runs)
                raise UserError(
                    f"the shortcut {start:g} to {stop:g} must fall, and stay within the calls without adapters ({free})"
                )
        for (above, end), (start, stop) in itertools.pairwise(sorted(spans, reverse=True)):
            if start > end:
                raise UserError(f"the shortcuts {above:g} to {end:g} and {start:g} to {stop:g} must not overlap")
        return dict(spans)


def _equal(grid: Grid, k: int) -> list[int]:
    """The last calls of `k` segments of equal length, counted from 0."""
    steps = len(grid) - 1
    return [i * steps // k - 1 for i in range(1, k + 1)]


def _call(grid: Grid, level: float, name: str) -> int:
    """The call that starts at this level. Raises UserError with the nearest one when there is none."""
    if level not in grid[:-1]:
        nearest = min(grid[:-1], key=lambda known: abs(known - level))
        known = f"no call of this {len(grid) - 1}-step grid starts there; the nearest is {nearest:g}"
        raise UserError(f"{name} has {level:g}, but {known}")
    return list(grid).index(level)


def _over(levels: Grid, jumps: Mapping[float, float]) -> Path:
    """The way down these levels: by the student's jump where one starts, by the base model's steps elsewhere."""
    found, at = [], levels[0]
    while at != levels[-1]:
        stop = jumps.get(at)
        found.append(Jump(at, stop, "student") if stop is not None else Jump(at, levels[list(levels).index(at) + 1]))
        at = found[-1].stop
    return tuple(found)
