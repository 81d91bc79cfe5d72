"""Training from the command line on a folder of every family, and the adapter in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from families import CASES, PROMPTS, SEEDS, Case, images_of, said, shaken
from safetensors.torch import load_file
from torch import Tensor

import chainrule as cr
from chainrule.models import attach
from chainrule.size import config_size

pytestmark = pytest.mark.usefixtures("brief_analysis")
METHODS = ["draft-lv", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("shortft", "drtune", "sdo"))]
OPTIONS = {"drtune": ["--method-option", "k=2", "--method-option", "m=2"], "shortft": ["--method-option", "k=2"]}


@dataclass(frozen=True)
class Place:
    """A family's folder with a student for it, a LoRA on its layers; the model it loads as, and the images of that."""

    case: Case
    folder: Path
    model: cr.Model
    bare: Tensor


@pytest.fixture(scope="module", params=CASES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    case, folder = CASES[request.param], tmp_path_factory.mktemp(request.param)
    pipe = case.pipe()
    pipe.save_pretrained(folder / "model")
    shaken(cr.load(pipe, size=case.size), "student").save(folder / "student")
    model = cr.load(folder / "model", size=case.size)
    return Place(case, folder, model, model.render(said(case), SEEDS, 4, case.guidances[-1]))


@pytest.mark.heavy
def test_a_student_is_distilled_from_every_family_and_lies_in_its_own_keys(place: Place, tmp_path: Path) -> None:
    case, model = place.case, place.model
    small: dict[str, Any] = {"updates": 1, "batch": 1, "starts": 2, "teacher_steps": 8, "rank": 2, "guidance": case.guidances[-1]}
    if model.solver.stochastic:
        with pytest.raises(cr.UserError, match="draws noise on the way; take the solver ddim"):
            cr.distill(model, out=tmp_path / "run", prompts=PROMPTS, **small)
        model = model.solving("ddim")
    run = cr.distill(model, out=tmp_path / "run", prompts=PROMPTS, **small)
    keys = load_file(run.adapter / "pytorch_lora_weights.safetensors").keys()
    assert keys and all(key.startswith(f"{model.component}.") for key in keys)
    student = place.model.with_student(run.folder).members["student"]
    assert student is not None and student(model.noise(SEEDS), 500, model.embed(said(case))).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_two_updates_and_the_adapter_in_plain_diffusers(
    method: str, place: Place, tmp_path: Path, chainrule: Callable[..., Any]
) -> None:
    case, folder, run = place.case, place.folder, tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = str(tmp_path / "prompts.txt")
    words = ["train", "--model", str(folder / "model"), "--method", method, *OPTIONS.get(method, []), "--reward", "symmetry"]
    words += ["--prompts", prompts, "--steps", "2", "--batch", "2", "--sample-steps", "4", "--rank", "2", "--lr", "0.05"]
    words += ["--guidance", str(case.guidances[-1]), "--out", str(run), "--sample-every", "0"]
    words += ["--size", str(config_size(case.size))] if case.size else []
    words += ["--student", str(folder / "student")] if method == "shortft" else []
    found = chainrule(*words)
    assert found.code == 0, found.err

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["method"] and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    weights = [load_file(file) for file in sorted((run / "adapter").rglob("pytorch_lora_weights.safetensors"))]
    assert all(any(t.any() for key, t in each.items() if "lora_B" in key) for each in weights), "nothing was learned"
    trained = place.model.using(run).render(said(case), SEEDS, 4, case.guidances[-1])
    plain = DiffusionPipeline.from_pretrained(folder / "model")
    plain.set_progress_bar_config(disable=True)
    if method != "shortft" and hasattr(plain, "load_lora_weights"):
        plain.load_lora_weights(run / "adapter", weight_name="pytorch_lora_weights.safetensors")
    else:
        attach(plain, run)
    theirs = images_of(case.run(plain, PROMPTS, SEEDS, case.guidances[-1], 4, output_type="np"))
    np.testing.assert_allclose(theirs, trained.permute(0, 2, 3, 1).numpy(), atol=2e-5)
    assert not torch.allclose(place.bare, trained, atol=1e-4)
