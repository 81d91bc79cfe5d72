"""Trackers get what a run writes down: every number of its rows, its settings with their types, its grids, its own name."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker, register_tracker_class
from PIL import Image
from tuned import tuned

from chainrule.errors import UserError
from chainrule.trackers import PICTURES, leaves, tracker

CPU = torch.device("cpu")


class Paper(GeneralTracker):
    """Writes down what accelerate hands to a tracker, in the order in which it comes."""

    name, requires_logging_directory = "paper", False
    got: list[Any] = []  # noqa: RUF012  the class is made anew by accelerate

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.got.append((run_name, options))

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.got.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.got.append((step, values))

    def finish(self) -> None:
        self.got.append("finished")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trains with `Paper` in tensorboard's place, which need not be installed."""
    register_tracker_class(Paper)
    Paper.got.clear()
    room = importlib.import_module("chainrule.finetune")
    monkeypatch.setattr(room, "tracker", lambda name, *args: tracker("paper", *args))
    monkeypatch.setitem(PICTURES, "paper", lambda each, name, picture, step: Paper.got.append((name, step, np.asarray(picture))))
    return Paper.got


def test_a_tracker_gets_what_the_run_writes_down(tmp_path, paper):
    run = tuned(tmp_path / "mine", held_out="filesize", sample_every=2, tracker="tensorboard", updates=4)
    (project, _), settings, *rest, last = paper
    assert project == "chainrule" and last == "finished"
    known = run.config.values()
    assert settings["lr"] == known["lr"] == 1e-2 and settings["batch"] == 2 and settings["method/name"] == "draft-lv"
    assert {type(settings[key]) for key in ("lr", "batch", "reward")} == {float, int, str}
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    sent = dict(entry for entry in rest if len(entry) == 2)
    assert list(sent) == [row["step"] for row in rows]
    for row in rows:
        numbers = {key: value for key, value in leaves(row).items() if key != "step"}
        assert sent[row["step"]] == pytest.approx(numbers, rel=1e-5) and {"skipped", "terms/gray"} <= numbers.keys()
    assert "held_out" in sent[2]
    shown = [(name, step) for name, step, _ in (entry for entry in rest if len(entry) == 3)]
    assert shown == [("samples/before", 0), ("samples", 2), ("samples/after", 4), ("samples/before_after", 4)]
    for entry, file in zip((e for e in rest if len(e) == 3), ("before", "step-000002", "after", "before_after"), strict=True):
        assert np.array_equal(entry[2], np.asarray(Image.open(run.samples / f"{file}.png").convert("RGB")))


def test_numbers_that_are_none_are_not_sent(tmp_path, paper):
    config = {"lr": 1e-2, "stage_steps": None, "adapter": [], "prompts": ["a", "b"], "method": {"k": 1}}
    listener = tracker("paper", config, tmp_path, CPU)
    listener.started()
    listener.updated({"step": 1, "reward": math.nan, "lr": 0.1, "terms": {"a": math.inf, "b": 2.0}})
    assert paper[1:] == [{"lr": 1e-2, "prompts": "a, b", "method/k": 1}, (1, {"lr": 0.1, "terms/b": 2.0})]


def test_tensorboards_own_reader_finds_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tuned(tmp_path / "mine", sample_every=2, tracker="tensorboard", updates=4)
    events = EventAccumulator(str(run.folder / "trackers" / "mine"))
    events.Reload()
    told = [(event.step, event.value) for event in events.Scalars("reward")]
    assert told == [(row["step"], pytest.approx(row["reward"], rel=1e-5)) for row in run.metrics()]
    assert {"skipped", "terms/gray", "lr"} <= set(events.Tags()["scalars"])
    picture = Image.open(run.samples / "step-000002.png")
    assert [(image.step, image.width, image.height) for image in events.Images("samples")] == [(2, *picture.size)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_picture_is_wrapped_as_the_tracker_wants_it(name, monkeypatch):
    """Against a stand-in of the two modules' boundary: `Image(picture)` and `run.log(values, step=...)`."""
    module, logged = ModuleType(name), []
    module.Image = lambda picture: ("wrapped", picture)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    log: Callable[..., None] = lambda values, step: logged.append((values, step))
    PICTURES[name](SimpleNamespace(tracker=SimpleNamespace(log=log)), "samples", "a picture", 3)
    assert logged == [({"samples": ("wrapped", "a picture")}, 3)]


def test_wandb_offline_has_the_pictures(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tuned(tmp_path / "mine", sample_every=2, tracker="wandb", updates=4)
    files = list(Path(run.folder / "trackers").rglob("*.png"))
    assert len(files) == 4 and all(Image.open(path).size for path in files)


def test_trackio_has_the_run_by_its_name(tmp_path):
    pytest.importorskip("trackio")
    given = ["--reward", "symmetry", "--updates", "2", "--sample-every", "1", "--batch", "1", "--sample-steps", "2"]
    place = ["--tracker", "trackio", "--out", str(tmp_path / "mine")]
    command = [sys.executable, "-m", "chainrule", "train", *given, *place]
    subprocess.run(command, check=True, env={**os.environ, "TRACKIO_DIR": str(tmp_path / "db")})  # read when it is imported
    assert len(list((tmp_path / "db" / "media" / "chainrule" / "mine").rglob("*.png"))) == 4


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    class Closed(Paper):
        name = "closed"

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            raise RuntimeError("no key\nlong story")

    register_tracker_class(Closed)
    with pytest.raises(UserError, match=r"the tracker closed does not start: no key$"):
        tracker("closed", {}, tmp_path, CPU).started()
