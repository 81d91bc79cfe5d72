"""The methods whose reward is not differentiated: DDPO, GRPO and DPG. A rollout's steps are actions, its reward is their return."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from chainrule.methods.method import Critic, LikelihoodRatio, Needs, within
from chainrule.methods.surrogates import live
from chainrule.plan import Grad, Grid, Jump, Plan, walk


@dataclass(frozen=True, slots=True)
class DDPO:
    """Make the steps that led to better images likelier; the reward needs no gradient. `[=======-]`

    Denoising diffusion policy optimization, arXiv:2305.13301, as a baseline in DRaFT A.3 (arXiv:2309.17400): DDPO-SF with
    `reuse` 1, and DDPO-IS above, where a rollout serves so many updates and likelihood ratios are cut at 1 +- `clip`. An image's
    advantage is its reward's, over its prompt's last rewards (those of the batch while there are fewer than 16). `calls` of the
    chain's steps are drawn for each update; None: all. The sampler must draw noise (ddpm, sde, euler-a, lcm, tcd).
    Differs from the paper: the ratio is that of the likelihood per number of the latent, as the authors' code has it.
    """

    reuse: int = 1
    clip: float = 1e-4
    calls: int | None = None

    def __post_init__(self) -> None:
        _check(self)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        return _needs(self, grid, group=1)

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        return _plan(self, grid, rng)


@dataclass(frozen=True, slots=True)
class GRPO:
    """DDPO with each image judged against the others of its prompt. `[=======-]`

    Flow-GRPO, arXiv:2505.05470, for diffusion and flow models alike: `group` images of one prompt, their advantages the rewards
    less the group's mean, over its standard deviation. The other options are `DDPO`'s. Differs from the paper: the noisy step
    of a flow is drawn with the exact marginals (the solver sde), and not by Euler-Maruyama.
    """

    group: int = 4
    reuse: int = 1
    clip: float = 1e-4
    calls: int | None = None

    def __post_init__(self) -> None:
        within("group", self.group, 2)
        _check(self)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        return _needs(self, grid, group=self.group)

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        return _plan(self, grid, rng)


@dataclass(frozen=True, slots=True)
class DPG:
    """Follow a critic that foresees the reward after one random call. `-----[---|=~]`

    Deterministic policy gradient, arXiv:2309.17400 section C.2. The critic is the reward's own network with a LoRA of this
    `rank`, read on the one-step clean prediction after the call; it learns, at `rate` times the run's rate, the reward of the
    finished image. The call is live in its weights; the call that makes the clean prediction passes its input's gradient only.
    The paper gives no settings for the critic. Differs from it: the call is drawn uniformly; at the last one the critic reads
    the finished image.
    """

    rank: int = 8
    rate: float = 1.0

    def __post_init__(self) -> None:
        within("rank", self.rank, 1)
        within("rate", self.rate, 0)

    def needs(self, grid: Grid) -> Needs:
        """Say which members, adapters and estimator it needs on this grid."""
        return Needs(estimator=Critic(self.rank, self.rate))

    def plan(self, grid: Grid, rng: Random) -> Plan:
        """Draw the plan of one update on a grid of falling levels."""
        at = rng.randrange(len(grid) - 1)
        (action,) = walk(grid[at : at + 2], Grad.WEIGHTS)
        foresee = (Jump(action.stop, 0, grad=Grad.INPUT),) if action.stop else ()
        return Plan(walk(grid[: at + 1]), (walk(grid[at:]), (action, *foresee)))


def _check(method: DDPO | GRPO) -> None:
    within("reuse", method.reuse, 1)
    within("clip", method.clip, 0)
    within("calls", method.calls, 1)


def _needs(method: DDPO | GRPO, grid: Grid, group: int) -> Needs:
    within("the number of sampling steps", len(grid) - 1, 2)
    within("calls", method.calls, 1, len(grid) - 2)
    return Needs(estimator=LikelihoodRatio(group, method.reuse, method.clip))


def _plan(method: DDPO | GRPO, grid: Grid, rng: Random) -> Plan:
    """A whole chain with live weights at `calls` steps drawn anew, at all when None; never at the last, which adds no noise."""
    method.needs(grid)
    steps = len(grid) - 2
    chosen = range(steps) if method.calls is None else rng.sample(range(steps), method.calls)
    return Plan((), (live(walk(grid), dict.fromkeys(chosen, Grad.WEIGHTS)),))
