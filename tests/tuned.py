"""A small run of fine-tuning, and all that a run leaves in its folder, to compare what was disturbed with what was not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import make_pipeline
from safetensors.torch import load
from torch import Tensor, nn

import chainrule as cr
from chainrule.loop import Row
from chainrule.methods import Method

PROMPTS = ["a fox", "two bees"]
SMALL: dict[str, Any] = {
    "updates": 6, "batch": 2, "sample_steps": 3, "guidance": 2.0, "rank": 2, "lr": 1e-2, "save_every": 2, "sample_every": 1,
    "ema": 0.9,
}  # fmt: skip
TIMED = {"environment.json", "report.html", ".lock"}


class Killed(Exception):
    """What ends a run at once, without its knowing."""


def gray(images: Tensor, prompts: object) -> Tensor:
    return -(images - 0.5).square().mean((1, 2, 3))


class Judge(nn.Module):
    """A reward with a network: what a small one says of images, averaged to 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.inner, self.out = nn.Linear(12, 8), nn.Linear(8, 1)

    def forward(self, images: Tensor, prompts: object) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.to(self.out.weight), 2).flatten(1)
        return self.out(self.inner(3 * small).tanh())[:, 0]


def drawn(images: Tensor, prompts: object) -> Tensor:
    """As rewards with random crops do: from each of the three generators that people draw from."""
    return gray(images * (1 + torch.rand(1) + np.random.rand() + random.random()), prompts)  # noqa: NPY002


def tuned(
    folder: Path, reward: Any = gray, *, method: str | Method = "draft-lv", student: Path | None = None, die: int = 0,
    look: Callable[[Row], object] = lambda row: None, **options: Any,
) -> cr.Run:  # fmt: skip
    """Fine-tune a small random-weight model; `look` at every row; `die` after this update, before it is logged."""

    def update(row: Row) -> None:
        look(row)
        if row["step"] == die:
            raise Killed

    model = cr.load(make_pipeline(dtype=torch.float32))
    if student:
        model = model.with_student(student)
    return cr.finetune(model, method, reward, PROMPTS, out=folder, on_update=update, **{**SMALL, **options})


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves but what tells the time: the rows without their seconds, the files' contents."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes() if path.is_file() else b""
        if path.is_dir() or path.name in TIMED:
            continue
        if path.suffix == ".safetensors":  # their headers are in no order
            found |= {f"{name}/{key}": value.numpy().tobytes() for key, value in load(data).items()}
        elif path.name == "state.json":
            found[name] = {key: value for key, value in json.loads(data).items() if key != "sha256"}
        elif path.name == "metrics.jsonl":
            found[name] = [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in data.splitlines()]
        else:
            found[name] = data
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is in one of them only, or different."""
    return sorted(name for name in one.keys() | two.keys() if name not in one or name not in two or one[name] != two[name])
