"""What a model says of itself where it is printed, and in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from chainrule import display
from chainrule.adapters import Band
from chainrule.models.pipeline import weight_type
from chainrule.size import Size


class Shown(Protocol):
    """What is read of a model."""

    name: str
    active: dict[str, Band]
    base_adapters: tuple[str, ...]
    student_name: str | None
    quantize: str | None
    learned: Mapping[str, Any]

    @property
    def family(self) -> str: ...
    @property
    def network(self) -> nn.Module: ...
    @property
    def size(self) -> Size: ...


def facts(model: Shown) -> dict[str, str]:
    """Its name, pipeline, network, where that is and in which type, and which adapters are on, at which scales.

    The network's parameters are counted without those of adapters; numbers of four bits are counted in pairs.
    """
    named = list(model.network.named_parameters())
    count = sum(weight.numel() for name, weight in named if ".lora_" not in name)
    held = str(weight_type(model.network)).removeprefix("torch.")
    return {
        "model": model.name,
        "pipeline": model.family,
        "network": f"{type(model.network).__name__} with {display.amount(count)} parameters",
        "weights": f"{held}, {model.quantize}" if model.quantize else held,
        "device": str(named[0][1].device) if named else "",
        "images": f"{model.size[0]} x {model.size[1]} pixels",
        "adapters on": "; ".join(_on(name, band) for name, band in model.active.items()),
        "adapters from": "; ".join(model.base_adapters),
        "student": model.student_name or "",
        "learned": ", ".join(model.learned),
    }


def line(model: Shown) -> str:
    """The same in one line, without what is seen on its images."""
    told = facts(model)
    on = {"with": f"with {told['adapters on']}" if told["adapters on"] else ""}
    return display.line("Model", {name: told[name] for name in ("model", "pipeline", "network", "weights", "device")} | on)


def _on(name: str, band: Band) -> str:
    first, last = band.scale if isinstance(band.scale, tuple) else (band.scale, band.scale)
    scale = (
        f"{band.factor * last:g}" if first == last else f"{band.factor * first:g} at noise to {band.factor * last:g} at the image"
    )
    spans = ["" if high is None else f"to {high:g}" for _, high in band.spans or ()]
    levels = [f"above {low:g} {end}".strip() for (low, _), end in zip(band.spans or (), spans, strict=True)]
    return f"{name} at {scale}" + (f", levels {', '.join(levels)}" if levels else "")
