"""Trackers: a run's numbers, pictures and settings sent to TensorBoard, Weights & Biases, trackio and the like, by accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from chainrule.errors import UserError
from chainrule.loop import Listener, Row

PROJECT = "chainrule"


def tracker(name: str, config: Mapping[str, Any], folder: str | Path, device: torch.device) -> Listener:
    """A listener that sends what a run writes down to one of accelerate's trackers, under the name of its folder.

    Every number of a row goes, the settings with their types, and the sample grids as pictures where the tracker is in
    `PICTURES`. It has to be told after the listener that draws the grids. Raises UserError if the tracker is not installed, and
    when the run starts if the tracker does not.
    """
    run, samples = Path(folder).resolve().name, Path(folder) / "samples"
    accelerator = Accelerator(log_with=name, cpu=device.type == "cpu", project_dir=Path(folder) / "trackers")
    if not accelerator.log_with:
        raise UserError(f"the tracker {name!r} is not installed; pip install {name}")
    last = 0

    def started() -> None:
        (Path(folder) / "trackers").mkdir(parents=True, exist_ok=True)
        named = {"wandb": {"name": run, "dir": f"{folder}/trackers"}, "trackio": {"name": run, "embed": False}}
        try:
            accelerator.init_trackers(run if name == "tensorboard" else PROJECT, leaves(config), init_kwargs=named)
        except Exception as error:  # no network, no key: each has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the tracker {name} does not start: {reason}") from error
        show("before", 0)

    def updated(row: Row) -> None:
        nonlocal last
        last = row["step"]
        numbers = {key: value for key, value in leaves(row).items() if isinstance(value, int | float) and math.isfinite(value)}
        accelerator.log({key: value for key, value in numbers.items() if key != "step"}, step=last)
        show(f"step-{last:06d}", last)

    def finished(reason: str) -> None:
        if reason != "interrupted":
            for picture in ("after", "before_after"):
                show(picture, last)
        for each in accelerator.trackers:
            each.finish()

    def show(picture: str, step: int) -> None:
        place = samples / f"{picture}.png"
        if name in PICTURES and place.is_file() and accelerator.is_main_process:
            with Image.open(place) as opened:
                image = opened.convert("RGB")
            for each in accelerator.trackers:
                PICTURES[name](each, "samples" if picture.startswith("step-") else f"samples/{picture}", image, step)

    return Listener(started=started, updated=updated, finished=finished)


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level: {"terms": {"aesthetic": 5.1}} is {"terms/aesthetic": 5.1}.

    Numbers, texts, true and false stay what they are, which is all that trackers take. Lists become text. None and empty lists
    are left out.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{prefix}{key}/")
        elif value is not None and value != []:
            found[f"{prefix}{key}"] = value if isinstance(value, str | int | float) else ", ".join(map(str, value))
    return found


def _tensorboard(tracker: GeneralTracker, name: str, picture: Image.Image, step: int) -> None:
    tracker.tracker.add_image(name, np.asarray(picture), step, dataformats="HWC")


def _wandb(tracker: GeneralTracker, name: str, picture: Image.Image, step: int) -> None:
    import wandb

    tracker.tracker.log({name: wandb.Image(picture)}, step=step)


def _trackio(tracker: GeneralTracker, name: str, picture: Image.Image, step: int) -> None:
    import trackio

    tracker.tracker.log({name: trackio.Image(picture)}, step=step)


PICTURES: Mapping[str, Callable[[GeneralTracker, str, Image.Image, int], None]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio,
}  # fmt: skip
"""How a picture is sent, for the trackers that were tried. The others get the numbers and the settings."""
