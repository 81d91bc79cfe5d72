"""A few-step student as the model: sampled over its segments, in diffusers too, and trained through its own chain."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

import chainrule as cr
from chainrule.cli.arguments import scale_of
from chainrule.cli.opened import check_adapters, source_of
from chainrule.errors import Note
from chainrule.models import bundled
from chainrule.models.students import facts
from chainrule.settings import Opening

NAME, PROMPTS, SEEDS = "tiny-emoji-4", ["a painting of a fox", "two bees"], [3, 8]


@pytest.fixture(scope="module")
def base() -> cr.Model:
    return cr.load("tiny-emoji")


def test_a_student_by_its_name_or_by_its_folder_is_sampled_over_its_segments(base: cr.Model, tmp_path: Path) -> None:
    """As what it learned: from where its base starts to the ends of its segments, without guidance."""
    student = base.using(NAME)
    first = base.grid(50)[0]
    assert student.grid() == (first, 750, 500, 250, 0) and facts(bundled.student("tiny-emoji"))["steps"] == 4
    assert student.defaults.guidance == 1.0 and base.grid(50) == cr.load("tiny-emoji").grid(50)
    by_folder = base.using(bundled.student("tiny-emoji"))
    assert torch.equal(student.render(PROMPTS, SEEDS), by_folder.render(PROMPTS, SEEDS))
    with pytest.raises(cr.UserError, match="4 segments and makes an image in 4 steps"):
        student.sample(PROMPTS, SEEDS, 8)


def test_its_images_are_those_of_a_plain_pipeline(base: cr.Model) -> None:
    """diffusers' Euler scheduler over the same timesteps, with the student's file loaded by diffusers."""
    student = base.using(NAME)
    ours = student.render(PROMPTS, SEEDS).permute(0, 2, 3, 1).numpy()
    pipe = DiffusionPipeline.from_pretrained(bundled.folder("tiny-emoji"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(bundled.student("tiny-emoji"))
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    timesteps = [int(level) - 1 for level in student.grid()[:-1]]
    theirs = pipe(PROMPTS, timesteps=timesteps, guidance_scale=1.0, generator=generators, output_type="np").images
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_it_is_trained_through_its_own_chain(base: cr.Model, tmp_path: Path) -> None:
    """The same call as for any adapter; its own stays as it is, and the new one is saved by itself and used on top."""
    plans: list[str] = []
    student = base.using(NAME)
    run = cr.finetune(
        student, "draft", lambda images, prompts: -images.mean((1, 2, 3)), PROMPTS, out=tmp_path / "run", steps=3, batch=2, lr=1e-2,
        rank=2, seed=0, on_update=lambda row: plans.append(str(row["step"])),
    )  # fmt: skip
    assert plans == ["1", "2", "3"]
    config = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(cr.UserError, match="solver is 'ddim', but tiny-emoji-4 is sampled by euler"):
        source_of(tmp_path / "run", Opening(solver="ddim"))
    with pytest.warns(Note, match="was trained on top of tiny-emoji-4, which is not on the model here"):
        check_adapters([str(tmp_path / "run")], "tiny-emoji", None)
    check_adapters([NAME, str(tmp_path / "run")], "tiny-emoji", None)
    (tmp_path / "run" / "config.yaml").write_text("job: extension\n")  # of another trainer
    check_adapters([str(tmp_path / "run")], "tiny-emoji", None)
    (tmp_path / "run" / "config.yaml").write_text(config)
    assert NAME in config and "euler" in config
    tuned = base.using(NAME).using(run.folder)
    assert tuned.grid() == student.grid()
    before, after = student.render(PROMPTS, SEEDS), tuned.render(PROMPTS, SEEDS)
    assert float(after.mean()) < float(before.mean())


def test_a_scale_may_change_from_noise_to_image(base: cr.Model) -> None:
    """At every level the adapter answers as at the number that the straight line between the two scales has there."""
    student = bundled.student("tiny-emoji")
    ramp = base.using(student, scale=(0.2, 1.0))
    (band,) = ramp.active.values()
    assert [round(band.at(level), 9) for level in (1000, 750, 500, 0)] == [0.2, 0.4, 0.6, 1.0]
    x = ramp.noise(SEEDS)
    for level in ramp.grid()[:-1]:
        fixed = base.using(student, scale=0.2 + 0.8 * (1 - level / 1000))
        answers = [model.cast()["base"](x, level, model.embed(PROMPTS)) for model in (ramp, fixed)]
        assert torch.allclose(*answers, atol=1e-6)
    constant = base.using(student, scale=(0.7, 0.7)).render(PROMPTS, SEEDS)
    torch.testing.assert_close(constant, base.using(student, scale=0.7).render(PROMPTS, SEEDS), atol=1e-6, rtol=0)


def test_steps_with_an_adapter_on_are_those_of_its_own_chain(base: cr.Model) -> None:
    """All four are as none said; the others are the base's answers, over the student's levels."""
    student = base.using(NAME)
    whole = base.using(NAME, adapter_steps=(0, 4), steps=4).render(PROMPTS, SEEDS)
    assert torch.equal(whole, student.render(PROMPTS, SEEDS))
    early = base.using(NAME, adapter_steps=(0, 2), steps=4)
    (band,) = early.active.values()
    assert [bool(band.at(level)) for level in early.grid()[:-1]] == [True, True, False, False]
    with pytest.raises(cr.UserError, match="first < last <= 4"):
        base.using(NAME, adapter_steps=(0, 5), steps=4)


@pytest.mark.parametrize("given", ['{"prediction": "epsilon"}', '{"steps": "four"}', '{"steps": null}', '{"steps": 0}'])
def test_a_student_that_does_not_say_its_steps_is_one_line(given: str, base: cr.Model, tmp_path: Path) -> None:
    shutil.copytree(bundled.student("tiny-emoji"), tmp_path / "student")
    (tmp_path / "student/student.json").write_text(given)
    with pytest.raises(cr.UserError, match=r"is damaged: its student\.json says that it makes images in"):
        base.using(tmp_path / "student")


@pytest.mark.parametrize("scale", [[0, 1], (0, 1, 2), "0:1", float("nan"), (0.0, float("inf")), None], ids=str)
def test_a_scale_that_is_none_is_refused_where_it_is_given(scale: Any, base: cr.Model) -> None:
    before = dict(getattr(base.network, "peft_config", {}))
    with pytest.raises(cr.UserError, match="must be a finite number, or two"):
        base.using(NAME, scale=scale)
    with pytest.raises(cr.UserError, match="must be a finite number, or two"):
        cr.attach(cr.load("tiny-emoji").pipe, bundled.student("tiny-emoji"), scale=scale)
    gc.collect()
    assert dict(getattr(base.network, "peft_config", {})) == before


@pytest.mark.parametrize("text", ["", "strong", "1:2:3", "nan", "0:inf"])
def test_a_scale_on_the_command_line_is_one_number_or_two(text: str) -> None:
    assert scale_of("0.7") == 0.7 and scale_of("0:1") == (0.0, 1.0)
    with pytest.raises(cr.UserError, match="must be a finite number, or two as in 0:1"):
        scale_of(text)
