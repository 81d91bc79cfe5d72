"""What `best/` follows: the held-out reward, the trained one while nothing else gets worse, or what the images look like."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tuned import tuned

import chainrule as cr
from chainrule.report.guard import alarm
from chainrule.report.watched import watched_of

EVERY = {"sample_every": 1, "save_every": 0, "updates": 8, "lr": 0.3}


def weights(run: cr.Run, folder: str) -> list[float]:
    stored = load_file(run.folder / folder / "pytorch_lora_weights.safetensors")
    return [float(stored[key].sum()) for key in sorted(stored)]


def means(run: cr.Run, name: str) -> dict[int, float]:
    """Of every grid but the first, which is made before there is anything to save."""
    rows = [row for row in run.watched() if row["step"]]
    return {row["step"]: sum(row["values"][name][:8]) / len(row["values"][name][:8]) for row in rows}


@pytest.mark.parametrize("name", ["brightness", "diversity"])
def test_best_is_the_adapter_of_the_highest_of_what_was_named(name: str, tmp_path: Path) -> None:
    """Shown by a run that ends at that update: its adapter has the same bits."""
    run = tuned(tmp_path / "run", best=name, **EVERY)
    found = means(run, name)
    at = max(found, key=lambda step: (found[step], -step))
    shorter = tuned(tmp_path / "shorter", **EVERY | {"updates": at})
    assert weights(run, "best") == weights(shorter, "adapter")
    assert (weights(run, "best") == weights(run, "adapter")) == (at == EVERY["updates"])


@pytest.mark.parametrize("name", ["brightness", "edges"])
def test_a_run_that_ended_and_goes_on_has_the_best_of_one_that_did_not_end(name: str, tmp_path: Path) -> None:
    """Whatever is the best: here each run's last grid counts, which is the end of a shorter one."""
    whole = tuned(tmp_path / "whole", best=name, **EVERY | {"sample_every": 2, "save_every": 2})
    for updates in (2, 4, 6, 8):
        tuned(tmp_path / "parts", best=name, resume=updates > 2, **EVERY | {"sample_every": 2, "save_every": 2, "updates": updates})
        found = means(cr.Run(tmp_path / "parts"), name)
        shorter = tuned(tmp_path / f"{updates}", **EVERY | {"updates": max(found, key=lambda step: (found[step], -step))})
        assert weights(cr.Run(tmp_path / "parts"), "best") == weights(shorter, "adapter")
    assert weights(cr.Run(tmp_path / "parts"), "best") == weights(whole, "best")


def test_the_sound_best_is_the_last_that_rose_before_the_alarm(tmp_path: Path) -> None:
    """The reward rises by brightness, which takes the colors away; the report says where from on."""
    run = tuned(tmp_path / "run", best="sound", **EVERY | {"updates": 12, "lr": 1.0})
    raised = alarm(watched_of(run.watched())[0])
    assert raised is not None and raised.step > 1
    rewards = {row["step"]: sum(row["values"]["reward"][:8]) for row in run.watched() if 0 < row["step"] < raised.step}
    at = max(rewards, key=lambda step: (rewards[step], -step))
    shorter = tuned(tmp_path / "shorter", **EVERY | {"updates": at, "lr": 1.0})
    assert weights(run, "best") == weights(shorter, "adapter")


def test_patience_counts_by_what_best_names(tmp_path: Path) -> None:
    """It ends at the second grid in a row that is not the brightest so far, as the same run without patience shows."""
    found = means(tuned(tmp_path / "whole", **EVERY), "brightness")
    worse = lambda step: max(found[step], found[step - 1]) <= max(found[k] for k in range(1, step - 1))
    ends = next(step for step in found if step > 2 and worse(step))
    run = tuned(tmp_path / "run", best="brightness", patience=2, **EVERY)
    assert len(run.metrics()) == ends and "brightness stopped rising" in (run.folder / "stopped.txt").read_text()
    with pytest.raises(cr.UserError, match="or let best name something else"):
        tuned(tmp_path / "other", patience=2, **EVERY)
