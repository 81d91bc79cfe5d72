"""Methods that sample plainly and change the backward pass: which calls are live, with which weight, and what of inputs passes.

LeapAlign (arXiv:2604.15311) and FlowBP's (arXiv:2606.11075), on every solver with a closed form for long steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from chainrule.errors import UserError
from chainrule.methods.method import Needs, within
from chainrule.plan import Grad, Grid, Path, Plan, walk


def drawn_late(count: int, samples: int, late: float, rng: Random) -> list[int]:
    """So many calls of `count` without replacement, call i with a probability as (i + 1)^late, in order; 0 is the noisiest."""
    if not late:
        return sorted(rng.sample(range(count), samples))
    left, found = list(range(count)), []
    for _ in range(samples):
        found.append(rng.choices(left, [((i + 1) / (max(left) + 1)) ** late for i in left])[0])
        left.remove(found[-1])
    return sorted(found)


def drawn_parts(total: int, concentration: Sequence[float], least: Sequence[int], rng: Random) -> list[int]:
    """`total` in parts whose shares are Dirichlet's with this concentration, rounded, and each at least so many."""
    shares = [rng.gammavariate(alpha, 1.0) for alpha in concentration]
    found = [max(round(total * share / sum(shares)), low) for share, low in zip(shares, least, strict=True)]
    found[found.index(max(found))] += total - sum(found)
    return found


def spread(start: int, stop: int, count: int) -> list[int]:
    """At most so many of the numbers from `start` to `stop` - 1, `start` first, evenly apart."""
    length = stop - start
    return [start] if count == 1 else sorted({start + round(i * (length - 1) / (count - 1)) for i in range(count)})


def live(path: Path, grads: dict[int, Grad]) -> Path:
    """A path with these of its calls live."""
    return tuple(replace(jump, grad=grads[i]) if i in grads else jump for i, jump in enumerate(path))


def gained(path: Path, strength: float) -> Path:
    """The live calls' weights times 1 + strength (length of the chain / length of the live steps - 1), lengths in levels."""
    calls = [jump for jump in path if jump.grad is not Grad.NONE]
    reach = sum(jump.start - jump.stop for jump in calls)
    gain = 1 + strength * ((path[0].start - path[-1].stop) / reach - 1)
    return tuple(replace(jump, gain=gain) if jump.grad is not Grad.NONE else jump for jump in path)


def two_leaps(
    path: Path, first: int, second: int, share: float, deviation: float | None, order: int = 1, samples: int = 1, gain: float = 1.0
) -> Plan:  # fmt: skip
    """The plan of a leap from one call to another, and from there to the end, which lets a share of its input's gradient through.

    A leap reads the answers of `order` calls, evenly apart. The first `samples` are live, with `gain` for all but its own.
    """
    found = list(path)
    for start, stop, grad in ((first, second, Grad.WEIGHTS), (second, len(path), Grad.FULL if share else Grad.WEIGHTS)):
        nodes = spread(start, stop, order)
        found[start] = replace(path[start], grad=grad, lands=path[stop - 1].stop, reads=tuple(path[i].start for i in nodes[1:]))
        for i in nodes[1:samples]:
            found[i] = replace(path[i], grad=Grad.WEIGHTS, gain=gain)
    found[second] = replace(found[second], share=share)
    return Plan(tuple(found[:first]), (tuple(found[first:]),), deviation=deviation)


def check_leaps(share: float, deviation: float | None) -> None:
    """Raises UserError for a share outside 0 to 1, and for a least deviation that is not above 0."""
    within("share", share, 0, 1)
    if deviation is not None and not deviation > 0:
        raise UserError(f"deviation is {deviation}, but must be above 0, or null")


@dataclass(frozen=True, slots=True)
class FlowBPSparse:
    """Keep `samples` calls, drawn towards the image, and carry the rest linearly. `[------=-=--=]`

    arXiv:2606.11075: no input's gradient passes; call i is drawn with a probability as (i + 1)^`late`. With `late` 0 its gradient
    is SDO's. `rescale` between 0 and 1 makes up for the steps that are not live; lengths are in levels, which for flows are sigmas.
    """

    samples: int = 3
    late: float = 2.0
    rescale: float = 0.0

    def __post_init__(self) -> None:
        within("samples", self.samples, 1)
        within("late", self.late, 0)
        within("rescale", self.rescale, 0, 1)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("samples", self.samples, 1, len(grid) - 1)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        chosen = drawn_late(len(grid) - 1, self.samples, self.late, rng)
        return Plan((), (gained(live(walk(grid), dict.fromkeys(chosen, Grad.WEIGHTS)), self.rescale),))


@dataclass(frozen=True, slots=True)
class FlowBPBridge:
    """Keep `samples` calls around a drawn one, which lets a share of its input's gradient through. `[--=--+--=-=-]`

    arXiv:2606.11075, with 5 calls and a share of 0.1. The other calls are drawn uniformly, on both sides of it. `elsewhere` is the
    share at the other live calls, 0 in the paper: with `share` and `elsewhere` 1 and every call live it is DRaFT.
    """

    samples: int = 5
    share: float = 0.1
    elsewhere: float = 0.0

    def __post_init__(self) -> None:
        within("samples", self.samples, 1)
        within("share", self.share, 0, 1)
        within("elsewhere", self.elsewhere, 0, 1)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("samples", self.samples, 1, len(grid) - 1)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        path = walk(grid)
        bridge = rng.randrange(len(path))
        others = rng.sample([i for i in range(len(path)) if i != bridge], self.samples - 1)
        shares = {bridge: self.share, **dict.fromkeys(others, self.elsewhere)}
        path = live(path, {i: Grad.FULL if share else Grad.WEIGHTS for i, share in shares.items()})
        return Plan((), (tuple(replace(jump, share=shares.get(i, 1.0)) for i, jump in enumerate(path)),))


@dataclass(frozen=True, slots=True)
class LeapAlign:
    """Two calls, each taken to have leapt over the steps behind it. `---[=....+....]`

    arXiv:2604.15311: of two drawn calls k before j, k's answer has the weight of one step to j, j's that of one step to the image,
    and j lets `share` of its input's gradient through (0.3 for HPS, 0.1 for PickScore in the paper). An image's gradient is divided
    by the sum over both leaps of the mean distance to where the chain was, each at least `deviation`; None leaves it as it is.
    Differs from the paper where it is silent: the pair is drawn uniformly.
    """

    share: float = 0.1
    deviation: float | None = 0.1

    def __post_init__(self) -> None:
        check_leaps(self.share, self.deviation)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("the number of sampling steps", len(grid) - 1, 2)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        first, second = sorted(rng.sample(range(len(grid) - 1), 2))
        return two_leaps(walk(grid), first, second, self.share, self.deviation)


@dataclass(frozen=True, slots=True)
class FlowBPLagrange:
    """Two leaps, each of several calls' answers with the weights of a quadrature, two of which are live. `-----[=.=..+=]`

    arXiv:2606.11075: `order` calls of each leap, evenly apart, are taken for a polynomial of the answer, which is integrated. The
    first `samples` of them are live; `gain` multiplies the weights of all but a leap's own. The second leap's first call lets
    `share` of its input's gradient through. `concentration` is Dirichlet's of the steps before, in and after the first leap, and
    `deviation` as in `LeapAlign`, which is the order 1. The nodes, the gain and the share are its authors' published settings.
    """

    order: int = 3
    samples: int = 2
    gain: float = 0.25
    share: float = 0.1
    deviation: float | None = 0.1
    concentration: tuple[float, float, float] = (2.0, 6.0, 2.5)

    def __post_init__(self) -> None:
        within("order", self.order, 1)
        within("samples", self.samples, 1, self.order)
        within("gain", self.gain, 0)
        check_leaps(self.share, self.deviation)
        if len(self.concentration) != 3 or not all(alpha >= 0.01 for alpha in self.concentration):
            raise UserError(f"concentration is {self.concentration}, but must be three numbers of at least 0.01")

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("the number of sampling steps", len(grid) - 1, 2)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        before, between, _ = drawn_parts(len(grid) - 1, self.concentration, (0, 1, 1), rng)
        leaps = self.order, self.samples, self.gain
        return two_leaps(walk(grid), before, before + between, self.share, self.deviation, *leaps)
