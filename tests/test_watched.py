"""What a run measures on the same prompts and seeds: the numbers of the images it saves, each step once, whatever happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline
from tuned import PROMPTS, SMALL, Killed, gray, tuned

import chainrule as cr
from chainrule.appearance import STATISTICS
from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.prompts import other_half
from chainrule.prompts import prompts as read_prompts
from chainrule.runs import Run


def bright(images: torch.Tensor, prompts: object) -> torch.Tensor:
    return images.mean((1, 2, 3))


def test_the_rows_are_what_the_saved_adapter_makes_of_the_watched_prompts(tmp_path: Path) -> None:
    run = tuned(tmp_path / "run", held_out=bright, updates=4, sample_every=3)  # with a moving average, which is what is saved
    rows = run.watched()
    assert [row["step"] for row in rows] == [0, 3, 4]
    model = cr.load(make_pipeline(dtype=torch.float32))
    for row, other in ((rows[0], model), (rows[-1], model.using(run.adapter))):
        images = other.render(PROMPTS, [0, 1], SMALL["sample_steps"], SMALL["guidance"])
        assert (
            row["prompts"] == PROMPTS
            and row["trained"] == [True, True]
            and set(row["values"]) == {"reward", "held_out", *STATISTICS}
        )
        for name, score in (("reward", gray), ("held_out", bright)):
            assert row["values"][name] == pytest.approx(score(images, PROMPTS).tolist(), rel=1e-4)
        assert row["values"]["edges"] == pytest.approx(STATISTICS["edges"](images).tolist(), abs=1e-3)
    assert run.metrics()[2]["held_out"] == pytest.approx(sum(rows[1]["values"]["held_out"]) / 2, rel=1e-5)


def test_a_killed_run_that_is_resumed_holds_each_step_once(tmp_path: Path) -> None:
    whole = tuned(tmp_path / "whole", updates=5)
    with pytest.raises(Killed):
        tuned(tmp_path / "cut", updates=5, die=4)  # after the grid of update 4, which is lost with it
    assert [row["step"] for row in Run(tmp_path / "cut").watched()] == [0, 1, 2, 3, 4]
    again = tuned(tmp_path / "cut", updates=5, resume=True)
    assert again.watched() == whole.watched()
    longer = tuned(tmp_path / "cut", updates=7, resume=True)
    assert [row["step"] for row in longer.watched()] == list(range(8)) and longer.watched()[:6] == whole.watched()


def test_prompts_of_the_other_half_are_shown_and_measured_before_and_after(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32))
    run = cr.finetune(model, "draft-1", gray, "animals:train", out=tmp_path / "run", **{**SMALL, "updates": 2})
    first, between, last = run.watched()
    unseen = set(read_prompts("animals:test"))
    for row in (first, last):
        assert len(row["prompts"]) == 16 and row["trained"] == [prompt not in unseen for prompt in row["prompts"]]
        assert row["extra"] == 8 and all(len(values) == 16 for values in row["values"].values())
    assert between["prompts"] == first["prompts"][:8] and all(between["trained"])
    assert (run.samples / "unseen.png").is_file() and (run.samples / "unseen-before.png").is_file()
    Run.create(run.folder, run.config, overwrite=True)  # and they are known as a run's own files
    assert not run.watched() and not run.samples.exists()


def test_watched_prompts_are_of_the_config_so_that_a_resumed_run_has_no_others(tmp_path: Path) -> None:
    run = tuned(tmp_path / "run", watch=["an owl"], updates=2)
    assert run.config == FinetuneConfig.read(run.folder / "config.yaml") and run.config.watch == ("an owl",)
    assert run.watched()[0]["prompts"] == ["an owl"] and run.watched()[0]["trained"] == [False]
    with pytest.raises(UserError, match="watch was"):
        tuned(run.folder, updates=3, resume=True)


def test_the_other_half_is_that_of_the_same_split_and_template() -> None:
    assert other_half("animals:train@3 as a photo of {}") == read_prompts("animals:test@3 as a photo of {}")
    assert not set(other_half("animals:train")) & set(read_prompts("animals:train"))
    for source in ("animals", "animals:test", ["a fox"]):
        assert other_half(source) == []


@pytest.mark.heavy
def test_a_rate_that_is_too_high_is_told_from_the_demos(tmp_path: Path) -> None:
    """By four times the demo's rate animals are torn into stripes, which the bundled scorer likes and the report warns of."""
    demo = FinetuneConfig.read(Path(__file__).parents[1] / "examples" / "demo.yaml")
    model, options = cr.load(demo.model), {"method": "draft-lv", "prompts": demo.prompts, "held_out": "hpsv2:tiny"}
    for lr, updates, wanted in ((demo.settings.lr, 20, False), (6e-3, 40, True)):
        settings = demo.settings.model_copy(update={"lr": lr, "updates": updates})
        run = cr.finetune(model, reward="pickscore:tiny", settings=settings, out=tmp_path / f"{lr}", **options)
        assert ("It may be hacking its reward." in (run.folder / "report.html").read_text()) == wanted
