"""Rewards of a reward's value: one that is to reach a value, and one that is enough from there on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.rewards.base import Reward, checked, written


@dataclass(frozen=True)
class Target(Reward):
    """A reward that is to reach a value, -|reward - value| (SDO, arXiv:2505.07477, Eq. 25). Range up to 0."""

    reward: Reward
    value: float

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"{self.reward.name}->{written(self.value)}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(checked(self.reward, images, prompts) - self.value).abs()

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        return Target(self.reward.to(device), self.value)

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return Target(self.reward.with_reference(reference), self.value)


@dataclass(frozen=True)
class Hinge(Reward):
    """A reward that is enough at a value, min(reward - value, 0), written `pickscore<=25`: LeapAlign's loss max(0, c - r).

    arXiv:2604.15311; an image at the value or above has no gradient. Range up to 0.
    """

    reward: Reward
    value: float

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"{self.reward.name}<={written(self.value)}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (checked(self.reward, images, prompts) - self.value).clamp(max=0)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        return Hinge(self.reward.to(device), self.value)

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return Hinge(self.reward.with_reference(reference), self.value)
