"""Presets hold what the papers' tables say, go under files and options, and run on random weights of their families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from families import CASES
from students import student_file

from chainrule import methods, presets
from chainrule.config import FinetuneConfig, read_config
from chainrule.models import FAMILIES, PUBLISHED

KINDS = {
    "StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux",
}  # fmt: skip
# arXiv:2309.17400, Table 1; arXiv:2505.07477, section 5.2; arXiv:2507.22604, section 4.1.
PAPERS: dict[str, dict[str, Any]] = {
    "draft-small": {"lr": 4e-4, "batch": 4, "updates": 2000, "rank": 8, "weight_decay": 0.1, "schedule": "constant"},
    "draft-large": {"lr": 2e-4, "batch": 16, "updates": 10000, "rank": 32, "weight_decay": 0.1, "schedule": "sqrt"},
    "sdo": {"lr": 4e-4, "batch": 16 * 4, "accumulate": 4, "updates": 1000, "weight_decay": 1e-4, "schedule": "constant"},
    "shortft": {"lr": 5e-5, "batch": 128, "rank": 128, "weight_decay": 0.1, "schedule": "constant"},
}
QUICK = ("draft-small", "flux-80gb")


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_preset_holds_its_numbers(name):
    values = FinetuneConfig.layered(presets.preset(name).options).values()
    both = {"sample_steps": 50, "guidance": 7.5, "dtype": "bfloat16", "solver": "ddim"}
    assert PAPERS[name] | both == {key: values[key] for key in PAPERS[name] | both}
    wanted = {"sdo": {"name": "sdo"}, "shortft": {"name": "shortft", "k": 4}}
    assert values["method"] == wanted.get(name, {"name": "draft-lv", "n": 2})


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_of_a_known_family_and_reads_as_a_config(name):
    preset = presets.preset(name)
    assert preset.family in FAMILIES and preset.family in KINDS and preset.about and preset.source
    assert FinetuneConfig.layered(preset.options).reward is None  # which is the user's to say
    student = preset.options.get("student")
    assert student is None or PUBLISHED[student].pipeline == preset.family
    assert f"`{name}`" in (Path(presets.__file__).parents[3] / "docs" / "finetuning.md").read_text()


def test_a_file_and_options_go_before_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1.0e-3\nsteps: 7\n")  # another spelling of updates
    read = FinetuneConfig.read(file, {"batch": 12}, presets.preset("draft-small").options)
    assert (read.settings.lr, read.settings.updates, read.settings.batch, read.settings.rank) == (1e-3, 7, 12, 8)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.heavy) for n in presets.names()])
def test_a_preset_runs_on_random_weights_of_its_family(name, chainrule, tmp_path):
    preset = presets.preset(name)
    CASES[KINDS[preset.family]].pipe().save_pretrained(tmp_path / "base")
    small = {"model": tmp_path / "base", "size": 16, "updates": 1, "batch": preset.options.get("accumulate", 2), "rank": 2}
    (tmp_path / "prompts.txt").write_text("a fox\n")
    small["prompts"] = tmp_path / "prompts.txt"  # one, so that there is one picture before and one after
    if "student" in preset.options:
        small |= {"student": student_file(tmp_path / "student"), "updates": 4}  # one for each of its stages
    given = [word for key, value in small.items() for word in (f"--{key.replace('_', '-')}", value)]
    answer = chainrule("train", "--preset", name, "--reward", "symmetry", "--sample-every", 0, "--out", tmp_path / "run", *given)
    assert not answer.code, answer.err
    found = read_config(tmp_path / "run" / "config.yaml").values()
    kept = {key: value for key, value in preset.options.items() if key not in (*small, "method")}
    assert {key: found[key] for key in kept} == kept
    assert methods.read(found["method"]) == methods.read(preset.options["method"])
    assert yaml.safe_load((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == small["updates"]
    assert (tmp_path / "run/adapter/README.md").is_file()


def test_presets_are_listed_and_a_wrong_name_is_one_line(chainrule):
    answer = chainrule("train", "--preset", "list")
    assert not answer.code and [line.split()[0] for line in answer.out.splitlines()] == presets.names()
    answer = chainrule("train", "--preset", "draft-smal", "--reward", "symmetry")
    assert answer.code == 2 and "did you mean 'draft-small'" in answer.err and len(answer.err.splitlines()) == 1
