"""Models in float64, one for each kind of prediction, to compare gradients on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from families import sd3
from pipelines import make_pipeline
from torch import nn

import chainrule as cr


def sd3_in_float64() -> Any:
    torch.manual_seed(0)
    pipe = sd3()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.double().eval()
    return pipe


MODELS: Mapping[str, Callable[[], cr.Model]] = {
    "epsilon": lambda: cr.load(make_pipeline()),
    "velocity": lambda: cr.load(make_pipeline("v_prediction")),
    "flow": lambda: cr.load(sd3_in_float64()),
}


def prepared(name: str, solver: str | None = None) -> tuple[cr.Model, cr.Adapter]:
    """A model with an adapter away from the identity."""
    model = MODELS[name]().solving(solver).guided(3.0)
    adapter = model.adapt("mine", rank=2)
    torch.manual_seed(1)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.1)
    return model, adapter
