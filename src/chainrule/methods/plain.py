"""The methods with one adapter for the whole chain: DRaFT, DRaFT-LV, ReFL, AlignProp, DRTune, SDO."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from chainrule.methods.method import Needs, within
from chainrule.methods.surrogates import drawn_late, live
from chainrule.plan import Grad, Grid, Jump, Plan, walk


@dataclass(frozen=True, slots=True)
class DRaFT:
    """Backpropagate through the last `k` steps, through all of them when None. `--------[##]`

    DRaFT-K, arXiv:2309.17400 section 4, Algorithm 1: x is a constant on entering the last k calls.
    """

    k: int | None = None

    def __post_init__(self) -> None:
        within("k", self.k, 1)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("k", self.k, 1, len(grid) - 1)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        steps = len(grid) - 1
        cut = steps - (self.k or steps)
        return Plan(walk(grid[: cut + 1]), (walk(grid[cut:], Grad.FULL),))


@dataclass(frozen=True, slots=True)
class DRaFTLV:
    """DRaFT-1, plus `n` copies: noise the finished image again and denoise it once. `---------[#|^#|^#]`

    arXiv:2309.17400 section 4, Algorithm 1: gradients of the last step and of the copies are summed, which lowers
    the variance. With `reuse_reward_gradient` the reward's pixel gradient is taken once and reused for the copies
    (section C.1, single-reward LV; unstable, kept as an ablation).
    """

    n: int = 2
    reuse_reward_gradient: bool = False

    def __post_init__(self) -> None:
        within("n", self.n, 1)

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        last = grid[-2]
        copy = (Jump(0, last), Jump(last, 0, grad=Grad.FULL))
        branches = (walk(grid[-2:], Grad.FULL), *(copy,) * self.n)
        return Plan(walk(grid[:-1]), branches, self.reuse_reward_gradient)


@dataclass(frozen=True, slots=True)
class ReFL:
    """Stop at a random one of the last `m` calls and read its one-step clean prediction. `------[#]`

    arXiv:2304.05977; as Algorithm 1 of arXiv:2309.17400 (m = 20 of 50 steps). `guided=False` leaves
    classifier-free guidance out of the trained call.
    """

    m: int = 20
    guided: bool = True

    def __post_init__(self) -> None:
        within("m", self.m, 1)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("m", self.m, 1, len(grid) - 1)
        return Needs(members=() if self.guided else ("unguided",))

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        via = next(iter(self.needs(grid).members), "base")
        start = len(grid) - 1 - rng.randint(1, self.m)
        return Plan(walk(grid[: start + 1]), ((Jump(grid[start], 0, via, Grad.FULL),),))


@dataclass(frozen=True, slots=True)
class AlignProp:
    """DRaFT with a truncation drawn anew for every update, uniform over the chain. `------[####]`

    arXiv:2310.03739, as compared in SDO section 5.2 (arXiv:2505.07477). `last_only` is that section's
    AlignProp-1, gradients at the last call only: the same plan as `DRaFT(1)`.
    """

    last_only: bool = False

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        return DRaFT(1 if self.last_only else rng.randint(1, len(grid) - 1)).plan(grid, rng)


@dataclass(frozen=True, slots=True)
class DRTune:
    """Train `k` equally spaced calls with their inputs cut, and stop up to `m` calls early. `[-=--=--=-]`

    arXiv:2405.00760, as described in ShortFT section 2 (arXiv:2507.22604). The calls are s + i * (N // k) with a
    random offset s; the chain ends with the clean prediction of a late call drawn from the last m. The defaults
    of k and m are not from a published table, and a call that falls behind the early stop is not trained.
    """

    k: int = 5
    m: int = 5

    def __post_init__(self) -> None:
        within("k", self.k, 1)
        within("m", self.m, 1)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("k", self.k, 1, len(grid) - 1)
        within("m", self.m, 1, len(grid) - 1)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        steps = len(grid) - 1
        stride = steps // self.k
        offset = rng.randrange(stride)
        live = {offset + i * stride for i in range(self.k)}
        last = steps - rng.randint(1, self.m)
        if not any(i <= last for i in live):  # a chain without a trained call would teach nothing
            last = min(live)
        grads = [Grad.WEIGHTS if i in live else Grad.NONE for i in range(last + 1)]
        ways = list(zip(grid, grid[1 : last + 1], grads, strict=False))
        jumps = [Jump(a, b, grad=g) for a, b, g in ways] + [Jump(grid[last], 0, grad=grads[last])]
        return Plan((), (tuple(jumps),))


@dataclass(frozen=True, slots=True)
class SDO:
    """Keep the graph of one random call and carry the rest linearly. `[------#---]`

    Shortcut diffusion optimization on weights, arXiv:2505.07477 section 4.2.3, Eq. 17-20: the gradient reaches the
    call through the solver's linear path only. `samples` > 1 keeps that many calls of the same rollout, an M-sample
    estimate of Eq. 17's expectation; all but the first of them see a constant input, so that no call's Jacobian is in
    another's path. `late` above 0 draws call i with a probability as (i + 1)^late, towards the image (arXiv:2606.11075 has 2).
    Differs from the paper: the gradients of the M calls are summed, not averaged.
    """

    samples: int = 1
    late: float = 0.0

    def __post_init__(self) -> None:
        within("samples", self.samples, 1)
        within("late", self.late, 0)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        within("samples", self.samples, 1, len(grid) - 1)
        return Needs()

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        self.needs(grid)
        first, *rest = drawn_late(len(grid) - 1, self.samples, self.late, rng)
        return Plan((), (live(walk(grid), {first: Grad.FULL} | dict.fromkeys(rest, Grad.WEIGHTS)),))
