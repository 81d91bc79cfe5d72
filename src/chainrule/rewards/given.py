"""Rewards as people give them: an object, a function, or a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from chainrule.rewards.base import Reward, RewardFunction, reward_of
from chainrule.rewards.registry import parse

AnyReward: TypeAlias = str | Reward | RewardFunction


def as_reward(given: AnyReward) -> Reward:
    """A reward from what was given: a `Reward`, a function of (images, prompts), or a name, "10*pickscore+symmetry".

    Raises UserError for an unknown name, and for anything else.
    """
    return parse(given) if isinstance(given, str) else reward_of(given)


def as_rewards(given: AnyReward | Sequence[AnyReward]) -> list[Reward]:
    """A list of rewards from what was given: a list, or one by itself."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [as_reward(each) for each in given]
    return [as_reward(given)]
