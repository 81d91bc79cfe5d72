"""What can be learned besides adapters, by one contract.

A learned part has named parameters, a learning rate of its own (as a factor on the run's), a place in the chain, and a way to
be saved. `into` puts it into a chain. Tensors that calls read directly, like an adapter's weights, need nothing more; what is
computed from parameters once for a whole chain goes in as a `Computed` tensor.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from chainrule.cast import Member
from chainrule.chain import Chain, Computed
from chainrule.errors import Note, UserError
from chainrule.files import make_folder, write_text
from chainrule.guidance import CFG, GUIDANCES, ByLevel, Scaled, specification
from chainrule.tensors import read_tensors, write_tensors

GUIDANCE, NEGATIVE = "guidance", "negative"  # what the parts here are called, and their files


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

    @property
    def guidance(self) -> ByLevel:
        """The guidance that has these weights."""
        return ByLevel(self.levels, self.weights, self.inner)

    @property
    def frozen(self) -> bool:
        """Whether they were loaded, and are not trained."""
        return not self.weights.requires_grad

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return {"weights": self.weights}

    def into(self, chain: Chain) -> Chain:
        """The chain with this part in it."""
        base = chain.cast["base"]
        if not isinstance(base, Member):
            raise UserError("guidance weights need a base member that is guided; this cast's answers in a way of its own")
        guided = replace(base, guidance=self.guidance)
        return replace(chain, cast={**chain.cast, "base": guided})

    def save(self, folder: Path) -> Path:
        """Write `guidance.safetensors`, and `guidance.json` to read: the guidance, and [level, scale] for every call."""
        make_folder(folder)
        levels = torch.tensor(self.levels, dtype=torch.float64)
        write_tensors(folder / f"{GUIDANCE}.safetensors", {"levels": levels, "weights": self.weights})
        schedule = [[level, round(scale, 4)] for level, scale in zip(self.levels, self.weights.tolist(), strict=True)]
        told = {"guidance": specification(self.inner), "schedule": schedule}
        write_text(folder / f"{GUIDANCE}.json", json.dumps(told) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path) -> GuidanceWeights:
        """As it was saved, frozen. Raises UserError for files that are damaged."""
        tensors, told = read_tensors(folder / f"{GUIDANCE}.safetensors"), _read_json(folder / f"{GUIDANCE}.json")
        levels, weights = (tensors.get(name, torch.empty(0)).double() for name in ("levels", "weights"))
        if levels.ndim != 1 or levels.shape != weights.shape or not len(levels):
            raise UserError(f"{folder / GUIDANCE}.safetensors is damaged: it has no scale for each level")
        guidance = _inner(told.get("guidance"), folder / f"{GUIDANCE}.json")
        return cls(tuple(levels.tolist()), nn.Parameter(weights, requires_grad=False), guidance)


@dataclass(frozen=True, slots=True)
class NegativeEmbedding:
    """A network from the prompts' token states to the negative prompts', (b, tokens, width) both.

    The idea is DRaFT's prompt-dependent negative embedding (arXiv:2309.17400, B.12). `start` makes the paper's network; another
    is for whoever makes it. The network is called once per chain.
    """

    network: nn.Module
    rate: float = 1.0
    decay: float = 1.0

    @classmethod
    def start(cls, empty: Tensor, seed: int = 0) -> NegativeEmbedding:
        """The paper's network, for prompts whose empty one has these states, (tokens, width): every prompt's negative at first."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(NegativeNetwork(empty))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by names that are the same in every run."""
        return dict(self.network.named_parameters())

    def into(self, chain: Chain) -> Chain:
        """The chain with this part in it."""
        positive = chain.condition.positive.states
        if isinstance(self.network, NegativeNetwork):
            self.fit(positive[0])
        states: Tensor = self.network(positive)
        computed = Computed.of(states)
        negative = replace(chain.condition.negative, states=computed.leaf)
        condition = replace(chain.condition, negative=negative)
        return replace(chain, condition=condition, computed=(*chain.computed, computed))

    def save(self, folder: Path) -> Path:
        """Write `negative.safetensors`, the network's state, and for the paper's network what it takes to make it again."""
        write_tensors(make_folder(folder) / f"{NEGATIVE}.safetensors", self.network.state_dict())
        if isinstance(self.network, NegativeNetwork):
            write_text(folder / f"{NEGATIVE}.json", json.dumps({"heads": self.network.attention.num_heads}) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path) -> NegativeEmbedding:
        """As it was saved, frozen. Raises UserError for files that are damaged, and for another network than the paper's."""
        place = folder / f"{NEGATIVE}.safetensors"
        tensors, told = read_tensors(place), _read_json(folder / f"{NEGATIVE}.json")
        try:
            network = NegativeNetwork(tensors["empty"], told["heads"])
            network.load_state_dict(tensors)
        except (KeyError, IndexError, RuntimeError, AssertionError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{place} is damaged, or of another network ({reason})") from error
        return cls(network.requires_grad_(False))

    def fit(self, states: Tensor) -> None:
        """Go where a model's prompts are. Raises UserError if theirs, (tokens, width), have another shape than it was made for."""
        here, there = tuple(states.shape), tuple(self.network.get_buffer("empty").shape)
        if here != there:
            raise UserError(f"the negative embedding was learned for prompts of shape {there}, and this model's are {here}")
        self.network.to(states.device)


class NegativeNetwork(nn.Module):
    """Token states e (b, tokens, width) to empty + MLP(MHSA(e)), with `empty` (tokens, width) the empty prompt's.

    The paper names the layers, and neither their sizes nor where they start. Here the attention has up to 8 heads, the MLP one
    hidden layer of the same width with a GELU, and its last layer starts at zero, so that the first images are those without it.
    """

    def __init__(self, empty: Tensor, heads: int | None = None) -> None:
        super().__init__()
        width, kind = empty.shape[1], torch.promote_types(empty.dtype, torch.float32)
        heads = heads or next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, dtype=kind)
        last = nn.Linear(width, width, dtype=kind)
        self.mlp = nn.Sequential(nn.Linear(width, width, dtype=kind), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.register_buffer("empty", empty.detach().to(kind))

    def forward(self, states: Tensor) -> Tensor:
        """The negative states of prompts' states, both (b, tokens, width)."""
        e = states.to(self.get_buffer("empty"))
        return (self.get_buffer("empty") + self.mlp(self.attention(e, e, e, need_weights=False)[0])).to(states)


KINDS: Mapping[str, type[GuidanceWeights | NegativeEmbedding]] = {GUIDANCE: GuidanceWeights, NEGATIVE: NegativeEmbedding}


def load(folders: Iterable[Path]) -> dict[str, Learned]:
    """The learned parts in these folders by name, frozen. One of a kind that is not here is passed over, with a note.

    Raises UserError for one that is damaged.
    """
    found: dict[str, Learned] = {}
    for folder in folders:
        kind = next((kind for name, kind in KINDS.items() if (folder / f"{name}.json").is_file()), None)
        if kind:
            found[folder.name] = kind.load(folder)
        else:
            warnings.warn(Note(f"{folder} is a learned part of its own kind; put it back by model.learning(...)"), stacklevel=2)
    return found


def _inner(given: object, place: Path) -> Scaled:
    """The guidance whose scale was learned. Raises UserError for anything but ours: a file from a stranger names no code."""
    if isinstance(given, float | int):
        return CFG(given)
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not hasattr(GUIDANCES.classes.get(name), "scale"):
        raise UserError(f"{place} is damaged, or of a guidance of its own: {name!r}; put that back by model.learning(...)")
    return cast(Scaled, GUIDANCES.read(given))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it is no table")
    return found
