"""The memory that is forecast without weights is what the same update takes with them; and what is chosen from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, Case, loaded
from typer.testing import CliRunner

import chainrule as cr
from chainrule import methods
from chainrule.cli import app
from chainrule.errors import Note
from chainrule.footprint import Footprint, count, flash_attention
from chainrule.meters import LiveBytes
from chainrule.models.outline import hold, outline, outline_of
from chainrule.rewards import reward_of
from chainrule.settings import Finetuning
from chainrule.training import FinetuneTask

SETTINGS: dict[str, Any] = {"sample_steps": 3, "rank": 2, "micro_batch": 1}
bright = reward_of(lambda images, prompts: images.float().mean((1, 2, 3)), name="bright")


def measured(model: cr.Model, method: methods.Method, batch: int, memory: str) -> int:
    """The most bytes that an update with real numbers holds, by its operations' results."""
    settings = Finetuning(**SETTINGS, batch=batch, updates=9, memory=memory, sample_every=0)
    task = FinetuneTask.start(model, method, bright, [*model.defaults.labels[:1]] or ["a prompt"], settings)
    try:
        with flash_attention():
            task.update()
            task.learner.optimizer.zero_grad(set_to_none=True)
            with LiveBytes(torch.device("cpu")) as meter:
                task.update()
    finally:
        task.remove()
    return meter.peak


OTHERS = [pytest.param(name, marks=pytest.mark.heavy) for name in CASES if name not in ("sdxl", "flux")]


@pytest.mark.parametrize("memory", ["keep", "recompute", "blocks"])
@pytest.mark.parametrize("name", ["sdxl", "flux", *OTHERS])
def test_what_is_forecast_is_what_is_taken(name: str, memory: str) -> None:
    """Within a few kilobytes, which are much of what models of a few thousand weights take."""
    case: Case = CASES[name]
    model = loaded(case)
    found = count(outline_of(model), methods.DRaFT(1), bright, Finetuning(**SETTINGS, memory=memory), (1, 3))
    real = {batch: measured(model, methods.DRaFT(1), batch, memory) for batch in (1, 3)}
    assert {batch: peak / real[batch] for batch, peak in found.peaks.items()} == pytest.approx({1: 1.0, 3: 1.0}, rel=0.05)
    assert found.fixed["network"] == sum(each.nbytes for each in (*model.network.parameters(), *model.network.buffers()))
    assert found.fixed["adapters"] > 0 and not found.fixed["reward"]


@pytest.mark.parametrize("word", ["int8", "4bit"])
def test_weights_in_fewer_bits_take_fewer_bytes_and_no_more_activations(word: str, tmp_path: Path) -> None:
    CASES["flux"].pipe().save_pretrained(tmp_path)
    settings = Finetuning(**SETTINGS, memory="blocks")
    whole, fewer = (
        count(outline(tmp_path, size=(16, 16), quantize=quantize), methods.DRaFT(1), bright, settings, (1,))
        for quantize in (None, word)
    )
    linear = sum(m.weight.nbytes for m in outline(tmp_path, size=(16, 16)).network.modules() if isinstance(m, torch.nn.Linear))
    saved = whole.fixed["network"] - fewer.fixed["network"]
    assert saved == pytest.approx(linear * (1 - {"int8": 8, "4bit": 4.5}[word] / 16), rel=0.1)
    assert fewer.peaks[1] < 1.3 * whole.peaks[1]  # a layer's weights, for the moment of its product


def test_a_layer_held_in_fewer_bits_keeps_nothing_for_its_gradient() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, device="meta"))
    layer.requires_grad_(False)
    hold(layer, 8.0, 2)
    assert layer[0].weight.nbytes == 64 * 64 + 2 * 64
    with LiveBytes(torch.device("meta")) as meter:
        answer = layer(torch.empty(1, 64, device="meta", requires_grad=True))
        assert meter.live < 64 * 64
        answer.sum().backward()


def test_between_counts_a_batch_takes_no_less_than_it_does() -> None:
    """A line between two batches lies above the most of what is fixed and what grows."""
    truth = lambda batch: max(100.0, 20.0 * batch + 10)
    found = Footprint({"network": 7}, {n: int(truth(n)) for n in (1, 2, 8, 32)})
    assert all(found.total(n) >= 7 + truth(n) for n in range(1, 200))
    assert found.total(8) == 7 + 170 and found.total(64) == 7 + 1290
    assert found.largest(found.total(20)) == 20 and found.largest(10) == 0 and found.largest(1e9, 50) == 50


def fine_tuned(tmp_path: Path, **options: Any) -> cr.Run:
    settings: dict[str, Any] = {**SETTINGS, "batch": 2, "updates": 2, "sample_every": 0, **options}
    score = lambda images, prompts: images.mean((1, 2, 3))
    return cr.finetune(loaded(CASES["sd"]), methods.DRaFT(1), score, ["a fox"], out=tmp_path / "run", **settings)


def test_the_fastest_policy_that_fits_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = outline_of(loaded(CASES["sd"]))
    need = {}
    for memory in ("keep", "recompute", "blocks"):
        found = count(bare, methods.DRaFT(1), bright, Finetuning(**SETTINGS, memory=memory), (1, 2))
        need[memory] = found.fixed["adapters"] + found.peaks[2]
    assert need["keep"] >= need["recompute"] > need["blocks"]
    for memory, room in (("keep", 1.5 * need["keep"]), ("blocks", 1.3 * need["blocks"])):
        monkeypatch.setattr("chainrule.footprint.free_bytes", lambda device, room=room: room)
        with pytest.warns(Note, match=f"memory: {memory}; an update takes about"):
            run = fine_tuned(tmp_path / memory, memory="auto")
        assert run.config.settings.memory == memory
    monkeypatch.setattr("chainrule.footprint.free_bytes", lambda device: 0.5 * need["blocks"])
    with pytest.raises(cr.UserError, match=r"memory is 'auto', but a batch of 2 takes .* GB at the least, and .* GB can be used"):
        fine_tuned(tmp_path / "small", memory="auto")
    assert not (tmp_path / "small" / "run").exists()


def test_a_run_goes_on_under_another_policy(tmp_path: Path) -> None:
    """With the same numbers but for rounding."""
    whole = fine_tuned(tmp_path / "whole", updates=4)
    fine_tuned(tmp_path, updates=2, memory="keep")
    resumed = fine_tuned(tmp_path, updates=4, memory="blocks", micro_batch=2, resume=True)
    rewards = [[row["reward"] for row in run.metrics()] for run in (whole, resumed)]
    assert len(rewards[1]) == 4 and rewards[1] == pytest.approx(rewards[0], rel=1e-4)


def test_plan_counts_a_folder_without_weights(tmp_path: Path) -> None:
    CASES["sd3"].pipe().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    base = ["plan", "sdo", "--model", str(tmp_path), "--size", "16", "--sample-steps", "3", "--reward", "symmetry", "--memory-of"]
    text = said([*base, "24GB"])
    assert re.search(r"keep +0\.\d+ GB +\d+", text) and "24 GB, 90% of it used: --memory keep and a batch of up to" in text
    assert "blocks" not in said([*base, "24GB", "--memory", "recompute"])
    small = said([*base, "0.0001GB"], code=1)
    assert re.search(r"0\.0001 GB are too few even so; [\d.e-]+ GB would do for one image", small)
    for wrong, message in (("much", "memory-of is 'much', but must be a size as 24GB"), ("0GB", "memory-of is '0GB'")):
        assert message in said([*base, wrong], code=1)
    unknown = [*base, "24GB", "--reward", "imagereward"]
    assert "how much memory 'imagereward' takes is not known; take pickscore" in said(unknown, code=1)


def said(words: list[str], code: int = 0) -> str:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == code or isinstance(found.exception, cr.UserError), found.output
    return found.output + str(found.exception or "")
