"""What chainrule trained in a plain diffusers pipeline: adapters, each at its own levels, and a learned sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chainrule import adapters
from chainrule.adapters import Active, Adapter, Band, selected
from chainrule.adapters.files import COMPONENTS
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.errors import UserError
from chainrule.learned import GuidanceWeights, Learned, NegativeEmbedding, load
from chainrule.models import loras
from chainrule.models.families import TIMES


@dataclass(slots=True)
class Attached:
    """Adapters that answer inside a pipeline until `remove`. Also a context manager."""

    network: nn.Module
    forward: Any  # what answered before, when it was set on the network itself: an offloading hook
    loaded: list[Adapter] = field(default_factory=list)

    def remove(self) -> None:
        """Give the pipeline back as it was, bit for bit."""
        self.network.__dict__.pop("forward", None)
        if self.forward:
            self.network.forward = self.forward
        for adapter in self.loaded:
            adapter.remove()
        self.loaded.clear()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(pipe: Any, source: str | Path, *, scale: adapters.Scale = 1.0) -> Attached:
    """Let what a run trained answer in a plain diffusers pipeline: its adapters, each at its own levels, and its sampler.

    For adapters by level (ShortFT), which `load_lora_weights` knows nothing of, for learned guidance weights and negative
    embeddings, and for pipelines that have no `load_lora_weights` (PixArt's); single ones work too. Every call of the network
    looks at its timestep and runs with the adapters of that level, at `scale` (as in `Model.using`); calls without any cost what
    they cost without adapters. With learned guidance weights the pipeline must be called with a `guidance_scale` above 1, whose
    size then means nothing. Raises UserError for a pipeline without a denoiser, with adapters on it already, or of another
    architecture.
    """
    network = next((getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None), None)
    if network is None:
        raise UserError(f"{type(pipe).__name__} has no {' or '.join(COMPONENTS)} to attach adapters to")
    if getattr(network, "peft_config", None):
        raise UserError(f"the pipeline has adapters already ({', '.join(network.peft_config)}); remove them first")
    attached, bands = Attached(network, vars(network).get("forward")), {}
    try:
        for i, (file, spans) in enumerate(adapters.adapter_files(source).items()):
            name = f"attached{i}"
            attached.loaded.append(adapters.load(network, name, loras.read(file, type(pipe).__name__, network.config)))
            bands[name] = Band(scale, spans)
    except UserError:
        attached.remove()
        raise
    active, forward, (unit, offset) = Active(bands), network.forward, TIMES.get(type(network).__name__, (1.0, 1))
    sampler = _Sampler(pipe, load(adapters.learned_folders(source)))

    def answer(*args: Any, **kwargs: Any) -> Any:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # A batch of them is one level: that of the scheduler's nearest timestep, for half precision rounds what is passed.
        told = unit * float(time.flatten()[0] if hasattr(time, "flatten") else time)
        level = min(pipe.scheduler.timesteps.tolist(), key=lambda known: abs(known - told)) + offset
        with selected(network, active.at(level)):
            return sampler.guided(forward(*args, **sampler.conditioned(kwargs)), level)

    network.forward = answer
    return attached


@dataclass(frozen=True, slots=True)
class _Sampler:
    """Learned parts around a network that is called as a pipeline calls it: a batch of negatives, then one of prompts."""

    pipe: Any
    parts: Mapping[str, Learned]

    def conditioned(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the network is told, with the learned negative embedding in the place of the pipeline's."""
        negative = next((part for part in self.parts.values() if isinstance(part, NegativeEmbedding)), None)
        if negative is None or not self._doubled():
            return told
        _, positive = told["encoder_hidden_states"].chunk(2)
        negative.fit(positive[0])
        with torch.no_grad():
            states = torch.cat([negative.network(positive), positive])
        return {**told, "encoder_hidden_states": states}

    def guided(self, answer: Any, level: float) -> Any:
        """The answer, guided by the learned weights, twice: whatever scale the pipeline then takes, it changes nothing.

        Raises UserError for a pipeline that was called without guidance.
        """
        weights = next((part for part in self.parts.values() if isinstance(part, GuidanceWeights)), None)
        if weights is None:
            return answer
        if not self._doubled():
            raise UserError("the guidance is learned, so call the pipeline with a guidance_scale above 1; its size means nothing")
        first = answer[0]
        asked, nothing = lambda *_: first, PromptEmbedding(first)  # the network has answered already
        with torch.no_grad():
            m = weights.guidance(asked, first.chunk(2)[1], level, Condition(nothing, nothing))  # type: ignore[arg-type]
        twice = torch.cat([m, m]).to(first)
        return (twice, *answer[1:]) if isinstance(answer, tuple) else type(answer)(twice)

    def _doubled(self) -> bool:
        """Whether the pipeline asks for negatives as well; one that does not say does."""
        return bool(getattr(self.pipe, "do_classifier_free_guidance", True))
