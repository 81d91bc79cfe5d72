"""What every family asks of its pipeline: frozen parts, the defaults of its call, the type of its weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from chainrule.errors import UserError


def freeze(pipe: Any, *names: str) -> None:
    """Stop the gradients of these components, in evaluation mode. Raises UserError for the first that the pipeline lacks."""
    for name in names:
        component = getattr(pipe, name, None)
        if component is None:
            raise UserError(f"the {type(pipe).__name__} has no {name}, which its prompts are read with; load it with all its parts")
        component.requires_grad_(False).eval()


def call_default(pipe: Any, option: str, otherwise: Any) -> Any:
    """The default of an option of the pipeline's own call."""
    found = inspect.signature(type(pipe).__call__).parameters.get(option)
    return otherwise if found is None or found.default in (None, inspect.Parameter.empty) else found.default


def weight_type(network: Any) -> torch.dtype:
    """What a network computes in: the type of its first floating-point weight that is not an adapter's."""
    return next(weight.dtype for weight in network.parameters() if weight.is_floating_point())
