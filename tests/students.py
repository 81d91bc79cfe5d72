"""A LoRA that stands for a student."""

from __future__ import annotations

from pathlib import Path

import torch
from pipelines import make_pipeline

import chainrule as cr

PROMPTS, SEEDS, GUIDANCE = ["a fox", "two bees"], [4, 9], 3.0


def shake(adapter: cr.Adapter, seed: int) -> cr.Adapter:
    torch.manual_seed(seed)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    return adapter


def student_file(folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A LoRA that stands for a student."""
    net = cr.load(make_pipeline(dtype=dtype))
    return shake(net.adapt("student", rank=2), 5).save(folder)
