"""The gradient of an objective through a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.asked import pairs
from chainrule.chain import Chain, Memory
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.objective import Call, Decode, Objective, Reading, read, read_again
from chainrule.plan import Plan
from chainrule.rewards import AnyReward
from chainrule.taken import Taken


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """What one pass saw: rewards (b,) and images (b, 3, h, w) of the first branch, and each branch's mean reward.

    `terms` are the means of the objective's terms: those on images over the first branch, those on calls over all that they
    looked at.
    """

    rewards: Tensor
    images: Tensor
    branch_rewards: tuple[float, ...]
    terms: Mapping[str, float]

    def __repr__(self) -> str:
        rewards = ", ".join(f"{reward:.4g}" for reward in self.rewards.tolist())
        return f"Result(rewards {rewards}; images of shape {tuple(self.images.shape)})"


def gradient(
    model: Model, plan: Plan, reward: Objective | AnyReward, prompts: str | Sequence[str],
    seeds: int | Sequence[int], *, guidance: AnyGuidance = None, memory: str = "recompute", micro_batch: int | None = None,
    scale: float = 1.0,
) -> Result:  # fmt: skip
    """Add the gradient of the objective's mean over these prompts to `.grad` of the model's trainable leaves.

    `reward` is a reward, of which -mean is minimized, or an `Objective` of several terms. Returns rewards (b,) and images
    (b, 3, h, w) in [0, 1]. `memory` is "recompute", "blocks" or "keep"; it never changes a number. `micro_batch` images are
    decoded and read at a time (default: 8, fewer where they are large). `scale` multiplies the whole loss. Raises UserError
    for a plan that jumps by a member the model does not have.
    """
    model, (prompts, seeds) = model.guided(guidance), pairs(prompts, seeds)
    chain = model.chain(prompts, seeds, Memory(memory))
    with model.blockwise(Memory(memory)):
        return backpropagate(
            chain, plan, model.noise(seeds), model.codec.decode, reward, prompts,
            micro_batch=micro_batch or model.micro_batch, scale=scale,
        )  # fmt: skip


def backpropagate(
    chain: Chain, plan: Plan, x: Tensor, decode: Decode, reward: Objective | AnyReward,
    prompts: Sequence[str], *, micro_batch: int = 8, scale: float = 1.0,
) -> Result:  # fmt: skip
    """Add the gradient of the mean loss, summed over branches, to `.grad` of the trainable leaves; of `x` too, if it is one.

    `x` is the state at `plan.start`, (b, c, h, w); `scale` multiplies the loss (1 / accumulation steps).
    """
    objective, share = Objective.of(reward), scale / len(x)
    at_call = AtCalls(objective, chain, share)
    first: Reading | None = None
    means = []
    for walk in chain.walk(plan, x):
        if first and plan.reuse_reward_gradient and first.pixels is not None:
            upstream = read_again(decode, first.pixels, walk.image, micro_batch)
        else:
            reading, upstream = read(decode, objective, walk.image, prompts, micro_batch)
            means.append(float(reading.rewards.mean()))
            first = first or reading
        if plan.deviation is not None:
            apart = torch.stack(walk.deviations).clamp(min=plan.deviation).sum(0)
            upstream = upstream / apart.view(-1, *[1] * (upstream.dim() - 1))
        start = walk.pull(share * upstream, at_call)
        if x.requires_grad and x.is_leaf:
            x.grad = start if x.grad is None else x.grad + start
    chain.pull_computed()
    assert first is not None
    terms = {name: float(values.mean()) for name, values in first.terms.items()} | at_call.means()
    return Result(first.rewards, first.images, tuple(means), terms)


class AtCalls:
    """Asks an objective's terms at every call with live weights, and keeps what they said. `share` multiplies their gradient."""

    def __init__(self, objective: Objective, chain: Chain, share: float) -> None:
        self.objective, self.chain, self.share = objective, chain, share
        self.seen: dict[str, list[Tensor]] = {}
        self.last = True  # branches are pulled from their ends, the first branch first

    def __call__(self, answer: Tensor, taken: Taken) -> Tensor | None:
        assert taken.x is not None
        noise = self.chain.solver.process.noise(taken.jump.start)
        call = Call(
            answer, taken.x.detach(), taken.jump, self.chain.condition, self.last, noise, move=taken.move, after=taken.after
        )  # fmt: skip
        gradient, values = self.objective.of_call(call)
        self.last = False
        for name, value in values.items():
            self.seen.setdefault(name, []).append(value)
        return None if gradient is None else self.share * gradient

    def means(self) -> dict[str, float]:
        """Each term's mean over the calls and images it looked at."""
        return {name: float(torch.cat(values).mean()) for name, values in self.seen.items()}
