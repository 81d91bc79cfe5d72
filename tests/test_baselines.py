"""What needs no training: the best of several images, templates for prompts; and averages by group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline
from tuned import gray

import chainrule as cr
from chainrule.baselines import BestOf, Templated, search
from chainrule.evaluate import Table
from chainrule.prompts import groups
from chainrule.rewards import reward_of

PROMPTS = ["a fox", "two bees", "a cat"]


def model() -> cr.Model:
    return cr.load(make_pipeline(dtype=torch.float32)).guided(2.0)


def test_the_best_of_n_is_the_best_of_its_own_seeds() -> None:
    net, n = model(), 3
    best = BestOf(net, reward_of(gray), n).best(PROMPTS, [0, 1, 5], 2)
    for prompt, seed, found in zip(PROMPTS, [0, 1, 5], best, strict=True):
        seeds = [n * seed + k for k in range(n)]
        images = net.render([prompt] * n, seeds, 2)
        scores = gray(images, [prompt] * n)
        assert found.seed == seeds[int(scores.argmax())] and found.reward == pytest.approx(float(scores.max()))
        torch.testing.assert_close(found.image, images[int(scores.argmax())])
    rows = cr.evaluate({"base": net, "best": BestOf(net, reward_of(gray), n)}, PROMPTS, [gray], seeds=range(2), steps=2).values
    assert all(b >= a for a, b in zip(rows["base"]["gray"], rows["best"]["gray"], strict=True))
    with pytest.raises(cr.UserError, match="best of is 0"):
        BestOf(net, reward_of(gray), 0)


def test_the_template_goes_to_the_model_and_the_prompt_to_the_reward() -> None:
    net, read = model(), []

    def reading(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        read.append(list(prompts))
        return gray(images, prompts)

    images = Templated(net, "a photo of a {}, sharp").render(["a fox", "cat"], [0, 1], 2)
    torch.testing.assert_close(images, net.render(["a photo of a fox, sharp", "a photo of a cat, sharp"], [0, 1], 2))
    found = search(net, reading, PROMPTS[:2], PROMPTS[2:], ["{}", "a photo of {}", "{} at night"], seeds=[0, 1], steps=2)
    assert {prompt for batch in read for prompt in batch} == set(PROMPTS)
    means = {name: row["reading"].mean for name, row in found.tried.rows.items()}
    assert found.best == max(means, key=means.__getitem__) and list(found.tested.rows) == ["prompts as they are", found.best]
    for templates, said in (([], "no templates"), (["a photo"], "must say where the prompt goes"), (["{}", "{}"], "given twice")):
        with pytest.raises(cr.UserError, match=said):
            search(net, gray, PROMPTS, PROMPTS, templates)


def test_groups_are_averages_over_their_own_prompts() -> None:
    values = {"before": {"r": [1.0, 2.0, 6.0]}, "after": {"r": [2.0, 4.0, 6.0]}}
    table = Table.of(PROMPTS, values)
    by = table.by_group(["wild", "small", "wild"])
    assert {group: (t.prompts, t.rows["before"]["r"].mean, t.gains["after"]["r"].mean) for group, t in by.items()} == {
        "wild": (["a fox", "a cat"], 3.5, 0.5), "small": (["two bees"], 2.0, 2.0),
    }  # fmt: skip
    text = table.grouped(["wild", "small", "wild"])
    assert text.splitlines()[0].split() == ["r", "wild", "small", "all"] and "3.5 ± 32" in text


def test_groups_are_another_column_of_the_prompt_file(tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("Prompt,Category\n" + "".join(f"prompt {i},{'ab'[i % 2]}\n" for i in range(10)))
    assert groups(table, "Category") == ["a", "b"] * 5
    pairs = dict(zip(cr.prompts(table), groups(table, "Category"), strict=True))
    for half in (f"{table}:test", f"{table}:Prompt:train@3"):
        assert [pairs[p] for p in cr.prompts(half)] == groups(half, "Category")
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    assert groups(tmp_path, "style") == [prompt.split()[0] for prompt in cr.prompts(tmp_path)]
    with pytest.raises(cr.UserError, match="grouped by style"):
        groups(tmp_path, "Category")
    with pytest.raises(cr.UserError, match="no column 'Kind'"):
        groups(table, "Kind")
    with pytest.raises(cr.UserError, match="has no columns"):
        groups("animals:test", "Category")
    (tmp_path / "gaps.csv").write_text("Prompt,Category\na,x\nb,\n")
    with pytest.raises(cr.UserError, match="2 prompts, but 1 values"):
        groups(tmp_path / "gaps.csv", "Category")


def test_the_commands_sample_eval_and_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chainrule: Any) -> None:
    def run(*words: str, code: int = 0) -> str:
        found = chainrule(*words)
        assert found.code == code, found.err
        return str(found.err if code else found.out)

    monkeypatch.chdir(tmp_path)
    make_pipeline(dtype=torch.float32).save_pretrained("sd")
    small = ["--steps", "2", "--guidance", "2"]
    said = run(
        "sample", "sd", "--prompts", "a fox", "--seeds", "2", "--best-of", "3", "--reward", "symmetry", *small, "--out", "best"
    )
    assert "2 images in best" in said
    rows = [json.loads(line) for line in Path("best/images.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["0000.png", "0001.png"] and rows[1]["seed"] in (3, 4, 5)
    again = cr.load("sd").sample("a fox", [rows[1]["seed"]], 2, 2.0)[0]
    assert np.array_equal(np.asarray(again), np.asarray(Image.open("best/0001.png")))
    assert "--best-of needs a --reward" in run("sample", "sd", "--prompts", "a fox", "--best-of", "3", code=2)

    train = ["--reward", "symmetry", "--prompts", "animals", "--updates", "1", "--batch", "1", "--sample-steps", "2", "--out", "r"]
    run("train", "--model", "sd", "--method", "draft-1", *train)
    Path("p.csv").write_text("Prompt,Category\na fox,wild\na cat,tame\n")
    said = run("eval", "r", "--prompts", "p.csv", "--group", "Category", "--best-of", "2", "--reward", "symmetry", "--reward",
               "rotation", "--seeds", "2", "--steps", "2")  # fmt: skip
    assert "best of 2" in said and "by Category" in said and "trained on: symmetry; not trained on: rotation, diversity" in said
    assert set(json.loads(Path("r/evaluation.json").read_text())["groups"]) == {"wild", "tame"}

    said = run("search", "sd", "--reward", "symmetry", "--prompts", "p.csv", "--test-prompts", "p.csv", "--template", "{}",
               "--template", "a photo of {}", "--seeds", "1", *small, "--out", "found.json")  # fmt: skip
    assert "on 2 test prompts" in said and set(json.loads(Path("found.json").read_text())["tried"]) == {"{}", "a photo of {}"}
    assert "must say where the prompt goes" in run("search", "sd", "--reward", "symmetry", "--template", "a photo", code=2)
    assert "must end in .json" in run("search", "sd", "--reward", "symmetry", "--out", "x.txt", code=2)
