"""Adapters of chainrule in a plain diffusers pipeline, each at its own levels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from chainrule import adapters
from chainrule.adapters import Active, Adapter, Band, selected
from chainrule.adapters.files import COMPONENTS
from chainrule.errors import UserError
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


def attach(pipe: Any, source: str | Path, *, scale: float = 1.0) -> Attached:
    """Let a run's adapters answer in a plain diffusers pipeline, each at its own levels.

    For adapters by level (ShortFT), which `load_lora_weights` knows nothing of, and for pipelines that have no
    `load_lora_weights` (PixArt's); single ones work too. Every call of the network looks at its timestep and runs with the
    adapters of that level, at `scale`; calls without any cost what they cost without adapters. Raises UserError for a
    pipeline without a denoiser, with adapters on it already, or of another architecture.
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

    def answer(*args: Any, **kwargs: Any) -> Any:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        # A batch of them is one level: that of the scheduler's nearest timestep, for half precision rounds what is passed.
        told = unit * float(time.flatten()[0] if hasattr(time, "flatten") else time)
        level = min(pipe.scheduler.timesteps.tolist(), key=lambda known: abs(known - told)) + offset
        with selected(network, active.at(level)):
            return forward(*args, **kwargs)

    network.forward = answer
    return attached
