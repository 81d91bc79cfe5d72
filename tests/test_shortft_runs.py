"""Runs of ShortFT: killed and resumed, stages, saved and loaded, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file
from students import PROMPTS, SEEDS, student_file
from torch import Tensor

import chainrule as cr
from chainrule.adapters.files import read
from chainrule.methods import DRaFT, ShortFT, needs
from chainrule.models.loras import read as read_lora
from chainrule.models.students import resolve

SMALL = {"steps": 7, "batch": 2, "lr": 5e-3, "rank": 2, "sample_steps": 5, "guidance": 2.0, "save_every": 2, "sample_every": 0}


def gray(images: Tensor, prompts: object) -> Tensor:
    return -(images - 0.2).square().mean((1, 2, 3))


def tuned(folder: Path, student: Path, method: ShortFT | None = None, **options) -> cr.Run:
    net = cr.load(make_pipeline(dtype=torch.float32)).with_student(student)
    return cr.finetune(net, method or ShortFT(k=3), gray, ["a fox", "a cat"], out=folder, **{**SMALL, **options})


class Killed(Exception):
    pass


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"stage_steps": [2, 4, 1]}, {"plateau": 1, "lr": 1.0}], ids=str)
def test_killed_and_resumed_over_a_stage_is_the_uninterrupted_run(tmp_path, options):
    student = student_file(tmp_path / "student", torch.float32)
    whole = tuned(tmp_path / "whole", student, **options)

    def die(row: dict) -> None:
        if row["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        tuned(tmp_path / "cut", student, on_update=die, **options)
    cut = tuned(tmp_path / "cut", student, resume=True, **options)
    first, second = (load_file(run.folder / "checkpoints/step-000007/state.safetensors") for run in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(whole.metrics()) == strip(cut.metrics())
    turns = [row["stage"] for row in whole.metrics()]
    assert turns == sorted(turns) and turns[-1] > 1
    if not options:
        assert turns == [1, 1, 1, 2, 2, 3, 3]
    if "stage_steps" in options:
        assert turns == [1, 1, 2, 2, 2, 2, 3]


def test_a_stage_trains_its_own_adapters_and_leaves_the_earlier_ones_as_they_are(tmp_path):
    run = tuned(tmp_path / "run", student_file(tmp_path / "student", torch.float32), save_every=1, stage_steps=[5, 1, 1])
    states = {step: load_file(run.checkpoint(step) / "state.safetensors") for step in (6, 7)}
    for name, moved in (("lora1", False), ("lora2", False), ("lora3", True)):
        keys = [key for key in states[6] if key.startswith(f"weight/{name}/") and "lora_B" in key]
        assert keys and any(not torch.equal(states[6][key], states[7][key]) for key in keys) == moved


def test_a_run_is_one_folder_with_its_levels_and_loads_back(tmp_path):
    run = tuned(tmp_path / "run", student_file(tmp_path / "student", torch.float32))
    bands = json.loads((run.adapter / "bands.json").read_text())
    grid = cr.load(make_pipeline(dtype=torch.float32)).grid(5)
    assert {n: [tuple(s) for s in b["levels"]] for n, b in bands.items()} == {
        n: list(s) for n, s in needs(ShortFT(k=3), grid).adapters.items()
    }
    fresh = cr.load(make_pipeline(dtype=torch.float32))
    base = fresh.render(PROMPTS, SEEDS, 5, 2.0)
    with_run = fresh.using(run.folder)
    assert not torch.equal(with_run.render(PROMPTS, SEEDS, 5, 2.0), base)
    assert torch.equal(fresh.using(run.folder, scale=0).render(PROMPTS, SEEDS, 5, 2.0), base)
    with pytest.raises(cr.UserError, match="levels of their own"):
        fresh.using(run.folder, adapter_steps=(1, 3), steps=5)
    with pytest.raises(cr.UserError, match="several adapters"):
        cr.mix({run.folder: 1.0})


def test_a_student_in_kohyas_spelling_is_the_same_student(tmp_path):
    """As published few-step LoRAs are: lora_down, lora_up and a layer's own alpha."""
    folder = student_file(tmp_path / "student", torch.float32)
    renamed = {}
    for key, value in read(folder).tensors.items():
        layer, _, part = key.partition(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        renamed[f"{name}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value.contiguous()
        renamed[f"{name}.alpha"] = torch.tensor(2.0)  # the rank: scale 1
    save_file(renamed, tmp_path / "kohya.safetensors")
    found = []
    for source in (folder, tmp_path / "kohya.safetensors"):
        net = cr.load(make_pipeline(dtype=torch.float32)).with_student(source)
        found.append(net.guided(2.0).cast()["student"](net.noise(SEEDS), 500, net.embed(PROMPTS)))
    assert torch.equal(*found)
    halved = read_lora(tmp_path / "kohya.safetensors", "StableDiffusionPipeline").tensors
    save_file({k: v * 0.5 if k.endswith("alpha") else v for k, v in renamed.items()}, tmp_path / "half.safetensors")
    for key, value in read_lora(tmp_path / "half.safetensors", "StableDiffusionPipeline").tensors.items():
        torch.testing.assert_close(value, halved[key] * (0.5 if ".lora_B." in key else 1.0))


@pytest.mark.parametrize("method", [ShortFT(k=2, shared=True), ShortFT(k=2, stage=1), ShortFT(k=2, depth=2)], ids=str)
def test_the_ablations_run(tmp_path, method):
    run = tuned(tmp_path / "run", student_file(tmp_path / "student", torch.float32), method, steps=3, save_every=0)
    fresh, names = cr.load(make_pipeline(dtype=torch.float32)), json.loads((run.adapter / "bands.json").read_text())
    assert list(names) == (["shared"] if method.shared else ["lora1", "lora2"])
    tuned_images = fresh.using(run.folder).render(PROMPTS, SEEDS, 5, 2.0)
    assert not torch.equal(tuned_images, fresh.render(PROMPTS, SEEDS, 5, 2.0))
    with pytest.raises(cr.UserError, match="has no call"):
        fresh.using(run.folder).render(PROMPTS, SEEDS, 1, 2.0)


def test_tuning_the_student_itself_is_draft_on_the_model_with_the_student_on(tmp_path):
    net = cr.load(make_pipeline(dtype=torch.float32)).using(student_file(tmp_path / "student", torch.float32))
    run = cr.finetune(
        net, DRaFT(), gray, ["a fox"], out=tmp_path / "run", **{**SMALL, "guidance": 1.0, "sample_steps": 4, "steps": 2}
    )
    assert len(run.metrics()) == 2


def test_stages_that_do_not_fit_are_refused_before_anything_is_written_or_overwritten(tmp_path):
    student = student_file(tmp_path / "student", torch.float32)
    done = tuned(tmp_path / "run", student, steps=3)
    for options, said in (({"steps": 2}, "has 3 stages"), ({"stage_steps": [3, 4]}, "2 lengths")):
        with pytest.raises(cr.UserError, match=said):
            tuned(tmp_path / "run", student, overwrite=True, **options)
    assert (done.adapter / "bands.json").exists()
    with pytest.raises(cr.UserError, match="stage_steps was"):  # equal shares would move
        tuned(tmp_path / "run", student, resume=True, steps=9)


def test_a_student_that_is_missing_or_does_not_fit_gets_one_line(tmp_path, sd_folder):
    net = cr.load(make_pipeline(dtype=torch.float32))
    with pytest.raises(cr.UserError, match="by student, and the members are base, unguided; give the model one"):
        cr.finetune(net, ShortFT(k=2), gray, ["a fox"], out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()
    with pytest.raises(cr.UserError, match="no student at"):
        resolve(tmp_path / "nowhere", str(sd_folder))
    with pytest.raises(cr.UserError, match="no student of its own"):
        resolve(None, str(sd_folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(cr.UserError, match="expected a LoRA"):
        resolve(tmp_path / "empty", str(sd_folder))
    other = make_pipeline(dtype=torch.float32)
    other.scheduler.register_to_config(prediction_type="v_prediction")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(cr.UserError, match="predicts v_prediction"):
        resolve(tmp_path / "other", str(sd_folder))
    other.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(cr.UserError, match="cross_attention_dim is 16"):
        resolve(tmp_path / "unet", "tiny-emoji")
    lora = student_file(tmp_path / "lora", torch.float32)
    resolve(lora, str(sd_folder))
    with pytest.raises(cr.UserError, match="another model"):
        resolve(lora, "tiny-emoji")
