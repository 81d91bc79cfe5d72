"""What a table shows of numbers that are there, and what is measured on steered images."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from chainrule.experiments import measures, page, tasks
from chainrule.experiments.table import read
from chainrule.experiments.unit import units
from chainrule.rewards.classifier import load_classifier
from chainrule.tiny.scenes import FACES

TABLE = """
title: Numbers
settings: {model: tiny-emoji, reward: symmetry, updates: 7}
measure: {rewards: [symmetry]}
columns:
  - {title: gain, of: score, over: base, better: down, digits: 2, published: score}
  - {title: share, of: score, over: SDO, show: share, digits: 1}
  - {title: wins, of: score, over: SDO, show: wins}
  - {title: pace, of: pace, digits: 1}
  - {title: updates, of: updates, digits: 0}
sort: gain
rows:
  base: {task: evaluate}
  SDO: {method: sdo, recorded: {pace: 2.5}, published: {gain: 0.3}}
  ReFL: {method: refl}
  "a | b": {method: drtune}
"""
SCORES = {"base": {None: 1.0}, "SDO": {0: 3.0, 1: 4.0, 2: 5.0}, "ReFL": {0: 2.0, 1: 8.0}, "a | b": {}}


@pytest.fixture
def results(tmp_path):
    """A table with made-up results, and its root."""
    (tmp_path / "numbers.yaml").write_text(TABLE)
    table = read(tmp_path / "numbers.yaml")
    for unit in units(table):
        if unit.seed in SCORES[unit.label]:
            folder = unit.folder(tmp_path)
            folder.mkdir()
            row = {"name": unit.label, "metrics": {"score": {"mean": SCORES[unit.label][unit.seed], "interval": None}}}
            (folder / "evaluation.json").write_text(json.dumps({"rows": [row]}))
    return page.Results(table, tmp_path)


def test_cells_are_means_over_seeds_with_student_s_interval(results):
    lines = {line.split(" | ")[0][2:]: line for line in page.section(results).splitlines() if line.startswith("| ")}
    half = 4.30 / math.sqrt(3)  # t of two degrees of freedom; the standard deviation of 2, 3, 4 is 1
    assert lines["SDO"] == f"| SDO | +3.00 ± {half:.2f} |  |  | 2.5 | 7 | 0.3 |"
    # over the two seeds both have: SDO's mean 3.5 over ReFL's 5, and one of two above
    apart = 12.71 * math.sqrt(18) / math.sqrt(2)
    assert lines["ReFL (2 of 3 seeds)"] == f"| ReFL (2 of 3 seeds) | +4.00 ± {apart:.2f} | 70.0% | 1 of 2 |  | 7 |  |"
    assert lines["base"] == "| base | 1.00 |  |  |  |  |  |"  # its own value; it shares no seed with SDO
    assert lines[r"a \| b"] == r"| a \| b | not run |  |  |  |  |  |"


def test_the_best_row_stands_first_and_what_was_not_run_last(results):
    labels = [line.split(" | ")[0][2:] for line in page.section(results).splitlines() if line.startswith("| ")]
    assert labels[2:] == ["base", "SDO", "ReFL (2 of 3 seeds)", r"a \| b"]  # the lower the better


@pytest.fixture(scope="module")
def faces():
    model = tasks.load("tiny-faces")
    names = list(FACES)[:2]
    return names, model.render(names, [0, 1], 4)


def test_what_did_not_move_has_not_moved_and_is_itself(faces):
    names, images = faces
    pair = measures.Pair(images, images, names)
    assert torch.allclose(measures.moved(pair, "tiny"), torch.zeros(2), atol=1e-5)
    turned = measures.Pair(images, images.flip(0), names)
    assert (measures.moved(turned, "tiny") > 1e-3).all()


def test_misled_is_what_the_classifier_says(faces):
    _, images = faces
    network = load_classifier("tiny")
    for label in network.labels[:3]:
        said = [network.labels[i] == label for i in network(images).argmax(1).tolist()]
        assert measures.misled(measures.Pair(images, images, ["", ""]), f"tiny:{label}").tolist() == [
            0.0 if s else 100.0 for s in said
        ]


def test_the_frechet_distance_to_one_s_own_tiles_is_zero_and_to_a_shift_its_square(faces, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 3, 8, 8, generator=generator)
    sheet = (images.view(3, 4, 3, 8, 8).permute(0, 3, 1, 4, 2).reshape(24, 32, 3) * 255).round()
    Image.fromarray(sheet.to(torch.uint8).numpy()).save(tmp_path / "sheet.png")
    tiles = (images * 255).round() / 255
    offset = torch.tensor([3.0, 4.0] + [0.0] * 8)
    monkeypatch.setattr(measures, "_embeddings", lambda seen, source: seen.flatten(1)[:, :10])
    assert measures.frechet(tiles, f"tiny:8:{tmp_path}/sheet.png", directions=10) == pytest.approx(0, abs=1e-2)
    monkeypatch.setattr(measures, "_embeddings", lambda seen, source: seen.flatten(1)[:, :10] + offset * (seen is moved))
    moved = tiles.clone()
    # equal covariances: the squared distance of the means, 25, times 1000
    assert measures.frechet(moved, f"tiny:8:{tmp_path}/sheet.png", directions=10) == pytest.approx(25_000, rel=1e-3)


def test_the_student_as_the_model_starts_where_the_base_does_and_ends_with_its_segments():
    base, source = tasks._model({"model": "tiny-emoji"})
    student, _ = tasks._model({"model": "tiny-emoji", "adapter": "tiny-emoji-4"})
    assert source == "tiny" and student.grid() == (base.grid(50)[0], 750, 500, 250, 0)


def test_a_reward_in_units_of_before_is_one_in_size_before_steering():
    model, reward = tasks.load("tiny-emoji"), tasks.Symmetry()
    part, how = {"prompts": ["a fox", "a cat"], "seeds": [3, 4]}, {"sample_steps": 5, "guidance": 3.0}
    images = model.render(part["prompts"], part["seeds"], 5, 3.0)
    size = float(reward(images, part["prompts"]).mean())
    scaled = tasks._in_units(model, reward, {"unit": "before", "settings": how}, part)
    assert float(scaled(images, part["prompts"]).mean()) == pytest.approx(size / abs(size), rel=0.01)  # pictures have 8 bits
    assert tasks._in_units(model, reward, {"unit": "one", "settings": how}, part) is reward


def test_a_cost_is_measured(tmp_path):
    place = tmp_path / "cost.yaml"
    place.write_text(
        'title: Cost\ntask: cost\nsettings: {model: tiny-faces, prompts: [""], sample_steps: 3, rounds: 1}\n'
        "columns: [{title: s, of: seconds}, {title: MiB, of: MiB}]\nrows: {SDO: {gradient: sdo}, full: {gradient: full}}\n"
    )
    found = {}
    for unit in units(read(place)):
        assert tasks.work(unit, tmp_path)
        found[unit.label] = page.numbers(unit, tmp_path)
    for row in found.values():
        assert row["beyond sampling"] == pytest.approx(row["seconds"] - row["sampling"])
    assert 0 < found["SDO"]["MiB"] <= found["full"]["MiB"]


def test_a_setting_that_all_seeds_share_has_no_interval():
    """Three times 0.006 has a mean that is off by its last bit."""
    assert page._shown([0.006, 0.006, 0.006], 3) == "0.006" and page._shown([1.0, 3.0], 1) == "2.0 ± 12.7"
