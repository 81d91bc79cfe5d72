"""The gradient of a reward through a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from chainrule.chain import Memory, Result, Score, backpropagate
from chainrule.errors import UserError
from chainrule.models import Model
from chainrule.objective import divergence
from chainrule.plan import Plan
from chainrule.rewards import checked, reward_of


def gradient(
    model: Model, plan: Plan, reward: Score, prompts: Sequence[str], seeds: Sequence[int], *,
    guidance: float | None = None, memory: str = "recompute", micro_batch: int | None = None, kl: float = 0.0, scale: float = 1.0,
) -> Result:  # fmt: skip
    """Add the gradient of -mean(reward) over these prompts to `.grad` of the model's trainable leaves.

    Returns rewards (b,) and images (b, 3, h, w) in [0, 1]. `memory` is "recompute", "blocks" or "keep"; it never changes a number.
    `micro_batch` images are decoded and scored at a time (default: 8, fewer where they are large).
    `kl` weighs the distance to the base model at the last call; `scale` multiplies the whole loss.
    """
    check_cast(model, {jump.via for jump in plan.jumps})
    guidance = model.defaults.guidance if guidance is None else guidance
    chain = model.chain(prompts, seeds, guidance, Memory(memory))
    penalty = divergence(model.bare(guidance), chain.condition, kl * scale) if kl else None
    score = partial(checked, reward_of(reward))
    with model.blockwise(Memory(memory)):
        return backpropagate(
            chain, plan, model.noise(seeds), model.decode, score, prompts, part=micro_batch or model.micro_batch, penalty=penalty,
            scale=scale,
        )  # fmt: skip


def check_cast(model: Model, members: Iterable[str]) -> None:
    """UserError for members that jump by a student when the model has none."""
    if not model.student and "student" in members:
        raise UserError("this plan jumps by a student, and the model has none; use model.with_student(...)")
