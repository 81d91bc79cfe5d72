"""What a reward is: images (b, 3, h, w) in [0, 1] and b prompts -> (b,), higher is better, differentiable.

Rewards add and scale, as in DRaFT's multi-reward model, 10 * PickScore() + 2 * HPSv2() + 0.05 * Aesthetic()
(arXiv:2309.17400, section 5.2). A plain function of (images, prompts) is a reward too, see `reward_of`.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor, nn

from chainrule.errors import UserError

RewardFunction: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)


class Reward(ABC):
    """A differentiable score per image, higher is better. Networks inside are frozen: gradients reach the pixels and stop there."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What `rewards.parse` reads back, and the label in tables and curves."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] and their b prompts -> (b,), on the device the images are on."""

    def to(self, device: torch.device | str) -> Reward:
        """Load what the reward needs onto `device` now, rather than on the first call there. Returns the reward."""
        return self

    def weighted(self) -> tuple[tuple[float, Reward], ...]:
        """The (weight, reward) pairs this reward is the sum of."""
        return ((1.0, self),)

    def with_reference(self, reference: Tensor) -> Reward:
        """This reward for images that were `reference` (b, 3, h, w) before they were steered. `steer` calls it.

        The base class returns the reward unchanged: most rewards read only the new images.
        """
        return self

    def __add__(self, other: Reward | RewardFunction) -> Reward:
        return _sum(self.weighted() + reward_of(other).weighted())

    def __radd__(self, other: Reward | RewardFunction | int) -> Reward:
        if isinstance(other, int) and other == 0:  # where `sum([a, b])` starts
            return self
        return reward_of(other) + self  # type: ignore[arg-type]  # other integers are refused there

    def __sub__(self, other: Reward | RewardFunction) -> Reward:
        return self + -reward_of(other)

    def __rsub__(self, other: Reward | RewardFunction) -> Reward:
        return reward_of(other) + -self

    def __mul__(self, weight: float) -> Reward:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or not weight:
            raise UserError(f"reward {self.name!r} can be multiplied by a number other than 0, not by {weight!r}")
        return _sum(tuple((float(weight) * w, term) for w, term in self.weighted()))

    def __rmul__(self, weight: float) -> Reward:
        return self * weight

    def __truediv__(self, weight: float) -> Reward:
        return self * (1 / weight)

    def __neg__(self) -> Reward:
        return self * -1


def written(value: float) -> str:
    """The shortest text that is read as exactly this number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass(frozen=True)
class Sum(Reward):
    """A weighted sum of rewards, sum_i weight_i * reward_i. Adding rewards makes one; equal rewards are merged into one term."""

    terms: tuple[tuple[float, Reward], ...]

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        signed = [("-" if w < 0 else "+", "" if abs(w) == 1 else f"{written(abs(w))}*", r.name) for w, r in self.terms]
        text = " ".join(f"{sign} {weight}{name}" for sign, weight, name in signed)
        return text.removeprefix("+ ") if text.startswith("+") else text.replace("- ", "-", 1)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.stack([weight * checked(reward, images, prompts) for weight, reward in self.terms]).sum(0)

    def weighted(self) -> tuple[tuple[float, Reward], ...]:
        """The (weight, reward) pairs of the sum."""
        return self.terms

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        return Sum(tuple((weight, reward.to(device)) for weight, reward in self.terms))

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return Sum(tuple((weight, reward.with_reference(reference)) for weight, reward in self.terms))


def _sum(terms: tuple[tuple[float, Reward], ...]) -> Reward:
    merged: dict[Reward, float] = {}
    for weight, reward in terms:
        merged[reward] = merged.get(reward, 0.0) + weight
    if gone := next((reward for reward, weight in merged.items() if not weight), None):
        raise UserError(f"the weights of the reward {gone.name!r} add up to 0, so that nothing is left of it; leave it out")
    names = [reward.name for reward in merged]
    if twice := {name for name in names if names.count(name) > 1}:
        name = twice.pop()
        raise UserError(f"two different rewards of one sum are named {name!r}; rename one with reward_of(fn, name=...)")
    return Sum(tuple((weight, reward) for reward, weight in merged.items()))


@dataclass(frozen=True)
class FunctionReward(Reward):
    """A reward that is a function of (images, prompts), named `label`. `reward_of` makes one."""

    function: RewardFunction
    label: str

    @property
    def name(self) -> str:
        """The label. `rewards.parse` reads it back only for a function from a file, `path/to/file.py:function`."""
        return self.label

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self


def reward_of(fn: Reward | RewardFunction, name: str | None = None) -> Reward:
    """Make a reward of a function of (images, prompts). A reward is returned unchanged.

    A `torch.nn.Module` is put in evaluation mode and its parameters stop requiring gradients. Raises UserError for anything that
    cannot be called with images and prompts.
    """
    if isinstance(fn, Reward):
        return fn
    if not callable(fn):
        raise UserError(f"a reward is a function of (images, prompts) or a Reward, not {fn!r}")
    try:
        inspect.signature(fn).bind(None, None)
    except TypeError as error:
        raise UserError(f"reward function {_called(fn)!r} must take (images, prompts): {error}") from error
    except ValueError:  # a builtin that does not tell its signature
        pass
    if isinstance(fn, nn.Module):
        fn.requires_grad_(False).eval()
    return FunctionReward(fn, name or _called(fn))


def _called(fn: object) -> str:
    return str(getattr(fn, "__name__", type(fn).__name__))


def checked(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`reward(images, prompts)`, refused unless it is a float tensor (b,). It never waits for the device.

    Raises UserError naming the reward and what is wrong: its result, the images it was given, or the number of prompts.
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.numel():
        raise UserError(f"reward {reward.name!r} reads images of shape (b, 3, h, w), got {tuple(images.shape)}")
    count = images.shape[0]
    if len(prompts) != count:
        got = f"{count} images but {len(prompts)} prompts"
        raise UserError(f"reward {reward.name!r} got {got}; give one prompt per image")
    values = reward(images, prompts)
    if not isinstance(values, Tensor):  # numbers of a scorer that knows nothing of torch
        values = _numbers(values, images)
    wanted = f"must return one float per image, a tensor of shape ({count},)"
    if not isinstance(values, Tensor):
        raise UserError(f"reward {reward.name!r} {wanted}, but it returned {values!r}")
    if values.shape != (count,):
        raise UserError(f"reward {reward.name!r} {wanted}, but it returned shape {tuple(values.shape)}")
    if not values.is_floating_point():
        raise UserError(f"reward {reward.name!r} {wanted}, but it returned {values.dtype}")
    return values


def _numbers(values: object, images: Tensor) -> object:
    """A list or an array of numbers as a tensor; anything else as it is."""
    try:
        given = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return values
    kind = torch.promote_types(images.dtype, torch.float32)
    return given.to(images.device, kind) if given.ndim and given.dtype not in (torch.bool, *COMPLEX) else values


def probe(
    reward: Reward, size: int | tuple[int, int], device: torch.device | str = "cpu", count: int = 2, *, gradient: bool = True
) -> Tensor:  # fmt: skip
    """Try the reward on random images of `size` pixels (a side, or height and width) before a run depends on it.

    `count` is how many a run gives it at a time; more than two are as two.

    Each term of a sum is tried on its own. Returns the values. Raises UserError if a term raises, returns a wrong
    shape, NaN or infinity, or, where a `gradient` is needed, passes no finite one to the pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.rand(min(count, 2), 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.stack([weight * _probe(term, images, gradient) for weight, term in reward.weighted()]).sum(0)


def _probe(reward: Reward, images: Tensor, differentiated: bool) -> Tensor:
    images = images.detach().requires_grad_(differentiated)
    no_gradient = (
        f"reward {reward.name!r} passes no gradient to the pixels; compute it from them with torch alone, "
        "without detach(), no_grad(), NumPy, PIL or rounding, or train by ddpo or grpo, which need none"
        + "; or raise the batch, if it compares the images of one, because it gets a single image at a time"
        * (len(images) == 1)
    )
    with torch.set_grad_enabled(differentiated):
        try:
            values = checked(reward, images, ["a photo of a cat", "a photo of a dog"][: len(images)])
        except UserError:
            raise
        except Exception as error:
            got = f"{type(error).__name__}: {' '.join(str(error).split())}"
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise UserError(f"reward {reward.name!r} fails on {size} images: {got}") from error
        if not values.isfinite().all():
            got = str(values.tolist())
            raise UserError(f"reward {reward.name!r} returned {got}; it must be finite on images in [0, 1]")
        if not differentiated:
            return values.detach()
        if not values.requires_grad:
            raise UserError(no_gradient)
        (gradient,) = torch.autograd.grad(values.sum(), images, allow_unused=True)
    if gradient is None or not gradient.any():
        raise UserError(no_gradient)
    if not gradient.isfinite().all():
        advice = "look for sqrt, log or a norm of zero in it"
        raise UserError(f"the gradient of reward {reward.name!r} is not finite; {advice}")
    return values.detach()
