"""An evaluation's scores: every image's is saved, a killed evaluation goes on, few images are in memory, N processes are one."""

from __future__ import annotations

import csv
import gc
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults.trial import run, together, touching
from pipelines import make_pipeline
from torch import Tensor
from tuned import tuned

import chainrule as cr
from chainrule.cli import app
from chainrule.evaluate import distances, diversity
from chainrule.runs import WRITES
from chainrule.scores import Score, Scores, write_csv

PROMPTS = ["a fox", "two bees", 'a "cat", or — two']
SMALL = ["--prompts", "three.txt", "--seeds", "2", "--steps", "2"]
NAMES = ["evaluation.json", "scores.csv", "scores.jsonl"]
Call = Callable[..., SimpleNamespace]


@pytest.fixture
def place(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a model, and prompts, where the command line is."""
    monkeypatch.chdir(tmp_path)
    Path("sd").symlink_to(sd_folder)
    Path("three.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    words = ["train", "--model", "sd", "--method", "draft-1", "--reward", "symmetry", "--prompts", "three.txt", "--lr", "0.05"]
    words += ["--updates", "1", "--batch", "1", "--sample-steps", "2", "--sample-every", "0", "--guidance", "2", "--rank", "2"]
    app([*words, "--out", "one"], standalone_mode=False)
    shutil.copytree("one", "two")
    return tmp_path


def contents(folder: Path | str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in NAMES}


def lines(folder: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "scores.jsonl").read_text().splitlines()]


def test_every_images_scores_are_saved_for_one_run_and_for_several(place: Path, chainrule: Call) -> None:
    found = chainrule("eval", "one", *SMALL, "--reward", "symmetry", "--reward", "rotation")
    assert found.code == 0 and found.out.splitlines()[-1] == "the table: one/evaluation.json; every image: one/scores.csv", (
        found.err
    )
    base = cr.load("sd")
    asked = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    told = lines("one")
    pictures = [(line["row"], line["prompt"], line["seed"]) for line in told]
    assert pictures == [(r, *pair) for r in ("before", "after") for pair in asked]
    for name, model in {"before": base, "after": base.using("one")}.items():
        images = model.render([prompt for prompt, _ in asked], [seed for _, seed in asked], 2, 2.0)
        scores = [line["scores"] for line in told if line["row"] == name]
        assert [each["symmetry"] for each in scores] == pytest.approx((-(images - images.flip(-1)).abs().mean((1, 2, 3))).tolist())
        small = torch.nn.functional.adaptive_avg_pool2d(images, 16).flatten(1)  # of two images the distance is both's
        apart = [float((a - b).square().mean().sqrt()) for a, b in zip(small[::2], small[1::2], strict=True) for _ in "ab"]
        assert [each["diversity"] for each in scores] == pytest.approx(apart, rel=1e-4)
    with Path("one/scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["row", "prompt", "seed", "symmetry", "rotation", "diversity"]
    for row, line in zip(rows, told, strict=True):
        assert (row["row"], row["prompt"], int(row["seed"])) == (line["row"], line["prompt"], line["seed"])
        assert {name: float(row[name]) for name in line["scores"]} == line["scores"]
    table = json.loads(Path("one/evaluation.json").read_text())
    for row in table["rows"]:
        for column, value in row["metrics"].items():
            scores = [line["scores"][column] for line in told if line["row"] == row["name"]]
            assert value["mean"] == pytest.approx(sum(scores) / 6, rel=1e-6)
    assert table["made"]["after"]["steps"] == 2 and table["made"]["after"]["adapters"][0]["adapter"] == "one"

    assert chainrule("eval", "one", "two", *SMALL, "--best-of", "2").code == 0  # without --out: evaluation
    assert [row["name"] for row in json.loads(Path("evaluation/evaluation.json").read_text())["rows"]] == [
        "before", "best of 2", "one", "two",
    ]  # fmt: skip
    assert len(lines("evaluation")) == 4 * 6 and not Path("two/evaluation.json").exists()
    assert (
        chainrule("eval", "one", *SMALL, "--out", "there/deep").code == 0
        and sorted(p.name for p in Path("there/deep").iterdir()) == NAMES
    )
    assert all(WRITES.fullmatch(name) for name in NAMES)  # a run that is overwritten takes them away
    assert chainrule("report", "one").code == 0 and "symmetry" in Path("one/report.html").read_text()


def test_what_is_scored_already_is_not_made_again_unless_a_setting_differs(place: Path, chainrule: Call, monkeypatch: Any) -> None:
    made: list[int] = []
    render = cr.Model.render

    def counting(self: cr.Model, prompts: list[str], *given: Any, **options: Any) -> Tensor:
        made.append(len(prompts))
        return render(self, prompts, *given, **options)

    monkeypatch.setattr(cr.Model, "render", counting)

    def evaluated(*more: str) -> int:
        made.clear()
        found = chainrule("eval", "one", *SMALL, "--reward", "symmetry", *more)
        assert found.code == 0, found.err
        return sum(made)

    assert evaluated() == 12
    before = contents("one")
    assert evaluated() == 0 and contents("one") == before
    Path("one/scores.jsonl").write_text(
        "".join(Path("one/scores.jsonl").read_text().splitlines(keepends=True)[:8]) + '{"row": "aft'
    )
    assert evaluated() == 6 and contents("one") == before  # a batch with a torn line in it is made again
    for more, count in ((("--steps", "3"), 12), (("--seeds", "1"), 6), (("--guidance", "3"), 12), (("--reward", "rotation"), 12)):
        assert evaluated(*more) == count, more
    Path("one/scores.jsonl").unlink()
    assert evaluated() == 12
    whole = Path("one/scores.jsonl").read_text()
    Path("one.txt").write_text(f"{PROMPTS[0]}\n")
    assert evaluated("--prompts", "one.txt") == 0 and sorted(Path("one/scores.jsonl").read_text()) == sorted(whole)
    assert len(Path("one/scores.csv").read_text().splitlines()) == 5 and evaluated() == 0  # the others' scores were not lost
    further = tuned(place / "other", updates=1).adapter / "pytorch_lora_weights.safetensors"
    Path("one/adapter/pytorch_lora_weights.safetensors").write_bytes(further.read_bytes())
    assert evaluated() == 6  # the run's images, and not the base model's
    assert evaluated("--scale", "0.5") == 6


def test_a_killed_evaluation_goes_on_to_the_same_numbers(place: Path) -> None:
    def evaluate(out: str) -> None:
        torch.set_num_threads(1)
        app(["eval", "one", *SMALL, "--seeds", "9", "--out", out], standalone_mode=False)  # a prompt is a batch

    assert run(touching(partial(evaluate, "whole"), count=place / "count"), place / "said.txt").code == 0
    for die in range(1, int((place / "count").read_text()) + 1, 2):
        assert run(touching(partial(evaluate, f"cut-{die}"), die, torn=True), place / "said.txt").code == -9
        ended = run(partial(evaluate, f"cut-{die}"), place / "said.txt")
        assert ended.code == 0 and contents(f"cut-{die}") == contents("whole"), ended.said


def test_several_processes_write_the_scores_of_one(place: Path) -> None:
    def evaluate(out: str, dies: int = 0) -> None:
        torch.set_num_threads(1)
        touching(lambda: app(["eval", "one", *SMALL, "--seeds", "9", "--out", out], standalone_mode=False), dies)()

    assert run(partial(evaluate, "alone"), place / "said.txt").code == 0
    for each in together(lambda rank: partial(evaluate, "both", 3 * (rank == 0)), place / "several"):
        assert each.end().code != 0
    assert not Path("both/evaluation.json").exists()
    for each in together(lambda rank: partial(evaluate, "both"), place / "several"):
        ended = each.end()
        assert ended.code == 0, ended.said
    assert contents("both") == contents("alone")


def test_images_in_memory_do_not_grow_with_the_prompts() -> None:
    """Living images are counted at every call of the reward."""
    model, seen = cr.load(make_pipeline(dtype=torch.float32)), []
    gc.collect()
    gc.freeze()  # what is there before is not counted, and counting is quick

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        gc.collect()
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is Tensor}
        seen.append(sum(size // (3 * 16 * 16 * 4) for size in held.values()))
        return images.mean((1, 2, 3))

    def most(count: int) -> int:
        seen.clear()
        cr.evaluate({"a": model, "b": model}, [f"{k} foxes" for k in range(count)], [reward], seeds=range(2), steps=1, batch=4)
        assert len(seen) == count
        return max(seen) - min(seen)

    assert most(24) <= most(8) < 16


def test_distances_are_those_to_the_other_images_by_a_plain_loop() -> None:
    images = torch.rand(30, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.adaptive_avg_pool2d(images, 16).double()
    apart = [[float((a - b).square().mean().sqrt()) for b in small] for a in small]
    assert distances(images).tolist() == pytest.approx([sum(row) / 29 for row in apart], rel=1e-5)
    assert diversity(images) == pytest.approx(sum(map(sum, apart)) / 30 / 29, rel=1e-5)


def test_a_value_that_is_not_finite_is_empty_in_the_files_and_no_number_when_read(tmp_path: Path) -> None:
    scores = [Score("a", "x", seed, {"r": value, "s": 1.0}) for seed, value in enumerate((1.5, math.nan))]
    place = Scores(tmp_path, {"a": {"steps": 2}})
    place.begin()
    place.extend(scores, [0, 1])
    place.finish(scores, [0, 1])
    assert "NaN" not in (tmp_path / "scores.jsonl").read_text()
    assert (tmp_path / "scores.csv").read_text() == "row,prompt,seed,r,s\na,x,0,1.5,1.0\na,x,1,,1.0\n"
    (found,) = place.there("a", ["x"], [0, 1], ["r"]).values()
    assert [each.seed for each in found] == [0, 1] and found[0].values == {"r": 1.5} and math.isnan(found[1].values["r"])
    for row, seeds, columns in (("b", [0, 1], ["r"]), ("a", [0], ["r"]), ("a", [0, 1], ["t"])):
        assert not place.there(row, ["x"], seeds, columns)
    assert not Scores(tmp_path, {"a": {"steps": 3}}).there("a", ["x"], [0, 1], ["r"])
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('[1]\nnothing\n{"row": "a"}\n')
    assert place.there("a", ["x"], [0, 1], ["r"])
    write_csv(tmp_path / "none.csv", [])
    assert (tmp_path / "none.csv").read_text() == "row,prompt,seed\n"


def test_the_python_api_has_every_images_scores_and_saves_them(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32))
    given: dict[str, Any] = {"seeds": range(2), "steps": 1, "guidance": 1.0}
    table = cr.evaluate({"base": model}, PROMPTS, "symmetry", **given)
    assert [(each.row, each.prompt, each.seed) for each in table.images] == [("base", p, s) for p in PROMPTS for s in range(2)]
    saved = cr.evaluate({"base": model}, PROMPTS, "symmetry", scores=Scores(tmp_path / "new", {"base": {"model": "mine"}}), **given)
    assert saved == table and [line["scores"] for line in lines(tmp_path / "new")] == [each.values for each in table.images]
