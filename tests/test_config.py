"""A run's config is written and read by one class, says in one line what is wrong in it, and makes the same run again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import chainrule as cr
from chainrule.config import DistillConfig, FinetuneConfig, RunConfig, SteerConfig, read_config
from chainrule.settings import Distillation, Finetuning, Opening, Sampling, Steering

pytestmark = pytest.mark.usefixtures("brief_analysis")
CONFIGS: list[RunConfig] = [
    FinetuneConfig(),
    FinetuneConfig(
        model="owner/name", opening=Opening(dtype="bfloat16", size="64x128", solver="euler"), adapter=("a", "b"), student="hyper",
        method={"name": "shortft", "levels": [762, 502.5], "shortcuts": [[742, 502]]}, reward="2*symmetry", held_out="rotation",
        prompts=("a fox", "été"), settings=Finetuning(updates=4, stage_steps=[1, 3], lr=1e-5, sample_steps=7, guidance=1.5),
    ),
    DistillConfig(prompts="animals", settings=Distillation(student_steps=8, teacher_steps=16, updates=3)),
    SteerConfig(
        adapter=("run",), reward="clip:an angry face", prompts=("", ""), seeds=(3, 5), image=("a.png", "b.png"),
        settings=Steering(over="latent@600", gradient="full", sample_steps=5, bound=0.1, renormalize=False),
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_a_config_is_read_by_the_class_that_wrote_it(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config.text(), encoding="utf-8")
    assert read_config(path) == config
    assert type(config).read(path) == config
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    here_only = ("out", "device", "timeout", "text_encoders", "network", "shards", "compile", "prompt_cache")
    assert list(written) == [name for name in config.flat_fields() if name not in here_only]


# What the versions before this class wrote, in full.
OLD_OPENING = {"model": "sd", "dtype": "float32", "solver": "ddim", "size": 16, "quantize": None}
OLD_TRAINED = OLD_OPENING | {
    "under": ["run"], "student": "its own", "method": {"name": "shortft", "k": 2}, "reward": "symmetry", "held_out": None,
    "prompts": "prompts.txt", "steps": 4, "batch": 2, "accumulate": 1, "lr": 0.05, "schedule": "constant", "weight_decay": 0.1,
    "clip": 1.0, "rank": 2, "ema": 0.0, "kl": 0.0, "sample_steps": 5, "guidance": 2.0, "memory": "recompute", "micro_batch": None,
    "seed": 0, "sample_every": 50, "save_every": 50, "patience": 0, "stage_steps": [2, 2], "plateau": 0, "tracker": "none",
}  # fmt: skip
OLD_DISTILLED = OLD_OPENING | {
    "kind": "student", "prompts": "prompts.txt", "student_steps": 4, "updates": 2, "batch": 2, "starts": 4, "teacher_steps": 8,
    "guidance": 2.0, "lr": 0.001, "clip": 1.0, "rank": 2, "ema": 0.98, "seed": 0, "save_every": 100,
}  # fmt: skip
OLD_STEERED = OLD_OPENING | {
    "kind": "steered", "method": "sdo over weights", "reward": "2*symmetry + rotation", "under": ["run"], "prompts": ["fox"],
    "seeds": [0], "images": ["a.png"], "over": "weights", "gradient": "sdo", "updates": 2, "lr": 0.01, "optimizer": "adam",
    "keep": 0.0, "bound": None, "renormalize": None, "sample_steps": 5, "guidance": 2.0, "rank": 2, "strength": 0.2, "patience": 0,
    "batch": 4, "memory": "recompute",
}  # fmt: skip
OPENING = Opening(solver="ddim", size=16)
OLD = [
    (OLD_TRAINED, FinetuneConfig(
        model="sd", opening=OPENING, adapter=("run",), method={"name": "shortft", "k": 2}, reward="symmetry", prompts="prompts.txt",
        settings=Finetuning(updates=4, batch=2, lr=0.05, rank=2, sample_steps=5, guidance=2.0, stage_steps=[2, 2]))),
    (OLD_DISTILLED, DistillConfig(
        model="sd", opening=OPENING, prompts="prompts.txt",
        settings=Distillation(updates=2, batch=2, starts=4, teacher_steps=8, guidance=2.0, rank=2))),
    (OLD_STEERED, SteerConfig(
        model="sd", opening=OPENING, adapter=("run",), reward="2*symmetry + rotation", prompts=("fox",), seeds=(0,),
        image=("a.png",),
        settings=Steering(over="weights", updates=2, sample_steps=5, guidance=2.0, rank=2))),
]  # fmt: skip


@pytest.mark.parametrize(("values", "config"), OLD, ids=["trained", "distilled", "steered"])
def test_a_config_of_an_earlier_version_is_read(values, config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert read_config(path) == config
    assert type(config).read(path) == config


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (FinetuneConfig, "lrr: 3", "unknown key in config.yaml 'lrr'; did you mean 'lr'?"),
        (FinetuneConfig, "lr: [1]", "lr is [1], but must be a number"),
        (FinetuneConfig, "steps: 0", "steps is 0, but must be at least 1"),
        (FinetuneConfig, "updates: 1.5", "updates is 1.5, but must be a whole number"),
        (FinetuneConfig, "steps: 3\nupdates: 3", "steps and updates are the same key in config.yaml; leave one out"),
        (FinetuneConfig, "under: a\nadapter: b", "under and adapter are the same key in config.yaml; leave one out"),
        (FinetuneConfig, "prompts: [a fox, 3]", "prompts is ['a fox', 3], but must be text"),
        (FinetuneConfig, "adapter: {a: 1}", "adapter is {'a': 1}, but must be a list"),
        (FinetuneConfig, "method: [draft]", "method is ['draft'], but must be a name, or a name with options"),
        (FinetuneConfig, "size: 7", "size is 7, but must be pixels a side, at least 8"),
        (FinetuneConfig, "updates: 4\nstage_steps: [1, 2]", "stage_steps is [1, 2], but must be numbers of at least 1 that sum to"),
        (FinetuneConfig, "kind: steer\nover: latent", "kind is 'steer'; this config is for chainrule steer"),
        (SteerConfig, "kind: student", "kind is 'distill'; this config is for chainrule distill"),
        (SteerConfig, "model: sd\nunder: []\nstudent: null", "kind is 'finetune'; this config is for chainrule train"),
        (SteerConfig, "seeds: 3", "seeds is 3, but must be a list"),
        (DistillConfig, "kind: nothing", "kind is 'nothing', but must be 'distill'"),
        (DistillConfig, "steps: 12", "teacher_steps is 20, but must be at least twice the student's 12 steps"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_names_the_key(kind, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    with pytest.raises(cr.UserError) as error:
        kind.read(Path("config.yaml"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_value_given_beside_a_file_takes_the_place_of_the_file_s_in_either_spelling(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 20\nbatch: 2\n")
    assert FinetuneConfig.read(path, {"updates": 3}).settings == Finetuning(updates=3, batch=2)
    assert FinetuneConfig.read(path, {"steps": 4}).settings == Finetuning(updates=4, batch=2)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Finetuning, "updates"), (Distillation, "student_steps"), (Steering, "sample_steps"), (Sampling, "sample_steps")],
)
def test_steps_is_a_second_spelling_and_never_beside_the_first(kind, name):
    assert kind(steps=5) == kind(**{name: 5})
    with pytest.raises(cr.UserError, match=f"steps and {name} are the same option; leave one out"):
        kind(**{"steps": 5, name: 5})


@pytest.mark.parametrize(
    "line", ["train --steps 3 --updates 3", "steer fox --sample-steps 3 --steps 3", "distill x --steps 3 --student-steps 3"]
)
def test_both_spellings_on_the_command_line_are_refused(line, chainrule):
    found = chainrule(*line.split())
    assert found.code == 2 and "are the same option; leave one out" in found.err and found.err.count("\n") == 1


def test_settings_and_their_options_together_are_refused():
    with pytest.raises(cr.UserError, match="settings and the option lr are both given"):
        cr.distill(None, Distillation(), out="nowhere", lr=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [2.0, 0.5, 1 / 3, 1e-9 / 7, 12345678.9])
def test_a_reward_is_recorded_with_its_exact_weight(weight):
    reward = weight * cr.rewards.Symmetry() + weight * cr.rewards.Target(cr.rewards.RotationalAnticorrelation(), weight)
    assert cr.rewards.parse(reward.name) == reward


# The same run again


@pytest.fixture
def workplace(sd_folder, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("sd").symlink_to(sd_folder)
    Path("prompts.txt").write_text("a fox\ntwo bees\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save("photo.png")
    return tmp_path


def weights(folder: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(folder, "adapter").rglob("*.safetensors"))
    return {f"{path.parent.name}/{key}": value for path in files for key, value in load_file(path).items()}


STRICT = {
    "lr: true": "lr is True, but must be a number", "updates: '1'": "updates is '1', but must be a whole number",
    "stage_steps: [1, true]": "stage_steps is", "lr: 1e-3\nlr: 2e-3": "the key lr is there twice, again on line 2",
    "reward: 2024-13-45": "is not valid YAML: month must be in 1..12", "reward: 2024-01-01": "but must be text",
    "reward: [symmetry]": "reward is ['symmetry'], but must be text", "model: {name: sd}": "but must be text",
    "x: " + "[" * 9999: "nested too deeply", "{a: b}: 1": "is not valid YAML",
    "seed: 18446744073709551616": "seed is 18446744073709551616",
    "prompts: ['']": "prompt 1 of the list is blank", "method: {name: 3}": "method is",
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), STRICT.items(), ids=[text[:20] for text in STRICT])
def test_a_config_that_says_something_else_than_it_seems_to_is_one_line(text, said, tmp_path, chainrule):
    """YAML keeps the last of two equal keys, and true is a number to it."""
    path = tmp_path / "c.yaml"
    path.write_text(text if "reward" in text else f"{text}\nreward: symmetry\n")
    found = chainrule("train", path, "--out", tmp_path / "run")
    assert found.code == 2 and said in found.err and found.err.count("\n") == 1, found.err
    assert not (tmp_path / "run").exists()


def test_numbers_as_yaml_reads_them_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-3\nclip: 1\nkl: 1_0\nbatch: 0x10\n")
    settings = FinetuneConfig.read(path).settings
    assert (settings.lr, settings.clip, settings.kl, settings.batch) == (1e-3, 1.0, 10.0, 16)


TRAIN = "train --model sd --reward symmetry --prompts prompts.txt --batch 2 --sample-steps 3 --guidance 2 --rank 2 --lr 0.05 "


def test_train_and_distill_make_the_run_of_a_config_again(workplace, chainrule):
    lines = {
        "first": TRAIN + "--method sdo --updates 2",
        "above": TRAIN.replace("prompts.txt", "animals:train") + "--method drtune --method-option k=2 --method-option m=1 "
        "--adapter first --steps 2 --schedule sqrt --held-out rotation",
        "student": "distill sd --prompts prompts.txt --updates 2 --batch 2 --starts 2 --teacher-steps 8 --rank 2 --guidance 2",
        "staged": TRAIN.replace("--sample-steps 3", "--sample-steps 5") + "--student student --steps 3 "
        "--method shortft --method-option k=2",
    }  # fmt: skip
    for name, line in lines.items():
        made = chainrule(*line.split(), "--out", name)
        assert made.code == 0, made.err
        again = chainrule(line.split()[0], f"{name}/config.yaml", "--out", f"again/{name}")
        assert again.code == 0, again.err
        assert Path(f"again/{name}/config.yaml").read_text() == Path(f"{name}/config.yaml").read_text()
        whole, other = weights(name), weights(f"again/{name}")
        assert whole and list(whole) == list(other) and all(torch.equal(whole[key], other[key]) for key in whole)
    assert cr.Run("staged").config.settings == Finetuning(
        updates=3, batch=2, sample_steps=5, guidance=2.0, rank=2, lr=0.05, stage_steps=[2, 1]
    )


def test_steer_makes_the_run_of_a_config_again(workplace, chainrule):
    assert chainrule(*(TRAIN + "--method draft-1 --steps 1 --out trained").split()).code == 0
    common = "--reward 2*symmetry-rotation --sample-steps 4 --updates 2 --lr 0.05"
    lines = {
        "latents": f"steer fox bee --model sd --seeds 2 --first-seed 3 --guidance 2 {common}",
        "pictured": f"steer --model trained --image photo.png --over weights --rank 2 {common}",
    }
    for name, line in lines.items():
        made = chainrule(*line.split(), "--out", name)
        assert made.code == 0, made.err
        again = chainrule("steer", f"{name}/config.yaml", "--out", f"again/{name}")
        assert again.code == 0, again.err
        assert Path(f"again/{name}/config.yaml").read_text() == Path(f"{name}/config.yaml").read_text()
        assert Path(f"again/{name}/steered.json").read_text() == Path(f"{name}/steered.json").read_text()
        whole, other = weights(name), weights(f"again/{name}")
        assert list(whole) == list(other) and all(torch.equal(whole[key], other[key]) for key in whole)
    assert cr.Run("pictured").config.adapter == ("trained",) and weights("pictured")
    assert cr.Run("pictured").config.settings.guidance == 2.0  # as the run it is put on top of was trained
