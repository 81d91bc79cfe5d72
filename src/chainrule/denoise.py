"""A network as a function of a state, a level and prompts, whatever its family calls these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """What a network reads of b prompts: token states (b, tokens, width), and what its family has besides.

    `pooled` is one vector per prompt (b, width), `mask` marks the tokens that count (b, tokens). A class-conditional model's
    states are the classes themselves, (b,).
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def concatenated(self, other: PromptEmbedding) -> PromptEmbedding:
        """Both batches, this one first."""
        pairs = ((self.pooled, other.pooled), (self.mask, other.mask))
        pooled, mask = (None if a is None or b is None else torch.cat([a, b]) for a, b in pairs)
        return PromptEmbedding(torch.cat([self.states, other.states]), pooled, mask)

    def each(self, change: Callable[[Tensor], Tensor]) -> PromptEmbedding:
        """The same change made to every tensor."""
        pooled, mask = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return PromptEmbedding(change(self.states), pooled, mask)


@dataclass(frozen=True, slots=True)
class Condition:
    """The embeddings of a batch's prompts, and of the empty or negative prompts that guidance leads away from."""

    positive: PromptEmbedding
    negative: PromptEmbedding

    def each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        """The same change made to every tensor; what is one embedding stays one."""
        positive = self.positive.each(change)
        return Condition(positive, positive if self.negative is self.positive else self.negative.each(change))


class Denoiser(Protocol):
    """The raw network of a model family: its answer for a state at a level and the prompts of the same batch size.

    Levels need not be whole: flows' and some schedulers' are not, and an ODE solver asks between them. A network that reads
    its guidance scale as a number (FLUX, latent consistency models) has `guidance_is_input = True` and is given it as
    `scale`; the others are never given one, and need neither the attribute nor the argument.
    """

    @property
    def network(self) -> nn.Module: ...

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, /) -> Tensor: ...


class GuidanceReader(Denoiser, Protocol):
    """A denoiser whose network reads the guidance scale."""

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, /, scale: float | Tensor = 1.0) -> Tensor: ...


def guidance_is_input(denoiser: Denoiser) -> bool:
    """Whether this denoiser's network reads its guidance scale."""
    return bool(getattr(denoiser, "guidance_is_input", False))
