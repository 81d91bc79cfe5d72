"""Rewards made of a reward: one that is to reach a value, one that is enough from there on, one read where it is worse nearby."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chainrule.rewards.base import Reward, checked, written


@dataclass(frozen=True)
class OfReward(Reward):
    """What all of them share: the reward they are made of is loaded, and told what images were, for them."""

    reward: Reward

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        return replace(self, reward=self.reward.to(device))

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return replace(self, reward=self.reward.with_reference(reference))


@dataclass(frozen=True)
class Target(OfReward):
    """A reward that is to reach a value, -|reward - value| (SDO, arXiv:2505.07477, Eq. 25). Range up to 0."""

    value: float

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"{self.reward.name}->{written(self.value)}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -(checked(self.reward, images, prompts) - self.value).abs()


@dataclass(frozen=True)
class Hinge(OfReward):
    """A reward that is enough at a value, min(reward - value, 0), written `pickscore<=25`: LeapAlign's loss max(0, c - r).

    arXiv:2604.15311; an image at the value or above has no gradient. Range up to 0.
    """

    value: float

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"{self.reward.name}<={written(self.value)}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (checked(self.reward, images, prompts) - self.value).clamp(max=0)


@dataclass(frozen=True)
class Nearby(OfReward):
    """A reward read at the nearby image that it likes less: r(x + d), d = -radius grad r / |grad r|, a constant per image.

    The image half of RSA-FT (arXiv:2603.21175), against rewards that rise steeply where images only look good to them. Its name
    is the reward's own.
    """

    radius: float = 1e-2

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checked(self.reward, images + worse(self.reward, images, prompts, self.radius), prompts)


@dataclass(frozen=True)
class Steepness(OfReward):
    """How much a reward loses nearby, r(x) - r(x + d) with `Nearby`'s d: RSA-FT's sign of hacking (arXiv:2603.21175). Above 0."""

    radius: float = 1e-2

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"steepness of {self.reward.name}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checked(self.reward, images, prompts) - Nearby(self.reward, self.radius)(images, prompts)


def worse(reward: Reward, images: Tensor, prompts: Sequence[str], radius: float) -> Tensor:
    """The change of each image (b, 3, h, w), of this norm, along which the reward falls fastest; zero where it is flat."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(checked(reward, leaf, prompts).sum(), leaf)
    norms = gradient.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
    return -radius * gradient / norms
