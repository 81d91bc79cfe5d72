"""What is minimized: a weighted sum of terms, each read off finished images or off the network's answer at a live call.

    loss = sum over terms of weight * value, per image

A term has a `name` for the log, a `weight`, and one of two functions. `of_images` gives a value per image of the finished
batch; `of_call` gives one for a live call's answer, or None for calls it does not look at. A term of one's own is any object
with these. Rewards are terms of negative weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from chainrule import half
from chainrule.cast import Answerer
from chainrule.denoise import Condition
from chainrule.plan import Jump
from chainrule.rewards import AnyReward, Reward, as_reward, checked
from chainrule.solve import Step

Decode: TypeAlias = Callable[[Tensor], Tensor]  # image latents to images in [0, 1], (b, 3, h, w), differentiable


@dataclass(frozen=True, slots=True)
class Call:
    """One live call of the network: its answer and the state it read, (b, c, h, w), the jump it makes, and the prompts.

    `last` says that it is the last live call of the plan's first branch. The noise it predicts is p x + q m with `noise` = (p, q).
    `move` is the step that the call's jump makes, and `after` where it led to, where that was kept.
    """

    answer: Tensor
    state: Tensor
    jump: Jump
    condition: Condition
    last: bool = True
    noise: tuple[float, float] = (0.0, 1.0)
    move: Step = field(default_factory=lambda: Step(1.0))
    after: Tensor | None = None


class Term(Protocol):
    """What every term has."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


@runtime_checkable
class ImageTerm(Term, Protocol):
    """A term on finished images."""

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        """Images (b, 3, h, w) in [0, 1], which are these rows of the batch -> values (b,), differentiable."""
        ...


@runtime_checkable
class CallTerm(Term, Protocol):
    """A term on answers."""

    def of_call(self, call: Call) -> Tensor | None:
        """Values (b,), differentiable in `call.answer`; None for a call the term does not look at."""
        ...


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """A reward, to be raised: its weight is negative. `reference` (b, 3, h, w) are the images as they were, where steering."""

    reward: Reward
    weight: float = -1.0
    reference: Tensor | None = None

    @property
    def name(self) -> str:
        """What the log calls it."""
        return self.reward.name

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        """The value of each image, (b,)."""
        reward = self.reward if self.reference is None else self.reward.with_reference(self.reference[rows])
        return checked(reward, images, prompts)


@dataclass(frozen=True, slots=True)
class Distance:
    """The root mean square over pixels to `reference` (b, 3, h, w), which SDO holds on to (arXiv:2505.07477, Eq. 23).

    Differs from the paper, whose norm sums over pixels and so means something else at every image size.
    """

    reference: Tensor
    weight: float = 1.0
    name: str = "distance"

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        """The value of each image, (b,)."""
        return distance(images, self.reference[rows])


def distance(images: Tensor, reference: Tensor) -> Tensor:
    """(b,): root mean square over pixels. Its gradient at zero distance is zero, not infinite."""
    square = (images - reference.to(images)).flatten(1).square().mean(1)
    return torch.where(square > 0, square.clamp(min=1e-12).sqrt(), square)


@dataclass(frozen=True, slots=True)
class KL:
    """The squared distance of the predicted noise to the base model's, summed over an image (arXiv:2309.17400, B.8).

    It looks at one call: the last live one of the plan's first branch, which for DRaFT-K and LV is the paper's last step.
    `base` answers without the adapters that are trained; its answer and the state that both read are constants.
    """

    base: Answerer
    weight: float = 0.1
    name: str = "kl"

    def of_call(self, call: Call) -> Tensor | None:
        """The value of each image at this call, (b,); None for a call it does not look at."""
        if not call.last:
            return None
        with torch.no_grad():
            base = self.base(call.state, call.jump.start, call.condition)
        return (call.noise[1] * (call.answer - base)).flatten(1).square().sum(1)


@dataclass(frozen=True, slots=True)
class SegmentError:
    """How far a student's jump lands from where its teacher's trajectory is at that level (Hyper-SD, arXiv:2404.13686).

    `target` (b, c, h, w) is that state, `move` the (a, b) of the jump a x + b m, and `reach` what the jump multiplies an error
    of the velocity by, so that long and short jumps count alike. The mean square over the latent, divided by reach^2.
    """

    target: Tensor
    move: tuple[float, float]
    reach: float
    weight: float = 1.0
    name: str = "segment error"

    def of_call(self, call: Call) -> Tensor:
        """The value of each image at this call, (b,); None for a call it does not look at."""
        a, b = self.move
        missed = (a * call.state + b * call.answer - self.target) / self.reach
        return missed.flatten(1).square().mean(1)


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at finished images: the loss and the reward of each (b,), the terms' values (b,), and the images.

    `pixels`, of the images' shape, is d(sum of losses)/d(images), once it is known.
    """

    loss: Tensor
    rewards: Tensor
    terms: Mapping[str, Tensor]
    images: Tensor
    pixels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """A sum of terms."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, reward: Objective | AnyReward) -> Objective:
        """A reward's, with a term for every reward it is a sum of; an objective as it is."""
        if isinstance(reward, Objective):
            return reward
        return cls(tuple(RewardTerm(each, -weight) for weight, each in as_reward(reward).weighted()))

    @property
    def on_calls(self) -> Objective:
        """The terms on answers alone."""
        return Objective(tuple(term for term in self.terms if isinstance(term, CallTerm)))

    def against(self, reference: Tensor) -> Objective:
        """This objective with every reward told the images as they were, (b, 3, h, w); what steering asks for."""
        return Objective(tuple(replace(t, reference=reference) if isinstance(t, RewardTerm) else t for t in self.terms))

    def with_terms(self, *terms: Term) -> Objective:
        """This objective and these terms as well."""
        return Objective((*self.terms, *terms))

    def scaled(self, factor: float) -> Objective:
        """Every weight times a factor. The terms must be dataclasses, as those here are."""
        return Objective(tuple(replace(term, weight=factor * term.weight) for term in self.terms))  # type: ignore[type-var]

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Reading:
        """The loss of these images. One without a term on images is zero."""
        values = [(term, term.of_images(images, prompts, rows)) for term in self.terms if isinstance(term, ImageTerm)]
        rewards = [-term.weight * value for term, value in values if isinstance(term, RewardTerm)]
        others = [term.weight * value for term, value in values if not isinstance(term, RewardTerm)]
        nothing = images.new_zeros(len(images))
        reward = torch.stack(rewards).sum(0) if rewards else nothing
        loss = torch.stack([-reward, *others]).sum(0) if others else -reward
        return Reading(loss, reward.detach(), {term.name: value.detach() for term, value in values}, images.detach())

    def of_call(self, call: Call) -> tuple[Tensor | None, dict[str, Tensor]]:
        """d(sum of the images' losses)/d(answer), or None where no term looks, and the terms' values (b,)."""
        terms = [term for term in self.terms if isinstance(term, CallTerm)]
        if not terms:
            return None, {}
        leaf = call.answer.detach().requires_grad_()
        with torch.enable_grad():
            seen = [(term, term.of_call(replace(call, answer=leaf))) for term in terms]
            found = [(term, value) for term, value in seen if value is not None]
            if not found:
                return None, {}
            loss = torch.stack([term.weight * value.sum() for term, value in found]).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, {term.name: value.detach() for term, value in found}


def read(
    decode: Decode, objective: Objective, latents: Tensor, prompts: Sequence[str], micro_batch: int = 8
) -> tuple[Reading, Tensor]:
    """What the objective says of finished latents (b, c, h, w), and d(sum of the images' losses)/d(latents).

    Decoded and read `micro_batch` images at a time, on a leaf copy of the latents.
    """
    readings, gradients = [], []
    for rows in micro_batches(latents, micro_batch):
        leaf = latents[rows].detach().requires_grad_()
        with torch.enable_grad():
            images = decode(leaf)
            reading = objective.of_images(images, prompts[rows], rows)
            on_images = reading.loss.requires_grad  # else every term is on calls
            pixels = torch.autograd.grad(reading.loss.sum(), images)[0] if on_images else torch.zeros_like(images)
        readings.append(replace(reading, loss=reading.loss.detach(), pixels=pixels))
        gradients.append(half.gradient(images, leaf, pixels))
    return joined(readings), torch.cat(gradients)


@torch.no_grad()
def look(
    decode: Decode, objective: Objective, latents: Tensor, prompts: Sequence[str], micro_batch: int = 8
) -> Reading:  # fmt: skip
    """What the objective says of finished latents (b, c, h, w), without a gradient: its rewards need none."""
    return joined([objective.of_images(decode(latents[rows]), prompts[rows], rows) for rows in micro_batches(latents, micro_batch)])


def read_again(decode: Decode, pixels: Tensor, latents: Tensor, micro_batch: int = 8) -> Tensor:
    """d(sum of pixels * image)/d(latents) of other finished latents, for the `Reading.pixels` of a look at the first."""
    gradients = []
    for rows in micro_batches(latents, micro_batch):
        leaf = latents[rows].detach().requires_grad_()
        with torch.enable_grad():
            images = decode(leaf)
        gradients.append(half.gradient(images, leaf, pixels[rows]))
    return torch.cat(gradients)


def micro_batches(latents: Tensor, size: int) -> list[slice]:
    """The rows of a batch, `size` at a time."""
    return [slice(first, first + size) for first in range(0, len(latents), size)]


def joined(readings: Sequence[Reading]) -> Reading:
    """The readings of a batch's parts as one."""
    columns = {name: torch.cat([reading.terms[name] for reading in readings]) for name in readings[0].terms}
    whole = (torch.cat([getattr(reading, name) for reading in readings]) for name in ("loss", "rewards", "images"))
    loss, rewards, images = whole
    pixels = [reading.pixels for reading in readings if reading.pixels is not None]
    return Reading(loss, rewards, columns, images, torch.cat(pixels) if pixels else None)
