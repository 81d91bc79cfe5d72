"""The comparison of models: intervals against Student's t by hand, pairing, seeds, diversity, and the page that shows it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from pipelines import make_pipeline

import chainrule as cr
from chainrule.config import FinetuneConfig
from chainrule.estimate import Estimate
from chainrule.evaluate import Table, diversity, evaluate
from chainrule.prompts import SETS
from chainrule.rewards import Symmetry, reward_of
from chainrule.runs import Run

PROMPTS = ["a fox", "two bees", "a cat"]
CHEAP = {"seeds": [0, 5], "steps": 3, "guidance": 2.0}

# Two-sided 95% points of Student's t from printed tables, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 20: 2.086, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 1000: 1.962}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def models():
    """A base model and the same with an adapter that is not the identity."""
    base = cr.load(make_pipeline("v_prediction", torch.float32))
    adapter = base.adapt(rank=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.3)
    stored = adapter.weights()
    base.active.clear()
    adapter.remove()
    return {"base": base, "tuned": base.using(stored)}


@pytest.fixture(scope="module")
def table(models):
    return evaluate(models, PROMPTS, [brightness, Symmetry()], **CHEAP)


def test_an_estimate_is_the_t_interval_by_hand():
    # mean 5; squared deviations 9 + 1 + 1 + 9 = 20, over 3; t(3) = 3.182
    found = Estimate.of([2.0, 4.0, 6.0, 8.0])
    assert found.mean == 5.0
    assert found.interval == pytest.approx(3.182 * math.sqrt(20 / 3) / 2, rel=2e-3)
    assert str(Estimate(0.12345, 0.0021)) == "0.1235 ± 0.0021"


@pytest.mark.parametrize("freedom", STUDENT)
def test_the_interval_of_any_number_of_values_is_students(freedom):
    values = [(-1.0) ** i for i in range(freedom + 1)]
    n, mean = len(values), sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert Estimate.of(values).interval == pytest.approx(STUDENT[freedom] * spread, rel=3e-3)


def test_equal_values_have_no_spread_and_one_value_no_interval():
    assert Estimate.of([0.5] * 7) == Estimate(0.5, 0.0)
    assert Estimate.of([0.5]) == Estimate(0.5, math.inf)


def test_rows_are_the_rewards_of_the_images_of_these_seeds(models, table):
    for name, model in models.items():
        images = model.render([p for p in PROMPTS for _ in range(2)], [0, 5] * 3, 3, 2.0)
        by_prompt = images.mean((1, 2, 3)).view(3, 2).mean(1).tolist()
        expected = Estimate.of(by_prompt)
        assert table.rows[name]["brightness"].mean == pytest.approx(expected.mean, rel=1e-5)
        assert table.rows[name]["brightness"].interval == pytest.approx(expected.interval, rel=1e-3)
        pairs = [diversity(part) for part in images.split(2)]
        assert table.rows[name]["diversity"].mean == pytest.approx(sum(pairs) / 3, rel=1e-4)


def test_gains_are_paired_by_prompt(models, table):
    before, after = (
        model.render([p for p in PROMPTS for _ in range(2)], [0, 5] * 3, 3, 2.0).mean((1, 2, 3)).view(3, 2).mean(1)
        for model in models.values()
    )
    assert table.gains.keys() == {"tuned"}
    gain = table.gains["tuned"]["brightness"]
    assert abs(gain.mean) > 1e-4  # the adapter does something
    assert gain.interval == pytest.approx(Estimate.of((after - before).tolist()).interval, rel=1e-3)
    for column, value in table.gains["tuned"].items():
        difference = table.rows["tuned"][column].mean - table.rows["base"][column].mean
        assert value.mean == pytest.approx(difference, abs=1e-7)


def test_a_model_gains_nothing_on_itself(models):
    twice = evaluate({"one": models["base"], "two": models["base"]}, PROMPTS, [brightness], **CHEAP)
    assert twice.rows["one"] == twice.rows["two"]
    assert all(gain == Estimate(0.0, 0.0) for gain in twice.gains["two"].values())


def test_the_batch_size_changes_nothing(models, table):
    other = evaluate(models, PROMPTS, [brightness], batch=4, **CHEAP)
    assert other.rows["tuned"]["brightness"].mean == pytest.approx(table.rows["tuned"]["brightness"].mean, rel=1e-5)


def test_one_seed_has_no_diversity_and_progress_counts_network_calls(models):
    calls = []
    found = evaluate({"base": models["base"]}, PROMPTS, [brightness], seeds=[0], steps=3, guidance=2.0, batch=2,
                     on_call=lambda: calls.append(1))  # fmt: skip
    assert found.rows["base"].keys() == {"brightness"}
    assert len(calls) == 3 * 2  # three steps of two batches
    assert not found.gains


def test_diversity_of_identical_images_is_zero_and_of_black_and_white_one():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(image.expand(3, -1, -1, -1)) == 0.0
    assert diversity(torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])) == pytest.approx(1.0)
    # three images: distances 0, 1, 1
    assert diversity(torch.stack([torch.zeros(3, 32, 32)] * 2 + [torch.ones(3, 32, 32)])) == pytest.approx(2 / 3)
    with pytest.raises(cr.UserError, match="two seeds"):
        diversity(image)


def test_a_prompt_set_may_be_named(models, monkeypatch):
    monkeypatch.setitem(SETS, "animals", lambda: ["a fox", "a cat"])
    assert evaluate({"base": models["base"]}, "animals", [brightness], **CHEAP).prompts == ["a fox", "a cat"]


def test_the_saved_table_has_the_reports_form_and_the_page_shows_it(table, tmp_path):
    run = Run.create(tmp_path / "run", FinetuneConfig(model="tiny", reward="brightness"))
    saved = json.loads(table.save(run.folder / "evaluation.json").read_text())
    assert saved["prompts"] == PROMPTS
    assert [row["name"] for row in saved["rows"]] == ["base", "tuned"]
    for row in saved["rows"]:
        assert row.keys() == {"name", "metrics"}
        for metric, value in row["metrics"].items():
            assert value == {"mean": table.rows[row["name"]][metric].mean, "interval": table.rows[row["name"]][metric].interval}
    assert saved["gains"].keys() == {"brightness", "symmetry", "diversity"}
    assert saved["gains"]["brightness"]["mean"] == table.gains["tuned"]["brightness"].mean
    page = cr.report(run.folder).read_text()
    assert all(word in page for word in ("brightness", "symmetry", "Diversity", "two bees"))


def test_an_infinite_interval_is_null_in_the_file_and_absent_from_the_page(models, tmp_path):
    one = evaluate({"base": models["base"]}, ["a fox"], [brightness], **CHEAP)
    assert one.rows["base"]["brightness"].interval == math.inf

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    saved = json.loads(one.save(tmp_path / "evaluation.json").read_text(), parse_constant=refuse)
    assert saved["rows"][0]["metrics"]["brightness"]["interval"] is None
    assert saved["gains"] == {}
    assert not re.search(r"\binf\b|Infinity|NaN", cr.report(tmp_path).read_text())


def test_the_printed_table_has_a_line_per_model_and_gain():
    one, two = {"score": Estimate(1.0, 0.1)}, {"score": Estimate(1.5, 0.2)}
    table = Table(["a fox"], {"base": one, "tuned": two}, {"tuned": {"score": Estimate(0.5, 0.05)}})
    assert str(table).splitlines() == [
        "model            score",
        "base             1 ± 0.1",
        "tuned            1.5 ± 0.2",
        "  gain of tuned  0.5 ± 0.05",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "at least one model"),
        ({"rewards": []}, "one reward"),
        ({"seeds": []}, "one seed"),
        ({"prompts": []}, "holds no prompts"),
        ({"prompts": "animels"}, "did you mean 'animals'"),
        ({"rewards": [brightness, brightness]}, "'brightness'"),
        ({"rewards": [reward_of(brightness, name="diversity")]}, "'diversity'"),
        ({"rewards": [3]}, "a reward is a function"),
        ({"rewards": [lambda images, prompts: images.mean()]}, "shape"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -1.0}, "guidance is -1"),
    ],
)
def test_bad_input_is_one_line(models, change, message):
    given = {"models": {"base": models["base"]}, "prompts": PROMPTS, "rewards": [brightness], **CHEAP} | change
    with pytest.raises(cr.UserError, match=message) as caught:
        evaluate(given.pop("models"), given.pop("prompts"), given.pop("rewards"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("models", "said"),
    [(["base"], "models is list"), ({"a": "runs/a"}, "the model 'a' is 'runs/a', which makes no images"), ("x", "models is str")],
)
def test_models_that_are_none_are_one_line(models: object, said: str) -> None:
    with pytest.raises(cr.UserError, match=said):
        cr.evaluate(models, ["a fox"], "symmetry", seeds=[0])
    with pytest.raises(cr.UserError, match="and a batch of one"):
        cr.evaluate({}, ["a fox"], "symmetry", batch=0)
