"""The command line: bad input is one line that names the value, and writes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import words


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with wrong things in it, entered; a model that is loaded is a failure."""
    files = {
        "empty.txt": b"",
        "binary.txt": b"\x89PNG\xff\xfe\x00",
        "two.txt": b"a fox\na cat\n",
        "list.yaml": b"- steps\n- 3\n",
        "broken.yaml": b"steps: [3\nreward: {",
        "binary.yaml": b"\x89\xff\xfe",
        "unknown.yaml": b"reward: symmetry\nout: runs/x\nlrr: 3\n",
        "number.yaml": b"reward: 3\nout: runs/x\n",
        "method.yaml": b"reward: symmetry\nout: runs/x\nmethod: {name: draft, kk: 3}\n",
        "methods.yaml": b"reward: symmetry\nout: runs/x\nmethod: [draft]\n",
        "full/notes.txt": b"do not delete",
        "run/config.yaml": b"model: tiny-emoji\nreward: symmetry\n",
        "run/environment.json": b"{}",
        "other/config.yaml": b"model: somebody/model\nreward: symmetry\n",
        "bare/config.yaml": b"model: tiny-emoji\n",
        "torn/config.yaml": b"model: [tiny",
        "sd/model_index.json": b'{"_class_name": "AudioLDMPipeline"}',
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model is loaded before the input was checked")

    monkeypatch.setattr(importlib.import_module("chainrule.models.loading"), "load", load)
    return tmp_path


TRAIN = "train --reward symmetry --out runs/x "
BAD = {
    # names, with the nearest one
    TRAIN + "--model tiny-emojy": "unknown model 'tiny-emojy'; did you mean 'tiny-emoji'?",
    "train --reward pikscore --out runs/x": "unknown reward 'pikscore'; did you mean 'pickscore'?",
    TRAIN + "--held-out 'symmetry + astetic'": "unknown reward 'astetic'; did you mean 'aesthetic'?",
    TRAIN + "--method dratf": "unknown method 'dratf'; did you mean 'draft'?",
    TRAIN + "--prompts animels": "unknown prompt set 'animels'; did you mean 'animals'?",
    "plan dratf": "unknown method 'dratf'; did you mean 'draft'?",
    "sample tiny-emojy --prompts fox": "unknown model 'tiny-emojy'; did you mean 'tiny-emoji'?",
    # options of a method
    TRAIN + "--method sdo --method-option q=3": "unknown option of sdo 'q' (known: late, samples)",
    TRAIN + "--method sdo --method-option sampels=3": "did you mean 'samples'?",
    TRAIN + "--method draft --method-option k": "'k' must look like k=5",
    TRAIN + "--method draft --method-option =3": "'=3' must look like k=5",
    TRAIN + "--method draft --method-option k=[": "'k=[' must look like k=5",
    TRAIN + "--method draft --method-option k=many": "option k of draft is 'many'",
    TRAIN + "--method draft-5 --sample-steps 3": "k is 5, but must be between 1 and 3",
    TRAIN + "--method refl --sample-steps 10": "m is 20, but must be between 1 and 10",
    "plan drtune --steps 4": "k is 5, but must be between 1 and 4",
    "plan sdo --method-option samples=51": "samples is 51, but must be between 1 and 50",
    "plan draft-²": "unknown method 'draft-²'",
    # settings
    TRAIN + "--steps 0": "steps is 0, but must be at least 1",
    TRAIN + "--rank 0": "rank is 0, but must be at least 1",
    TRAIN + "--lr=-1": "lr is -1.0, but must be greater than 0",
    TRAIN + "--lr nan": "lr is nan, but must be a finite number",
    TRAIN + "--schedule sqr": "schedule is 'sqr', but must be 'constant' or 'sqrt'",
    TRAIN + "--batch 8 --accumulate 3": "accumulate is 3, but must divide the batch of 8",
    TRAIN + "--tracker comet": "tracker is 'comet', but must be",
    TRAIN + "--patience 3": "patience needs a held-out reward to watch; pass --held-out",
    "train --out runs/x": "no reward given; pass --reward",
    "train --reward symmetry": "no out given; pass --out",
    "train --reward '' --out runs/x": "no reward given; pass --reward",
    # the config file
    "train missing.yaml": "the config file missing.yaml does not exist",
    "train full": "the config file full does not exist",
    "train list.yaml": "the config file list.yaml must hold keys and values",
    "train broken.yaml": "the config file broken.yaml is not valid YAML",
    "train binary.yaml": "the config file binary.yaml is not valid YAML",
    "train unknown.yaml": "unknown key in unknown.yaml 'lrr'; did you mean 'lr'?",
    "train number.yaml": "reward is 3, but must be text",
    "train method.yaml": "unknown option of draft 'kk'; did you mean 'k'?",
    "train methods.yaml": "method is ['draft'], but must be a name",
    # prompts
    TRAIN + "--prompts missing.txt": "the prompt file missing.txt does not exist",
    TRAIN + "--prompts empty.txt": "empty.txt holds no prompts",
    TRAIN + "--prompts binary.txt": "the prompt file binary.txt is not text",
    "sample tiny-emoji --prompts binary.txt": "the prompt file binary.txt is not text",
    TRAIN
    + "--prompts 'animals as paintings'": "the template 'paintings' of 'animals as paintings' must say where the subject goes",
    TRAIN + "--prompts animals:test@one": "the seed 'one' of 'animals:test@one' must be a whole number",
    "sample tiny-emoji --prompts missing.csv:Prompts": "the prompt file missing.csv does not exist",
    "sample tiny-emoji --prompts ' '": "a prompt is empty",
    "eval run --prompts empty.txt": "empty.txt holds no prompts",
    # places
    "train --reward symmetry --out full": "full is not empty; pass resume to continue it, overwrite, or another out",
    "train --reward symmetry --out full --overwrite": "will not overwrite full: it does not look like a run",
    "train --reward symmetry --out full --resume": "full is not a run folder: it has no config.yaml",
    "train --reward symmetry --out run --resume --overwrite": "resume and overwrite were both asked for run",
    "train --reward symmetry --out two.txt/run": "two.txt is a file, so two.txt/run cannot be a folder",
    "sample tiny-emoji --prompts fox --out two.txt": "two.txt is a file",
    "mix run=1 --out two.txt": "two.txt is a file",
    "mix other=1 --out run": "run is a run with an adapter of its own; choose another out",
    # numbers
    "sample tiny-emoji --prompts fox --seeds 0": "seeds is 0, but must be at least 1",
    "sample tiny-emoji --prompts fox --steps 0": "steps is 0, but must be at least 1",
    "eval run --seeds 0": "seeds is 0, but must be at least 1",
    "plan sdo --steps 0": "steps is 0, but must be at least 1",
    "sample tiny-emoji --prompts fox --seeds 99999999999999999999": "seeds is 99999999999999999999, but must be at most",
    "sample tiny-emoji --prompts fox --first-seed 18446744073709551616": "a seed is 18446744073709551616",
    "sample tiny-emoji --prompts fox --scale nan": "scale is nan, but must be a finite number",
    "sample tiny-emoji --prompts fox --scale 0.3": "--scale and --adapter-steps are of an adapter, and there is none",
    "sample tiny-emoji --prompts fox --adapter-steps 0 2": "--scale and --adapter-steps are of an adapter, and there is none",
    TRAIN + "--rank 1000000": "rank is 1000000, but must be at most 4096",
    TRAIN + "--updates 99999999999999999999": "updates is 99999999999999999999, but must be at most",
    TRAIN + "--seed 18446744073709551616": "seed is 18446744073709551616, but must be at most",
    "mix run=0 --out both": "'run=0' gives a weight of 0; leave it out",
    "train --reward 0*symmetry --out x": "can be multiplied by a number other than 0, not by 0.0",
    "train --reward 1e999*symmetry --out x": "can be multiplied by a number other than 0, not by inf",
    "train --reward 'symmetry - symmetry' --out x": "the weights of the reward 'symmetry' add up to 0",
    "train --reward 'symmetry->1e999' --out x": "is to reach 1e999, which is no finite number",
    # models, runs and adapters
    TRAIN + "--model two.txt": "two.txt is a file",
    TRAIN + "--model full": "full is not a diffusers folder: it has no model_index.json",
    TRAIN + "--model run": "run is a run; give its model, and the run as --adapter",
    TRAIN + "--model sd": "AudioLDMPipeline is not a supported model family",
    "sample run --prompts fox": "no adapter at 'run'",
    "sample torn --prompts fox": "torn/config.yaml is not valid YAML",
    "sample tiny-emoji --prompts fox --adapter full": "no adapter at 'full'",
    "sample tiny-emoji --prompts fox --adapter two.txt": "two.txt is not a safetensors file",
    "eval full": "full is not a run folder",
    "eval run": "no adapter at 'run'",
    "eval run --reward pikscore": "unknown reward 'pikscore'; did you mean 'pickscore'?",
    "eval run other": "other was trained from somebody/model, not from tiny-emoji",
    "eval bare": "bare does not say its reward; pass --reward",
    "report missing": "no run folder at missing",
    "report full": "full holds nothing of a run",
    # parts of a mix
    "mix run --out both": "'run' must look like runs/pick=0.6",
    "mix run= --out both": "'run=' must look like runs/pick=0.6",
    "mix =0.5 --out both": "'=0.5' must look like runs/pick=0.6",
    "mix run=much --out both": "'run=much' must look like runs/pick=0.6",
    "mix run=nan --out both": "'run=nan' must look like runs/pick=0.6",
    "mix run=0.5 --out both --kohya x.pt": "kohya is 'x.pt', but must end in .safetensors",
    "sample tiny-emoji --prompts fox --adapter hyper-sdxl-4": "hyper-sdxl-4 is for StableDiffusionXLPipeline",
    "sample tiny-emoji --prompts fox --adapter hyper-sd15-4 --solver dpm++": "hyper-sd15-4 is sampled by ddim; leave",
    TRAIN + "--method shortft --student hyper-flux-8": "hyper-flux-8 is for FluxPipeline",
    "mix run=0.5 --out both": "no adapter at 'run'",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_line_naming_the_value_and_writes_nothing(line, message, chainrule, workplace):
    before = contents(workplace)
    found = chainrule(*words(line))
    assert found.err.startswith("error: ")
    assert message in found.err
    assert found.err.count("\n") == 1
    assert found.err.endswith("\n")
    assert (found.code, found.out) == (2, "")
    assert contents(workplace) == before


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (TRAIN + "--lrr 3", "--lrr"),
        (TRAIN + "--steps many", "--steps"),
        ("trian", "trian"),
        ("sample tiny-emoji", "--prompts"),
        ("mix --out both", "parts"),
    ],
)
def test_a_usage_error_names_the_word_and_is_no_traceback(line, value, chainrule, workplace):
    before = contents(workplace)
    found = chainrule(*words(line))
    assert found.code == 2
    assert value in found.err.lower()
    assert "Traceback" not in found.err
    assert contents(workplace) == before


def test_a_tracker_that_is_not_installed_is_said_before_a_model_is_loaded(chainrule, workplace, monkeypatch):
    monkeypatch.setattr("chainrule.settings.find_spec", lambda name: None)
    found = chainrule(*words(TRAIN + "--tracker wandb"))
    assert found.err == "error: the tracker 'wandb' is not installed; pip install wandb\n"


def test_a_prompt_longer_than_a_file_name_is_a_prompt(chainrule, workplace):
    found = chainrule("sample", "tiny-emojy", "--prompts", "a very long fox " * 40)
    assert "unknown model 'tiny-emojy'" in found.err


def test_the_module_runs_and_its_mistake_is_one_line(tmp_path):
    command = [sys.executable, "-m", "chainrule", "plan", "dratf"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert re.fullmatch(r"error: unknown method 'dratf'; did you mean 'draft'\?.*\n", found.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method draft-60", "k is 60, but must be between 1 and 50"),  # the model's own number of steps
        ("--sample-steps 1001", "steps is 1001, but must be between 1 and 1000"),
        ("--dtype flota32", "dtype is 'flota32', but must be"),
    ],
)
def test_what_only_the_model_knows_is_still_said_before_anything_is_written(options, message, sd_folder, chainrule, tmp_path):
    found = chainrule(*f"train --model {sd_folder} --reward symmetry --out {tmp_path / 'run'} {options}".split())
    assert found.code == 2
    assert "Traceback" not in found.err
    assert found.err.splitlines()[-1].startswith(f"error: {message}")  # after the bars of what was loaded
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --reward symmetry --out x --method shortft --student nowhere/at/all", "no student at 'nowhere/at/all'"),
        ("train --reward symmetry --out x --method draft-1 --student runs", "does not jump by a student"),
        ("train --reward symmetry --out x --method shortft --sample-steps 3", "k is 4, but must be between 1 and 3"),
        ("train --reward symmetry --out x --method shortft --method-option k=30", "k is 30, but must be between 1 and 20"),
        ("train --reward symmetry --out x --adapter nowhere", "no adapter at 'nowhere'"),
        ("distill tiny-emoji --out x --teacher-steps 5", "teacher_steps is 5"),
        ("distill nowhere --out x", "unknown model 'nowhere'"),
        ("analyze shortcut tiny-emoji --student nowhere/at/all", "no student at"),
        ("plan shortft --stage 9", "shortft has 4 stages"),
    ],
)  # fmt: skip
def test_bad_input_around_students_is_one_line_before_a_model_is_loaded(arguments, message, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chainrule.models.loading.load", lambda *_, **__: pytest.fail("loaded a model"))
    found = chainrule(*arguments.split())
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1 and not list(tmp_path.iterdir()), found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("steer --reward symmetry", "nothing to steer"),
        ("steer fox", "no reward given"),
        ("steer fox --reward symmtry", "unknown reward 'symmtry'"),
        ("steer fox --reward symmetry --gradient sod", "unknown gradient 'sod'"),
        ("steer fox --reward symmetry --over nothing", "over is 'nothing'"),
        ("steer fox --reward symmetry --bound 0", "bound is 0"),
        ("steer fox --reward symmetry --keep 1.5", "keep is 1.5"),
        ("steer fox --reward symmetry --seeds 0", "seeds is 0"),
        ("steer fox --reward symmetry --image gone.png", "no image 'gone.png'"),
        ("steer fox bee --reward symmetry --image a.png --image b.png --image c.png", "2 prompts but 3 images"),
        ("steer fox --style gone.png", "no style picture 'gone.png'"),
        ("steer fox --reward symmetry --model nowhere", "unknown model 'nowhere'"),
        ("steer fox --reward symmetry --solver dmp", "unknown solver 'dmp'"),
        ("analyze picard tiny-emoji --reward symmtry", "unknown reward 'symmtry'"),
        ("analyze gradients nowhere/at/all", "no reward given"),
        ("analyze gradients tiny-emoji --batches 0", "batches is 0"),
    ],
)  # fmt: skip
def test_bad_input_to_steering_is_one_line_before_a_model_is_loaded(arguments, message, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("chainrule.models.loading.load", lambda *_, **__: pytest.fail("loaded a model"))
    found = chainrule(*arguments.split())
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1 and not list(tmp_path.iterdir()), found.err
