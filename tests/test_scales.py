"""Pictures of adapters by scale and by sampling step: every cell is the image that `sample` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

import chainrule as cr
from chainrule.analyze import scale_grid, step_grid
from chainrule.report.pictures import cells

STEPS = 4


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    found = []
    for i in range(2):
        model = cr.load(make_pipeline(dtype=torch.float32))
        adapter = model.adapt("mine", rank=2)
        torch.manual_seed(i)
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.2)
        found.append(str(adapter.save(tmp_path / f"a{i}")))
    return found


def same(cell: Image.Image, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(cell), np.asarray(image.resize(cell.size, Image.Resampling.NEAREST)))


def test_a_cell_is_the_image_at_its_scales(adapters: list[str]) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32)).guided(2.0)
    one, two = adapters
    sheet = scale_grid(model, {one: 1.0, two: 0.5}, ["a fox"], cells=2, seed=3, steps=STEPS)
    plain = model.sample(["a fox"] * 9, [3] * 9, STEPS)
    for i, cell in enumerate(cells(sheet, plain, 3, captioned=True)):
        across, down = 0.5 * (i % 3), 0.25 * (i // 3)
        used = model.using(one, scale=across).using(two, scale=down)
        assert same(cell, used.sample(["a fox"], [3], STEPS)[0]), (across, down)
    sheet = scale_grid(model, {one: 1.0}, ["a fox", "a cat"], cells=1, steps=STEPS)
    found = cells(sheet, plain[:4], 2, captioned=True)
    assert same(found[2], model.sample(["a cat"], [0], STEPS)[0])
    assert same(found[3], model.using(one).sample(["a cat"], [0], STEPS)[0])
    with pytest.raises(cr.UserError, match="one adapter or two, not 3"):
        scale_grid(model, {"a": 1.0, "b": 1.0, "c": 1.0}, ["a fox"])
    with pytest.raises(cr.UserError, match="shows one prompt, not 2"):
        scale_grid(model, {"a": 1.0, "b": 1.0}, ["a fox", "a cat"])


def test_a_cell_is_the_image_with_the_adapter_on_for_its_steps(adapters: list[str]) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32)).guided(2.0)
    sheet = step_grid(model, adapters[0], ["a fox"], cells=2, steps=STEPS)
    plain = model.sample(["a fox"] * 6, [0] * 6, STEPS)
    spans = [None, (0, 2), (0, 4), (0, 4), (2, 4), None]
    for cell, span in zip(cells(sheet, plain, 3, captioned=True), spans, strict=True):
        used = model.using(adapters[0], adapter_steps=span, steps=STEPS) if span else model
        assert same(cell, used.sample(["a fox"], [0], STEPS)[0]), span
    with pytest.raises(cr.UserError, match="at most the number of sampling steps, 4"):
        step_grid(model, adapters[0], ["a fox"], cells=5, steps=STEPS)


def test_the_commands(adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chainrule: Any) -> None:
    monkeypatch.chdir(tmp_path)
    make_pipeline(dtype=torch.float32).save_pretrained("sd")
    small = ["--prompts", "a fox", "--steps", "2"]
    found = chainrule("mix", "a0=1", "a1=0.5", "--grid", "1", "--model", "sd", *small, "--out", "both")
    assert found.code == 0 and Path("both/grid.png").is_file() and "picture: both/grid.png" in found.out, found.err
    for words, said in (
        (["mix", "a0=1", "--grid", "1", "--out", "x"], "--grid and --prompts go together"),
        (["mix", "a0=1", "--grid", "1", *small, "--out", "x"], "pass --model"),
        (["mix", "a0=1", "a1=1", "--grid", "1", *small, "--prompts", "a cat", "--model", "sd", "--out", "x"], "shows one prompt"),
        (["analyze", "steps", "a0", *small], "is no run"),
    ):
        refused = chainrule(*words)
        assert refused.code == 2 and said in refused.err, refused.err
    assert not Path("x/grid.png").exists()
    train = ["--method", "draft-1", "--reward", "symmetry", "--prompts", "animals", "--updates", "1", "--batch", "1"]
    assert chainrule("train", "--model", "sd", *train, "--sample-steps", "2", "--out", "r").code == 0
    assert chainrule("analyze", "steps", "r", *small, "--cells", "2", "--out", "s").code == 0 and Path("s/steps.png").is_file()
