"""LoRA adapters: peft's layers and file formats, selected ambiently instead of by flipping flags."""

from chainrule.adapters.bands import ALWAYS, Active, Band
from chainrule.adapters.files import Weights, load, mix, save
from chainrule.adapters.select import Adapter, inject, recompute, remove, selected

__all__ = ["ALWAYS", "Active", "Adapter", "Band", "Weights", "inject", "load", "mix", "recompute", "remove", "save", "selected"]
