"""What can be learned besides adapters, by one contract.

A learned part has named parameters, a learning rate of its own (as a factor on the run's), a place in the chain, and a way to
be saved. `into` puts it into a chain. Tensors that calls read directly, like an adapter's weights, need nothing more; what is
computed from parameters once for a whole chain goes in as a `Computed` tensor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from chainrule.cast import Member
from chainrule.chain import Chain, Computed
from chainrule.errors import UserError
from chainrule.files import make_folder, write_text
from chainrule.guidance import CFG, ByLevel, Scaled
from chainrule.tensors import write_tensors


class Learned(Protocol):
    """A part of a chain with parameters of its own."""

    @property
    def rate(self) -> float:
        """Its learning rate, as a factor on the run's."""
        ...

    @property
    def decay(self) -> float:
        """Its weight decay, as a factor on the run's: 0 for parts that zero means nothing to."""
        ...

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        ...

    def into(self, chain: Chain, /) -> Chain:
        """The chain with this part in it."""
        ...

    def save(self, folder: Path, /) -> Path:
        """Write it into a folder, as safetensors and what is needed to read them."""
        ...


@dataclass(frozen=True, slots=True)
class GuidanceWeights:
    """A guidance scale for each call of a sampling chain (DRaFT's learned sampler, arXiv:2309.17400, B.12).

    `levels` are those of the calls, `weights` their scales (n,); between levels the scale is linear, so that a chain of another
    number of steps reads the same schedule. `inner` is the guidance whose scale is learned. The paper's rate is 50 times the
    adapter's.
    """

    levels: tuple[float, ...]
    weights: nn.Parameter
    inner: Scaled = field(default_factory=CFG)
    rate: float = 50.0
    decay: float = 0.0

    @classmethod
    def start(cls, levels: Sequence[float], scale: float, *, inner: Scaled | None = None, rate: float = 50.0) -> GuidanceWeights:
        """The same scale at every call: `levels` is the grid of a chain, its last level, 0, makes no call."""
        calls = tuple(level for level in levels if level > 0)
        weights = nn.Parameter(torch.full((len(calls),), float(scale), dtype=torch.float64))
        return cls(calls, weights, inner or CFG(scale), rate)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return {"weights": self.weights}

    def into(self, chain: Chain) -> Chain:
        """The chain with this part in it."""
        base = chain.cast["base"]
        if not isinstance(base, Member):
            raise UserError("guidance weights need a base member that is guided; this cast's answers in a way of its own")
        guided = replace(base, guidance=ByLevel(self.levels, self.weights, self.inner))
        return replace(chain, cast={**chain.cast, "base": guided})

    def save(self, folder: Path) -> Path:
        """Write `guidance.safetensors`, and `guidance.json` to read: [level, scale] for every call."""
        make_folder(folder)
        write_tensors(folder / "guidance.safetensors", {"levels": torch.tensor(self.levels), "weights": self.weights})
        schedule = [[level, round(scale, 4)] for level, scale in zip(self.levels, self.weights.tolist(), strict=True)]
        write_text(folder / "guidance.json", json.dumps(schedule) + "\n")
        return folder


@dataclass(frozen=True, slots=True)
class NegativeEmbedding:
    """A network from the prompts' token states to the negative prompts', (b, tokens, width) both.

    The idea is DRaFT's prompt-dependent negative embedding (arXiv:2309.17400, B.12); which network it is, and where it starts,
    is for whoever makes it. The network is called once per chain.
    """

    network: nn.Module
    rate: float = 1.0
    decay: float = 1.0

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return dict(self.network.named_parameters())

    def into(self, chain: Chain) -> Chain:
        """The chain with this part in it."""
        states: Tensor = self.network(chain.condition.positive.states)
        computed = Computed.of(states)
        negative = replace(chain.condition.negative, states=computed.leaf)
        condition = replace(chain.condition, negative=negative)
        return replace(chain, condition=condition, computed=(*chain.computed, computed))

    def save(self, folder: Path) -> Path:
        """Write `negative.safetensors`, the network's state."""
        write_tensors(make_folder(folder) / "negative.safetensors", self.network.state_dict())
        return folder
