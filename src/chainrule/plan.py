"""What a method does to the sampling chain, as data.

A chain is walked over *levels*: numbers, 0 is the finished image, higher is noisier. Stable Diffusion's timestep t is
level t + 1, a flow's noise scale sigma is level 1000 sigma. A `Plan` is a trunk walked once without gradient and branches
that each end in an image the reward reads.
There is no torch here: a plan can be drawn, counted and compared before a single weight is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

Grid = Sequence[float]  # strictly falling levels, ending at 0
Levels = tuple[tuple[float, float | None], ...]  # spans of levels, (low, high]: low < level <= high; None: no upper end
OWN = ("base", "unguided")  # the names under which the model itself answers; every other name is another member of the cast


class Grad(Enum):
    """What the reward may reach through one network call."""

    NONE = "-"  # nothing: the network's answer is a constant; the solver's linear carry of x remains
    WEIGHTS = "="  # the trainable leaves inside the call, but not its input latent
    INPUT = "~"  # its input latent, but not the trainable leaves inside the call
    FULL = "#"  # both

    @property
    def input(self) -> bool:
        """Whether the reward reaches the call's input latent."""
        return self in (Grad.INPUT, Grad.FULL)

    @property
    def weights(self) -> bool:
        """Whether the reward reaches the trainable leaves inside the call."""
        return self in (Grad.WEIGHTS, Grad.FULL)


@dataclass(frozen=True, slots=True)
class Jump:
    """One move between two levels. Down is one network call; up adds fresh noise and calls nothing.

    `via` names who answers: "base", "unguided" (the base model without guidance), or another member of the cast.
    A jump to 0 is the one-step clean prediction, unless it is the sampler's own last step (`finish`): that one lands
    where the pipeline's sampler lands, which for Stable Diffusion is `alphas_cumprod[0]` and not quite 1.

    The other fields change the backward pass alone. `share` of the input's gradient is let through, `gain` multiplies the weight of
    the answer, and where `lands` is given, the call is taken to have leapt to that level: its answer and its state have the
    weights of that one long step, and the calls on the way are passed over (arXiv:2604.15311, arXiv:2606.11075). The long step
    may read the answers of calls on the way as well, those at the levels `reads`; only they may be live among these calls.
    """

    start: float
    stop: float
    via: str = "base"
    grad: Grad = Grad.NONE
    finish: bool = False
    share: float = 1.0
    gain: float = 1.0
    lands: float | None = None
    reads: tuple[float, ...] = ()

    @property
    def up(self) -> bool:
        """Whether it adds noise instead of calling a network."""
        return self.stop > self.start


Path = tuple[Jump, ...]


def passed_over(path: Path) -> frozenset[int]:
    """The places in a path of the jumps that an earlier one leaps over in the backward pass."""
    found: set[int] = set()
    for i, jump in enumerate(path):
        if jump.lands is not None:
            found |= {j for j in range(i + 1, len(path)) if path[j].stop >= jump.lands and path[j].start < jump.start}
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Plan:
    """A trunk, then branches; each branch is backpropagated on its own, so memory is that of one branch.

    A branch starts where the trunk ended, or at level 0: then it starts from the image the first branch finished,
    taken as a constant. With `reuse_reward_gradient`, the reward is differentiated for the first branch only, and the
    others' images are pulled back with that same gradient of the pixels, through their own decoding.

    `print(plan)` draws it: `-`, `=`, `~` and `#` are the model's own calls by what the reward may reach through them, `>` is a call
    of another member of the cast, `^` is noised again, and `|` stands between branches. `+` is a call that lets through a share
    of its input's gradient only, and `.` one that is passed over in the backward pass. With `deviation`, an image's gradient is
    divided by the sum over leaps of the mean distance between where the leap lands and where the chain was, each at least that.
    Raises ValueError for a plan that cannot be walked.
    """

    trunk: Path
    branches: tuple[Path, ...]
    reuse_reward_gradient: bool = False
    deviation: float | None = None

    def __post_init__(self) -> None:
        if not self.branches:
            raise ValueError("a plan needs a branch: the reward has nothing to read")
        if any(jump.grad is not Grad.NONE for jump in self.trunk):
            raise ValueError("the trunk is walked without gradient; put live calls into a branch")
        for number, branch in enumerate(self.branches):
            restart = number > 0 and bool(branch) and branch[0].start == 0
            path = branch if restart else self.trunk + branch
            if not branch or path[-1].stop != 0:
                raise ValueError("every branch must end at level 0")
            for a, b in itertools.pairwise(path):
                if a.stop != b.start:
                    raise ValueError(f"gap between {a} and {b}")
        if any(jump.start == jump.stop for jump in self.jumps):
            raise ValueError("a jump must change the level")
        if any(not 0 <= jump.share <= 1 for jump in self.jumps):
            raise ValueError("the share of an input's gradient is between 0 and 1")
        for branch in self.branches:
            over = [branch[i] for i in passed_over(branch)]
            read = {level for jump in branch for level in jump.reads}
            if any(jump.up or jump.grad.input or (jump.grad.weights and jump.start not in read) for jump in over):
                raise ValueError("a call that is leapt over must be a constant, unless the leap reads it")
            if not read <= {jump.start for jump in over}:
                raise ValueError("a leap must read answers of calls that it passes over")
            stops = {jump.stop for jump in branch}
            if any(jump.lands is not None and (jump.lands not in stops or jump.lands >= jump.start) for jump in branch):
                raise ValueError("a leap must land on a later level of its branch")

    @property
    def jumps(self) -> Path:
        """All jumps: the trunk's, then every branch's."""
        return self.trunk + sum(self.branches, ())

    def calls(self, *grads: Grad) -> int:
        """Network calls, or only those whose gradient is one of `grads`."""
        return sum(not jump.up and (not grads or jump.grad in grads) for jump in self.jumps)

    def __str__(self) -> str:
        def draw(path: Path) -> str:
            over = passed_over(path)
            return "".join("." if i in over and jump.grad is Grad.NONE else _sign(jump) for i, jump in enumerate(path))

        return f"{draw(self.trunk)}[{'|'.join(map(draw, self.branches))}]"


def _sign(jump: Jump) -> str:
    if jump.up:
        return "^"
    if jump.via not in OWN:
        return ">"
    return "+" if jump.grad is Grad.FULL and jump.share < 1 else jump.grad.value


def walk(levels: Grid, grad: Grad = Grad.NONE, via: str = "base") -> Path:
    """The sampler's steps over neighboring levels; a step to 0 is its last."""
    return tuple(Jump(a, b, via, grad, finish=b == 0) for a, b in itertools.pairwise(levels))


def segment_ends(top: int, steps: int) -> tuple[int, ...]:
    """Where the segments of a few-step student end, falling, 0 last: the `steps`-th parts of the levels up to `top`."""
    return tuple(round(top * i / steps) for i in range(steps - 1, -1, -1))


def student_path(start: float, top: int, steps: int) -> Path:
    """A student's jumps from a level to the image: to the end of every segment on the way."""
    return walk((start, *(level for level in segment_ends(top, steps) if level < start)), via="student")


def leading(steps: int) -> Grid:
    """Stable Diffusion's leading steps, as levels: 982, 962, ..., 2, 0 for 50. They stand in where no model is loaded yet."""
    return (*(1000 // steps * i + 2 for i in reversed(range(steps))), 0) if steps < 1000 else tuple(range(steps, -1, -1))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one update costs, in forward passes of the network for one batch.

    A live call costs its own forward and backward pass (a backward pass to the input and to the few trained weights
    costs about one forward), and one more forward pass when it is recomputed.
    """

    calls: int
    backward: int
    relative_time: float
    graphs: int

    @classmethod
    def of(cls, plan: Plan, *, recompute: bool) -> Forecast:
        """The cost of a plan, with or without recomputing its live calls."""
        live = [sum(j.grad is not Grad.NONE for j in branch) for branch in plan.branches]
        passes = plan.calls() + sum(live) * (2 if recompute else 1)
        base = plan.calls()
        return cls(base, sum(live), passes / base, 1 if recompute else max(live))
