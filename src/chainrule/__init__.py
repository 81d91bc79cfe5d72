"""chainrule: align and steer diffusion models by backpropagating rewards through the sampling chain."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainrule.adapters import Adapter, mix
    from chainrule.distill import distill
    from chainrule.errors import UserError
    from chainrule.evaluate import Table, evaluate
    from chainrule.finetune import finetune
    from chainrule.gradient import Result, gradient
    from chainrule.models import Model, attach, load
    from chainrule.prompts import prompts
    from chainrule.report import report
    from chainrule.runs import Run
    from chainrule.steer import Steered, steer

__version__ = "0.1.0"
__all__ = [
    "Adapter", "Model", "Result", "Run", "Steered", "Table", "UserError",
    "attach", "distill", "evaluate", "finetune", "gradient", "load", "mix", "prompts", "report", "steer",
]  # fmt: skip

# Imported on first use, so that the command line can answer --help without loading torch.
_HOMES = {
    "Adapter": "adapters", "mix": "adapters", "Result": "gradient", "UserError": "errors", "Table": "evaluate",
    "attach": "models", "distill": "distill", "evaluate": "evaluate", "finetune": "finetune", "gradient": "gradient",
    "Model": "models", "load": "models",
    "prompts": "prompts", "report": "report", "Run": "runs", "Steered": "steer", "steer": "steer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"chainrule.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`distill`, `finetune`, `evaluate`, `prompts`, `report` and `steer` are functions here and modules too: the function is the
    attribute, the module is reached by `from chainrule.finetune import ...`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
