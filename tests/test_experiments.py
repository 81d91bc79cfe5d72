"""Tables as data: run once, keyed by what decides their numbers, shown as they were measured."""

from __future__ import annotations

import json
import os

import pytest
import yaml

import chainrule as cr
from chainrule.config import read_config
from chainrule.errors import Note, UserError
from chainrule.experiments import page, runner, tasks
from chainrule.experiments.table import names, read
from chainrule.experiments.unit import units, versions
from chainrule.rewards import parse

TRAINED = """
title: Mine
about: A table of one's own.
source: a paper
seeds: [0]
settings: {model: tiny-emoji, prompts: [a fox], reward: symmetry, updates: 1, batch: 1, sample_steps: 2, rank: 1}
measure: {prompts: [a fox], rewards: [symmetry], seeds: [5, 6], sample_steps: 2}
columns:
  - {title: symmetry, of: symmetry, better: up, digits: 6, published: symmetry}
  - {title: gain, of: symmetry, over: base, digits: 6}
rows:
  base: {task: evaluate}
  "DRaFT-1": {method: draft-1, published: {symmetry: 0.5}}
"""
STEERED = """
title: Steered
task: steer
seeds: [0]
settings: {model: tiny-emoji, over: latent@600, updates: 1, sample_steps: 5, prompts: [a fox], reward: symmetry}
measure: {symmetry: symmetry, CLIP: "100*clip:tiny", moved: "moved:tiny"}
columns: [{title: symmetry, of: symmetry}, {title: before, of: symmetry before}, {title: moved, of: moved}]
rows: {SDO: {gradient: sdo}}
"""


@pytest.fixture
def table(tmp_path):
    """Write a table file, with some of its text replaced, and read it."""

    def written(text=TRAINED, **changes):
        for old, new in changes.items():
            text = text.replace(old, new)
        place = tmp_path / "mine.yaml"
        place.write_text(text)
        return read(place)

    return written


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A root where two tables were run once, by two processes."""
    root = tmp_path_factory.mktemp("experiments")
    for name, text in (("mine", TRAINED), ("steered", STEERED)):
        (root / f"{name}.yaml").write_text(text)
    outcome = runner.run([read(root / "mine.yaml"), read(root / "steered.yaml")], root, jobs=2)
    return root, outcome


def only(units_of, label):
    (found,) = [unit for unit in units_of if unit.label == label]
    return found


def test_a_run_leaves_a_run_folder_named_after_its_key(done):
    root, outcome = done
    assert sorted(outcome.made) == ["DRaFT-1, seed 0", "SDO, seed 0", "base"] and not outcome.failed and not outcome.interrupted
    unit = only(units(read(root / "mine.yaml")), "DRaFT-1")
    folder = root / f"draft-1-0-{unit.key}"
    there = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "experiment.yaml", "adapter"} <= there
    said = yaml.safe_load((folder / "experiment.yaml").read_text())
    assert said["settings"]["updates"] == 1 and said["versions"] == versions() and said["method"] == {"name": "draft", "k": 1}


def test_what_is_done_is_not_run_again(done, monkeypatch):
    monkeypatch.setattr(tasks, "work", lambda *_: pytest.fail("ran again"))
    assert runner.run([read(done[0] / "mine.yaml")], done[0]).made == []


def test_the_page_shows_the_numbers_of_the_evaluation(done):
    root, _ = done
    mine = read(root / "mine.yaml")
    text = page.page([mine], root, "mine.md")
    measured = {}
    for unit in units(mine):
        rows = json.loads((unit.folder(root) / "evaluation.json").read_text())["rows"]
        assert [row["name"] for row in rows] == [unit.label]
        measured[unit.label] = rows[0]["metrics"]["symmetry"]["mean"]
    base, tuned = measured["base"], measured["DRaFT-1"]
    assert f"| base | {base:.6f} | {base:.6f} |" in text
    assert f"| DRaFT-1 | {tuned:.6f} | {tuned - base:+.6f} | 0.5 |" in text and base != tuned
    assert "chainrule experiment mine.yaml" in text and "Seeds 0." in text and "updates 1" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("updates: 1", "updates: 2"), ("rank: 1", "rank: 1, lr: 0.1"), ("reward: symmetry,", "reward: 2*symmetry,"),
        ("[5, 6]", "[5, 7]"), ("seeds: [0]", "seeds: [1]"), ("prompts: [a fox], reward", "prompts: [a cat], reward"),
        ("draft-1,", "draft-2,"),
    ],
)  # fmt: skip
def test_what_decides_the_numbers_is_in_the_key(table, done, old, new):
    before = only(units(table()), "DRaFT-1")
    after = only(units(table(**{old: new})), "DRaFT-1")
    assert before.done(done[0]) and not after.done(done[0]) and before.folder(done[0]) != after.folder(done[0])
    assert "| DRaFT-1 | not run |" in page.page([table(**{old: new})], done[0], "mine.md")


@pytest.mark.parametrize(
    ("old", "new"), [("rank: 1", "rank: 1, memory: keep"), ("DRaFT-1", "another name"), ("digits: 6", "digits: 2")]
)
def test_what_decides_no_number_is_not_in_the_key(table, old, new):
    assert [unit.key for unit in units(table())] == [unit.key for unit in units(table(**{old: new}))]


def test_another_version_is_another_key(table, monkeypatch):
    unit = units(table())[1]
    before = unit.key
    monkeypatch.setattr("chainrule.experiments.unit.versions", lambda: versions() | {"torch": "0"})
    assert unit.key != before


def test_a_file_is_in_the_key_by_what_it_holds_and_not_by_where_it_lies(table, tmp_path):
    text = STEERED.replace("reward: symmetry", "reward: style:tiny:a.png")
    keys = []
    for content in (b"one", b"one", b"two"):
        folder = tmp_path / f"{len(keys)}"
        folder.mkdir()
        (folder / "a.png").write_bytes(content)
        (folder / "mine.yaml").write_text(text)
        (unit,) = units(read(folder / "mine.yaml"))
        assert unit.settings["parts"][0]["reward"] == f"style:tiny:{folder / 'a.png'}"
        keys.append(unit.key)
    assert keys[0] == keys[1] != keys[2]


def test_an_adapter_is_in_the_key_by_what_it_holds_and_not_by_where_it_lies(tmp_path):
    text, keys = TRAINED.replace("task: evaluate", "task: evaluate, adapter: mine"), []
    for inside, content in (("mine/adapter", b"one"), ("mine/adapter", b"one"), ("mine/adapter", b"two"), ("other", b"one")):
        place = tmp_path / f"{len(keys)}" / inside
        place.mkdir(parents=True)
        (place / "pytorch_lora_weights.safetensors").write_bytes(content)
        (tmp_path / f"{len(keys)}" / "mine.yaml").write_text(text)
        unit = only(units(read(tmp_path / f"{len(keys)}" / "mine.yaml")), "base")
        assert unit.settings["adapter"] == (str(tmp_path / f"{len(keys)}/mine") if inside != "other" else "mine")
        keys.append(unit.key)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_number_that_is_none_is_shown_and_a_column_of_nothing_is_noted(table, done):
    """What a file has as null, for JSON knows no NaN."""
    root, _ = done
    unit = only(units(table()), "DRaFT-1")
    place = unit.folder(root) / "evaluation.json"
    before = place.read_text()
    told = json.loads(before)
    told["rows"][-1]["metrics"]["symmetry"] = {"mean": None, "interval": None}
    place.write_text(json.dumps(told))
    try:
        with pytest.warns(Note, match="no run of mine has the numbers symetry; there are .*symmetry"):
            text = page.page([table(**{"of: symmetry, over": "of: symetry, over"})], root, "mine.md")
    finally:
        place.write_text(before)
    assert "| DRaFT-1 | nan |" in text


def test_a_run_cut_in_the_middle_is_taken_up_and_ends_where_an_uncut_one_does(table, tmp_path, monkeypatch):
    mine = table(**{"updates: 1": "updates: 2", "  base: {task: evaluate}\n": "", ", over: base": ""})
    tuned = only(units(mine), "DRaFT-1")
    monkeypatch.setattr(tasks, "SAVE_EVERY", 1)
    assert tasks.work(tuned, tmp_path / "whole")
    real, cut = tasks.finetune, []

    def interrupted(*args, **options):
        def stop(row):
            cut.append(row["step"])
            os.kill(os.getpid(), 2)

        return real(*args, **options, on_update=stop)

    monkeypatch.setattr(tasks, "finetune", interrupted)
    outcome = runner.run([mine], tmp_path / "cut")
    assert outcome.interrupted and outcome.made == [] and cut == [1]
    monkeypatch.setattr(tasks, "finetune", real)
    assert runner.run([mine], tmp_path / "cut").made == ["DRaFT-1, seed 0"]
    whole, resumed = (tuned.folder(tmp_path / name) for name in ("whole", "cut"))
    assert (resumed / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    assert len((resumed / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_steered_row_is_measured_before_and_after(done):
    root, _ = done
    steered_table = read(root / "steered.yaml")
    folder = units(steered_table)[0].folder(root)
    before, after = json.loads((folder / "evaluation.json").read_text())["rows"]
    steered = json.loads((folder / "steered.json").read_text())
    assert after["metrics"]["symmetry"]["mean"] == pytest.approx(steered["rewards"][0], abs=2e-3)  # the picture has 8 bits
    assert before["metrics"]["symmetry"]["mean"] == pytest.approx(steered["rewards_before"][0], abs=2e-3)
    assert f"{after['metrics']['moved']['mean']:.3f}" in page.page([steered_table], root, "mine.md")


def test_steering_that_is_interrupted_is_not_done(table, tmp_path, monkeypatch):
    real = tasks.steer
    monkeypatch.setattr(
        tasks, "steer", lambda *args, **options: real(*args, **options, on_update=lambda _: os.kill(os.getpid(), 2))
    )
    mine = table(STEERED, **{"updates: 1": "updates: 3"})
    outcome = runner.run([mine], tmp_path)
    assert outcome.interrupted and not units(mine)[0].done(tmp_path)


def test_a_reward_of_ones_own_has_a_column_by_the_name_that_the_table_says(tmp_path):
    (tmp_path / "own.py").write_text("def dark(images, prompts):\n    return 1 - images.mean((1, 2, 3))\n")
    text = TRAINED.replace("rewards: [symmetry]", 'rewards: ["own.py:dark", symmetry]').replace(
        "of: symmetry,", 'of: "own.py:dark",'
    )
    (tmp_path / "mine.yaml").write_text(text)
    mine = read(tmp_path / "mine.yaml")
    runner.run([mine], tmp_path / "root")
    unit = only(units(mine), "base")
    found = json.loads((unit.folder(tmp_path / "root") / "evaluation.json").read_text())["rows"][-1]["metrics"]
    assert set(found) == {"own.py:dark", "symmetry", "diversity"}
    assert f"| base | {found['own.py:dark']['mean']:.6f} |" in page.page([mine], tmp_path / "root", "mine.md")


def test_a_measured_reward_that_is_not_there_is_told_before_anything_is_trained(table, tmp_path):
    mine = table(**{"rewards: [symmetry]": "rewards: hpsv2:tny"})
    outcome = runner.run([mine], tmp_path / "root")
    assert outcome.made == [] and all("tny" in reason for reason in outcome.failed.values()) and len(outcome.failed) == 2
    assert not list((tmp_path / "root").glob("*/metrics.jsonl"))


def test_a_row_that_fails_is_reported_and_the_others_go_on(table, tmp_path, monkeypatch):
    def work(unit, root):
        if unit.label == "base":
            raise UserError("no such thing")
        return True

    monkeypatch.setattr(tasks, "work", work)
    outcome = runner.run([table()], tmp_path)
    assert outcome.failed == {"base": "no such thing"} and outcome.made == ["DRaFT-1, seed 0"]


@pytest.mark.parametrize("name", names())
def test_the_package_s_own_tables_can_be_run(name):
    mine = read(name)
    found = units(mine)
    assert {unit.label for unit in found} == set(mine.rows)
    assert name in page.overview({name: mine}, mine.place)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("updates: 1", "updates: 0", "'base' of the table mine: "), ("over: base", "over: bass", "did you mean 'base'?"),
        ("rank: 1", "rnak: 1", "unknown setting 'rnak'; did you mean 'rank'?"), ("title: Mine", "title: [", "not valid YAML"),
        ("title: gain, of: symmetry", "title: gain", "columns.1.of is missing"), ("draft-1,", "draught,", "unknown method"),
        ("seeds: [0]", "seed: [0]", "seed is [0], but"), ("rewards: [symmetry]", "rewards: []", "measure says no rewards"),
        ("seeds: [5, 6]", "seed: [5]", "unknown key of measure 'seed'"), ("reward: symmetry, ", "", "no reward given"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_table_is_one_line(table, old, new, said):
    with pytest.raises(UserError) as caught:
        units(table(**{old: new}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_lists_runs_and_writes(chainrule, done, tmp_path):
    root, _ = done
    listed = chainrule("experiment", "--root", tmp_path)
    assert listed.code == 0 and "methods" in listed.out and "0 of  40 runs done" in listed.out
    again = chainrule("experiment", root / "mine.yaml", "--root", root)
    assert again.code == 0 and "| DRaFT-1 |" in again.out
    written = chainrule("experiment", root / "mine.yaml", "--root", root, "--write", tmp_path / "docs" / "mine.md")
    assert written.code == 0 and "| DRaFT-1 |" in (tmp_path / "docs" / "mine.md").read_text()
    rows = chainrule("experiment", root / "mine.yaml", "--root", tmp_path, "--list")
    assert rows.out.count("not run") == 2


def test_an_unknown_table_is_one_line(chainrule, tmp_path):
    found = chainrule("experiment", "method", "--root", tmp_path)
    assert found.code == 2 and found.err.splitlines()[0].startswith("error: unknown table 'method'; did you mean 'methods'?")


MEASURED = """
title: Measured
seeds: [0, 1]
settings:
  {model: tiny-emoji, prompts: [a fox], reward: symmetry, method: draft-1, updates: 1, batch: 1, sample_steps: 2, rank: 1, lr: 0.1}
measure: {prompts: [a fox], rewards: [symmetry], seeds: [5, 6], sample_steps: 2}
columns: [{title: symmetry, of: symmetry, over: base, digits: 6}, {title: diversity, of: diversity, over: base}]
plot: {x: symmetry, y: diversity}
rows:
  "half of it": {task: evaluate, trained: DRaFT-1, measure: {scale: 0.5}}
  base: {task: evaluate}
  DRaFT-1: {solver: ddpm}
  best of 3: {task: evaluate, measure: {best_of: 3}}
  in a template: {task: evaluate, measure: {template: "a photo of {}"}}
  "base, a cat": {task: evaluate, baseline: "base, a cat", measure: {prompts: [a cat]}}
  "DRaFT-1, a cat": {task: evaluate, trained: DRaFT-1, baseline: "base, a cat", measure: {prompts: [a cat]}}
"""


def test_rows_measure_other_rows_runs_the_best_of_several_and_templates(tmp_path, chainrule):
    (tmp_path / "mine.yaml").write_text(MEASURED)
    mine = read(tmp_path / "mine.yaml")
    outcome = runner.run([mine], tmp_path)
    assert not outcome.failed and len(outcome.made) == 2 + 2 + 2 + 4
    every, model = units(mine), cr.load("tiny-emoji")

    def measured(label, seed=None):
        (unit,) = [unit for unit in every if unit.label == label and unit.seed == seed]
        return json.loads((unit.folder(tmp_path) / "evaluation.json").read_text())["rows"][-1]["metrics"]["symmetry"]["mean"]

    def by_hand(model, prompt, seeds=(5, 6)):
        return float(parse("symmetry")(model.render([prompt] * len(seeds), list(seeds), 2), [prompt] * len(seeds)).mean())

    (run,) = [unit.folder(tmp_path) for unit in every if unit.label == "DRaFT-1" and unit.seed == 1]
    assert read_config(run / "config.yaml").opening.solver == "ddpm"
    assert measured("DRaFT-1", 1) == pytest.approx(by_hand(model.using(run), "a fox"), abs=1e-6)
    assert measured("half of it", 1) == pytest.approx(by_hand(model.using(run, scale=0.5), "a fox"), abs=1e-6)
    assert measured("DRaFT-1, a cat", 1) == pytest.approx(by_hand(model.using(run), "a cat"), abs=1e-6)
    assert measured("in a template") == pytest.approx(by_hand(model, "a photo of a fox"), abs=1e-6)
    best = [max(by_hand(model, "a fox", [3 * seed + k]) for k in range(3)) for seed in (5, 6)]
    assert measured("best of 3") == pytest.approx(sum(best) / 2, abs=1e-6)
    points = page.points(page.Results(mine, tmp_path))
    assert points["base"] == (0, 0) and set(points) == set(mine.rows)
    cat = sum(measured("DRaFT-1, a cat", seed) for seed in (0, 1)) / 2 - measured("base, a cat")
    assert points["DRaFT-1, a cat"][0] == pytest.approx(cat, abs=1e-9)
    drawn = chainrule("experiment", tmp_path / "mine.yaml", "--root", tmp_path, "--plot", tmp_path / "p.png")
    assert drawn.code == 0 and (tmp_path / "p.png").is_file()
    refused = chainrule("experiment", "methods", "--root", tmp_path, "--plot", tmp_path / "q.png")
    assert refused.code == 2 and "must say what it plots" in refused.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("trained: DRaFT-1", "trained: draft-1", "unknown trained row"), ("plot: {x: symmetry", "plot: {x: symetry", "to plot"),
        ('baseline: "base, a cat"', "baseline: nothing", "is compared with"),
        ("trained: DRaFT-1", "trained: base", "unknown trained row"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_there_is_one_line(table, old, new, said):
    with pytest.raises(UserError) as caught:
        units(table(MEASURED, **{old: new}))
    assert said in str(caught.value) and "\n" not in str(caught.value)
