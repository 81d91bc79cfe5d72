"""Trackers: a run's numbers sent to TensorBoard, Weights & Biases and the like, by accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from chainrule.errors import UserError
from chainrule.loop import Listener, Row


def tracker(name: str, config: Mapping[str, Any], folder: str | Path, device: torch.device) -> Listener:
    """A listener that sends every row's numbers to one of accelerate's trackers. Raises UserError if it is not installed."""
    accelerator = Accelerator(log_with=name, cpu=device.type == "cpu", project_dir=Path(folder) / "trackers")
    if not accelerator.log_with:
        raise UserError(f"the tracker {name!r} is not installed; pip install {name}")

    def started() -> None:
        accelerator.init_trackers("chainrule", {key: str(value) for key, value in config.items()})

    def updated(row: Row) -> None:
        terms = {f"terms/{name}": value for name, value in row.get("terms", {}).items()}
        accelerator.log({key: value for key, value in row.items() if isinstance(value, float)} | terms, step=row["step"])

    def finished(reason: str) -> None:
        for each in accelerator.trackers:
            each.finish()

    return Listener(started=started, updated=updated, finished=finished)
