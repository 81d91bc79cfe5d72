"""What steering optimizes: a latent on the chain, an embedding or controls beside the network, one per image; or weights.

Each is a `Learned` part of the chain; `steer/kinds.py` says how each starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, Self

from torch import Tensor, nn

from chainrule.adapters import Adapter
from chainrule.cast import Answerer, networks_of
from chainrule.chain import Chain
from chainrule.denoise import Condition
from chainrule.files import make_folder
from chainrule.learned import Learned
from chainrule.tensors import write_tensors


class Variable(Learned, Protocol):
    """A learned part of which every image of a batch has its own, or that all share."""

    shared: ClassVar[bool]  # whether all images share it

    def of(self, images: Sequence[int]) -> Self:
        """The part of some of the images, with parameters of its own; a shared one as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Latent:
    """The state that the chain starts from, (b, c, h, w). A walk returns its gradient."""

    x: nn.Parameter
    rate: float = 1.0
    decay: float = 0.0
    shared: ClassVar[bool] = False

    def of(self, images: Sequence[int]) -> Self:
        """The part of some of the images, with parameters of its own."""
        return replace(self, x=_rows(self.x, images))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return {"latent": self.x}

    def into(self, chain: Chain) -> Chain:
        """The chain as it is: its first state is given when it is walked."""
        return chain

    def save(self, folder: Path) -> Path:
        """Write `latent.safetensors`."""
        return _save(self, folder)


@dataclass(frozen=True, slots=True)
class Embedding:
    """The token states of the prompts or of the negative prompts, (b, tokens, width): `side` of the chain's condition."""

    states: nn.Parameter
    side: str
    rate: float = 1.0
    decay: float = 0.0
    shared: ClassVar[bool] = False

    def of(self, images: Sequence[int]) -> Self:
        """The part of some of the images, with parameters of its own."""
        return replace(self, states=_rows(self.states, images))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return {self.side: self.states}

    def into(self, chain: Chain) -> Chain:
        """The chain with these states in the place of its own."""
        embedding = replace(getattr(chain.condition, self.side), states=self.states)
        return replace(chain, condition=replace(chain.condition, **{self.side: embedding}))

    def save(self, folder: Path) -> Path:
        """Write `embedding.safetensors`."""
        return _save(self, folder)


@dataclass(frozen=True, slots=True)
class Controls:
    """What is added to the base member's answer at every level of a chain, (b, c, h, w) each (FlowGrad, arXiv:2212.01365)."""

    values: Mapping[float, nn.Parameter]
    rate: float = 1.0
    decay: float = 0.0
    shared: ClassVar[bool] = False

    def of(self, images: Sequence[int]) -> Self:
        """The part of some of the images, with parameters of its own."""
        return replace(self, values={level: _rows(value, images) for level, value in self.values.items()})

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return {f"{level:g}": value for level, value in self.values.items()}

    def into(self, chain: Chain) -> Chain:
        """The chain with a base member that adds the controls."""
        return replace(chain, cast={**chain.cast, "base": Controlled(chain.cast["base"], self.values)})

    def save(self, folder: Path) -> Path:
        """Write `controls.safetensors`."""
        return _save(self, folder)


@dataclass(frozen=True, slots=True)
class Weights:
    """A LoRA inside the network, which all images share."""

    adapter: Adapter
    rate: float = 1.0
    decay: float = 0.0
    shared: ClassVar[bool] = True

    def of(self, images: Sequence[int]) -> Self:
        """Itself: all images share it."""
        return self

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return self.adapter.named_parameters()

    def into(self, chain: Chain) -> Chain:
        """The chain as it is: a LoRA answers inside the network it is in."""
        return chain

    def save(self, folder: Path) -> Path:
        """Write the adapter, so that the pipeline's `load_lora_weights(folder)` reads it."""
        return self.adapter.save(folder)


def _rows(values: nn.Parameter, images: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(values.detach()[list(images)])


def _save(part: Learned, folder: Path) -> Path:
    write_tensors(make_folder(folder) / f"{type(part).__name__.lower()}.safetensors", part.named_parameters())
    return folder


@dataclass(frozen=True, slots=True)
class Controlled:
    """A member with a control added to its answer at every level (FlowGrad, arXiv:2212.01365).

    FlowGrad adds controls to a velocity; here they are added to whatever the network predicts.
    """

    member: Answerer
    controls: Mapping[float, Tensor]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules it calls."""
        return tuple(networks_of({"base": self.member}))

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        return self.member(x, level, condition) + self.controls[level]
