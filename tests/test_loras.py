"""LoRA files: written by diffusers, in kohya's spelling, published few-step ones, and what is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import CASES, PROMPTS, SEEDS, images_of, loaded, shaken
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import chainrule as cr
from chainrule.denoise import guidance_is_input
from chainrule.guidance import CFG
from chainrule.models import PUBLISHED
from chainrule.models.published import HUB, local

LOADERS = ("sd", "lcm", "sdxl", "sd3", "flux")


HEADERS: dict[str, dict[str, Any]] = {
    "one scale": {}, "patterns": {"alpha_pattern": {"to_v": 7.0}, "rank_pattern": {"to_q": 3}}, "rslora": {"use_rslora": True},
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", LOADERS)
def test_a_lora_that_diffusers_saved_is_read(name: str, header: str, tmp_path: Path) -> None:
    """Scale other than 1, layers that we do not train, and what the header says of some of them."""
    case = CASES[name]
    pipe, guidance = case.pipe(), case.guidances[-1]
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    network = getattr(pipe, part)
    network.add_adapter(
        LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False, **HEADERS[header]),
        "default",
    )
    theirs = images_of(case.run(pipe, PROMPTS, SEEDS, guidance, 3, output_type="np"))
    metadata = {f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict()}
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(network)}
    type(pipe).save_lora_weights(tmp_path, **layers, **metadata)
    ours = loaded(case, case.pipe()).using(tmp_path).render(PROMPTS, SEEDS, 3, guidance)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_kohyas_spelling_there_and_back(name: str, tmp_path: Path, chainrule: Any) -> None:
    """Written by `mix --kohya`, read by diffusers and by ourselves; alpha is not the rank."""
    case = CASES[name]
    model = loaded(case)
    adapter = model.adapt("mine", rank=4, alpha=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    expected = model.render(PROMPTS, SEEDS, 3, 3.0)
    adapter.save(tmp_path / "own")
    file = tmp_path / "kohya" / "mine.safetensors"
    done = chainrule("mix", f"{tmp_path / 'own'}=1", "--out", tmp_path / "mixed", "--kohya", file)
    assert done.code == 0, done.err
    assert all(key.startswith("lora_unet_") for key in load_file(file))
    plain = case.pipe()
    plain.load_lora_weights(file.parent, weight_name=file.name)
    theirs = images_of(case.run(plain, PROMPTS, SEEDS, 3.0, 3, output_type="np"))
    np.testing.assert_allclose(expected.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)
    torch.testing.assert_close(loaded(case).using(file).render(PROMPTS, SEEDS, 3, 3.0), expected, rtol=0, atol=2e-5)


def test_layers_of_different_rank_and_scale_are_one_adapter(tmp_path: Path) -> None:
    """Kohya's files may give every layer its own. Against the products added to the weights by hand."""
    weights, kohya = shaken(loaded(CASES["sd"])).weights(), {}
    merged = CASES["sd"].pipe()
    modules = dict(merged.unet.named_modules())
    for i, layer in enumerate(weights.targets):
        rank, alpha, name = 1 + i % 3, 0.5 + i % 2, f"lora_unet_{layer.replace('.', '_')}"
        down, up = (weights.tensors[f"{layer}.lora_{part}.weight"] for part in "AB")
        down, up = torch.cat([down, down])[:rank].contiguous(), torch.cat([up, up], 1)[:, :rank].contiguous()
        modules[layer].weight.data += alpha / rank * up @ down
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
    save_file(kohya, tmp_path / "odd.safetensors")
    theirs = images_of(CASES["sd"].run(merged, PROMPTS, SEEDS, 3.0, 3, output_type="np"))
    ours = loaded(CASES["sd"]).using(tmp_path / "odd.safetensors").render(PROMPTS, SEEDS, 3, 3.0)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)


FAMILY = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}


@pytest.mark.parametrize("name", HUB)
def test_a_published_adapter_is_sampled_as_its_authors_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scheduler, scale, steps and guidance in the plain pipeline; random weights, and a hub of one file."""
    known = PUBLISHED[name]
    case = CASES[FAMILY[known.pipeline]]
    model = loaded(case)
    file = shaken(model).save(tmp_path) / "pytorch_lora_weights.safetensors"
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repository, file_name: asked.append((repository, file_name)) or file
    )
    model = loaded(case).using(name)
    assert set(asked) == {tuple(known.where.split(":"))} and model.base_adapters == (name,)
    ours = model.render(PROMPTS, SEEDS)

    pipe = case.pipe()
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pipe.fuse_lora(lora_scale=known.scale)
    kinds = {"ddim": "DDIMScheduler", "lcm": "LCMScheduler", "tcd": "TCDScheduler", "euler": "EulerDiscreteScheduler"}
    if known.solver:
        pipe.scheduler = getattr(diffusers, kinds[known.solver]).from_config(
            pipe.scheduler.config, **{"clip_sample": False} | dict(known.settings)
        )  # fmt: skip
    eta = {"eta": 0.3} if known.solver == "tcd" else {}
    theirs = images_of(case.run(pipe, PROMPTS, SEEDS, known.guidance, known.steps, output_type="np", **eta))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=5e-5)


def test_a_published_one_is_for_its_family_and_is_a_student_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sd3"]
    with pytest.raises(cr.UserError, match="hyper-sdxl-4 is for StableDiffusionXLPipeline"):
        loaded(case).using("hyper-sdxl-4")
    file = shaken(loaded(case)).save(tmp_path) / "pytorch_lora_weights.safetensors"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file_name: file)
    student = loaded(case).with_student("hyper-sd3-4").members["student"]
    assert student is not None and student.guidance == CFG(3.0)
    assert [band.scale for band in student.active.bands.values()] == [0.125]


def test_a_latent_consistency_network_is_a_student_that_is_told_its_guidance(tmp_path: Path) -> None:
    CASES["lcm"].pipe().unet.save_pretrained(tmp_path)
    model = loaded(CASES["sd"]).with_student(tmp_path)
    x, words = model.noise(SEEDS), model.embed(PROMPTS)
    own = loaded(CASES["lcm"]).guided(model.defaults.guidance).cast()["base"]
    torch.testing.assert_close(model.guided(4.0).cast()["student"](x, 500, words), own(x, 500, words), rtol=0, atol=1e-6)
    with pytest.raises(cr.UserError, match="made for another model"):
        loaded(CASES["sdxl"]).with_student(tmp_path)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_student_may_be_a_file_of_a_networks_weights(name: str, tmp_path: Path) -> None:
    """SDXL-Lightning's UNets are that."""
    case = CASES[name]
    other = case.pipe(seed=5)
    network = getattr(other, "unet", None) or other.transformer
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "whole.safetensors")
    model = loaded(case).with_student(tmp_path / "whole.safetensors")
    x, words = model.noise(SEEDS), model.embed(PROMPTS)
    found = model.guided(4.0).cast()["student"](x, 500, words)
    scale = model.defaults.guidance if guidance_is_input(model.denoiser) else 1.0
    expected = loaded(case, other).guided(scale).cast()["base"](x, 500, words)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    broken = {key: value[:1] for key, value in network.state_dict().items()}
    save_file({key: value.contiguous() for key, value in broken.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(cr.UserError, match="cannot load the student"):
        loaded(case).with_student(tmp_path / "broken.safetensors")


def test_what_is_no_lora_for_the_denoiser_is_refused_in_one_line(tmp_path: Path) -> None:
    model, ones = loaded(CASES["sd"]), torch.ones(2, 2)
    files = {
        "text": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ones}, "adapts a text encoder too"),
        "other": (
            {"unet.nowhere.to_q.lora_A.weight": ones, "unet.nowhere.to_q.lora_B.weight": ones.clone()},
            "no layer nowhere.to_q",
        ),
        "strange": ({"something": ones}, "no LoRA that StableDiffusionPipeline can load|holds no LoRA"),
    }
    for name, (tensors, message) in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(cr.UserError, match=message):
            model.using(tmp_path / f"{name}.safetensors")
    halves = {"bias": ("lora_B.bias", "with biases"), "half": ("lora_A.weight", "half of a LoRA")}
    for name, (key, message) in halves.items():
        whole = {f"unet.x.to_q.lora_{part}.weight": ones.clone() for part in "AB"} if name == "bias" else {}
        save_file(whole | {f"unet.x.to_q.{key}": ones.clone()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(cr.UserError, match=message):
            model.using(tmp_path / f"{name}.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    with pytest.raises(cr.UserError, match="damaged"):
        model.using(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("sd-v", "ddim", "lcm", "flux-schnell", "pixart-alpha")])
def test_an_adapter_of_another_architecture_is_refused(name: str, tmp_path: Path) -> None:
    other = "sdxl" if name != "sdxl" else "sd3"
    shaken(loaded(CASES[other])).save(tmp_path)
    model = loaded(CASES[name])
    before = [type(module) for module in model.network.modules()]
    with pytest.raises(cr.UserError, match="made for another model"):
        model.using(tmp_path)
    assert [type(module) for module in model.network.modules()] == before


def test_a_full_disk_and_a_silent_hub_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(cr.UserError, match="the disk is full; free some space, or let HF_HOME name"):
        local("hyper-sd15-4")
    monkeypatch.undo()
    with pytest.raises(cr.UserError, match=r"no 'hyper-sd15-4' here, and the hub does not give it"):
        local("hyper-sd15-4")
