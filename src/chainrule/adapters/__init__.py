"""LoRA adapters: peft's layers and file formats, selected ambiently instead of by flipping flags."""

from chainrule.adapters.bands import Active, Band, InPart, Scale, check_calls, span_of, whole
from chainrule.adapters.files import LEARNED, Weights, adapter_files, learned_folders, mix, save_bands
from chainrule.adapters.lora import Adapter, inject, lease, load, unused_name
from chainrule.adapters.select import recompute, selected

__all__ = [
    "LEARNED",
    "Active",
    "Adapter",
    "Band",
    "InPart",
    "Scale",
    "Weights",
    "adapter_files",
    "check_calls",
    "inject",
    "learned_folders",
    "lease",
    "load",
    "mix",
    "recompute",
    "save_bands",
    "selected",
    "span_of",
    "unused_name",
    "whole",
]
