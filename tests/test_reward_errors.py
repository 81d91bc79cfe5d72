"""What is said when a reward, its sources or its files are wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from reward_models import ALL, PROMPTS, SIZE, random_images

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.rewards import checked, parse, probe, reward_of


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean((2, 3)), r"'bad' must return .* \(2,\), but it returned shape \(2, 3\)"),
        (lambda images, prompts: images.mean(), r"returned shape \(\)"),
        (lambda images, prompts: 0.5, "returned 0.5"),
        (lambda images, prompts: images.sum((1, 2, 3)).long(), "returned torch.int64"),
        (lambda images, prompts: images.sum((1, 2, 3)) / 0, "'bad' returned .*inf.*; it must be finite"),
        (lambda images, prompts: (images.sum((1, 2, 3)) * -1).log(), "'bad' returned .*nan"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "no gradient to the pixels; compute it from"),
        (lambda images, prompts: images.round().mean((1, 2, 3)), "no gradient to the pixels"),
        (lambda images, prompts: (images * 0).sqrt().sum((1, 2, 3)) + images.mean(), "is not finite; look for sqrt"),
        (lambda images, prompts: images @ torch.ones(7), "'bad' fails on 16x16 images: RuntimeError"),
    ],
)
def test_probe_refuses_broken_rewards(function: rewards.RewardFunction, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        probe(reward_of(function, name="bad"), 16)
    assert "\n" not in str(caught.value)


def test_checked_wants_a_prompt_per_image() -> None:
    with pytest.raises(UserError, match=r"2 images but 1 prompts"):
        checked(rewards.Symmetry(), torch.rand(2, 3, 8, 8), [""])


def test_bad_sources_are_refused_before_anything_is_loaded(models: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no safetensors weights in"):
        rewards.PickScore(str(pickled))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for make in (rewards.CLIPScore, rewards.PickScore, rewards.SigLIP, rewards.Safe, rewards.Concepts, rewards.Aesthetic):
        with pytest.raises(UserError, match=r"refusing.*pickled weights.*convert them to safetensors"):
            make(str(pickled))
        said = "no file" if make is rewards.Aesthetic else "refusing"  # LAION publishes its head as a .pth
        with pytest.raises(UserError, match=rf"{said} .*HPS_v2_compressed.pt"):
            make("HPS_v2_compressed.pt")
        with pytest.raises(UserError, match=r"no folder '.*absent'"):
            make(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"is a file; give the folder"):
        rewards.CLIPScore(str(models / "clip" / "model.safetensors"))
    with pytest.raises(UserError, match=r"no config\.json in"):
        rewards.CLIPScore(str(models / "aesthetic"))
    with pytest.raises(UserError, match=r"is not an aesthetic head"):
        rewards.Aesthetic(str(models / "clip"), clip=str(models / "clip")).to("cpu")


def _refused(make: Callable[[], object]) -> str:
    """What a UserError says in one line."""
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class _Loud:
    """What a pickle can hold: its opening would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_official_files_that_are_something_else_are_refused(models: Path, tmp_path: Path) -> None:
    hps, reader = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "ImageReward.pt"
    for file, kind in ((hps, rewards.HPSv21), (reader, rewards.ImageReward)):
        assert f"no file {str(file)!r}" in _refused(lambda kind=kind, file=file: kind(str(file)))
        file.write_bytes(b"not a checkpoint")
        assert "cannot read the weights" in _refused(partial(kind(str(file)).to, "cpu"))
        torch.save({"state_dict": {"weight": _Loud(tmp_path / "ran")}}, file)
        assert "cannot read the weights" in _refused(partial(kind(str(file)).to, "cpu"))
        assert not (tmp_path / "ran").exists()
        torch.save([torch.zeros(1)], file)
        assert "not a dictionary of tensors" in _refused(partial(kind(str(file)).to, "cpu"))
        torch.save({"weight": torch.zeros(1)}, file)
        assert re.search("is not an (open_clip|ImageReward) checkpoint: it has no '", _refused(partial(kind(str(file)).to, "cpu")))
    state = torch.load(models / "hps21" / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    torch.save(state, hps)
    assert "cannot tell how many heads a tower 32 wide has; say it" in _refused(lambda: rewards.HPSv21(str(hps)).to("cpu"))
    shutil.copy(models / "hps21" / "config.json", tmp_path)
    torch.save({**state, "ln_final.weight": torch.zeros(5)}, hps)
    assert "does not fit" in _refused(lambda: rewards.HPSv21(str(hps)).to("cpu"))
    torch.save(state, hps)  # whole, but with no tokenizer beside it and no hub
    assert "cannot load a tokenizer from 'laion/" in _refused(lambda: rewards.HPSv21(str(hps)).to("cpu"))


def test_a_folder_of_another_model_is_not_filled_with_random_numbers(models: Path) -> None:
    """transformers would, with a warning."""
    clip = str(models / "clip")
    for reward in (rewards.SigLIP(clip), rewards.CLIPScore(str(models / "siglip")), rewards.Safe(clip), rewards.Concepts(clip)):
        assert re.search("does not hold|cannot load|is not a", _refused(partial(reward.to, "cpu")))
    assert "is a clip, not an OWL-ViT" in _refused(lambda: rewards.Detection("a cat", clip).to("cpu"))


def test_offline_every_published_model_is_missed_in_one_line() -> None:
    needs = {"directional": ":a face to a sad face", "classifier": ":dog", "detect": ":a cat", "area": ":a cat"}
    free = {"filesize", "process", "symmetry", "rotation", "compressible", "incompressible", "diversity", "style", "lpips"}
    for name in {*rewards.REGISTRY} - free:
        assert re.search("cannot load|the hub does not give", _refused(partial(parse(name + needs.get(name, "")).to, "cpu")))


def test_a_reward_has_a_place_that_exists() -> None:
    inner = rewards.PickScore("tiny")
    assert "device is like cpu, cuda or cuda:1, not 'gpu'" in _refused(lambda: rewards.On(inner, "gpu"))
    assert "dtype is float32, bfloat16, float16, not 'int8'" in _refused(lambda: rewards.On(inner, "cpu", "int8"))
    assert "cannot be moved as a whole" in _refused(lambda: rewards.On(inner + rewards.Symmetry(), "cpu"))
    assert "no device 'cuda:77'" in _refused(lambda: rewards.On(inner, "cuda:77").to("cpu"))
    assert "reads images of shape (b, 3, h, w), got (3, 8, 8)" in _refused(lambda: checked(inner, torch.rand(3, 8, 8), [""] * 3))
    assert "got (2, 4, 8, 8)" in _refused(lambda: checked(rewards.Symmetry(), torch.rand(2, 4, 8, 8), ["", ""]))


def test_tiny_means_the_bundled_folders(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("chainrule.rewards.clip.BUNDLED", tmp_path)
    with pytest.raises(UserError, match=r"bundled reward weights are missing"):
        rewards.PickScore("tiny")
    monkeypatch.setattr("chainrule.rewards.clip.BUNDLED", models)
    images = random_images(SIZE, SIZE, 3)
    for name in ("pickscore", "hpsv2", "aesthetic", "clip"):
        reward = parse(f"{name}:tiny")
        assert reward.name == f"{name}:tiny"
        torch.testing.assert_close(reward(images, PROMPTS), ALL[name](models)(images, PROMPTS))
