"""LoRA files from strangers: what each damaged or foreign one is told, and small scales in half precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CASES, loaded, shaken
from safetensors.torch import load_file, save_file
from torch import Tensor

import chainrule as cr
from chainrule.adapters import files
from chainrule.models import loras
from chainrule.models.kohya import save_kohya

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Tensors = dict[str, Tensor]


def lora(**header: Any) -> tuple[Tensors, dict[str, Any]]:
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8), f"unet.{LAYER}.lora_B.weight": torch.ones(8, 2)}
    return tensors, {"unet.lora_alpha": 2, "unet.r": 2, **header}


def with_down(value: Callable[[Tensor], Tensor]) -> tuple[Tensors, dict[str, Any]]:
    tensors, header = lora()
    return {key: value(each) if "lora_A" in key else each for key, each in tensors.items()}, header


def without(part: str) -> tuple[Tensors, dict[str, Any]]:
    tensors, header = lora()
    return {key: value for key, value in tensors.items() if part not in key}, header


def renamed(old: str, new: str, more: Tensors | None = None) -> tuple[Tensors, dict[str, Any]]:
    tensors, header = lora()
    return {key.replace(old, new): value for key, value in tensors.items()} | (more or {}), header


ONE = torch.ones(8)
DAMAGED = {
    "NaN": (with_down(lambda value: value * float("nan")), "lora_A.weight has a NaN or Inf"),
    "Inf": (with_down(lambda value: value / 0), "lora_A.weight has a NaN or Inf"),
    "integers": (with_down(lambda value: value.int()), "is int32 of shape"),
    "complex": (with_down(lambda value: value.to(torch.complex64)), "is complex64 of shape"),
    "a number": (with_down(lambda value: value[0, 0].clone()), r"is float32 of shape \(\), no matrix"),
    "a vector": (with_down(lambda value: value[0].clone()), r"is float32 of shape \(8,\), no matrix"),
    "rank 0": (with_down(lambda value: value[:0]), r"of shape \(0, 8\), no matrix"),
    "two ranks": (with_down(lambda value: value[:1]), "has ranks 1 and 2"),
    "half": (without("lora_B"), "holds half of a LoRA"),
    "empty": (({}, {}), "holds no LoRA"),
    "alpha 0": (lora(**{"unet.lora_alpha": 0}), "alpha is 0"),
    "alpha NaN": (lora(**{"unet.lora_alpha": float("nan")}), "alpha is nan"),
    "alpha a word": (lora(**{"unet.lora_alpha": "much"}), "says no scale"),
    "alpha a list": (lora(**{"unet.alpha_pattern": [1]}), "says no scale"),
    "a regex that hangs": (lora(**{"unet.alpha_pattern": {"(a+)+$": 1}}), "is no layer's name"),
    "DoRA": (renamed("x", "x", {f"unet.{LAYER}.lora_magnitude_vector": ONE}), "is a DoRA.*load_lora_weights, fuse_lora"),
    "kohya's DoRA": (renamed("x", "x", {"lora_unet_x.dora_scale": ONE}), "is a DoRA"),
    "LoHa": (renamed("lora_A", "hada_w1_a"), "is a LoHa"),
    "LoKr": (renamed("lora_A", "lokr_w1"), "is a LoKr"),
    "peft's": (renamed("unet.", "base_model.model."), r"in peft's own spelling; load it by .*\(pipe\.unet"),
    "ComfyUI's": (renamed("unet.", "diffusion_model."), r"keys that begin with diffusion_model\., as ComfyUI's do"),
    "a text encoder's": (renamed("x", "x", {"text_encoder.q.lora_A.weight": ONE}), "adapts a text encoder too"),
    "another network's": (renamed("mid_block", "last_block"), "made for another model: .* has no layer"),
    "wider": (with_down(lambda value: value.repeat(1, 2)), "made for another model: .* has shape"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(sd_folder: Path) -> cr.Model:
    return cr.load(sd_folder)


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_or_foreign_file_is_told_in_one_line(
    content: tuple[Tensors, dict[str, Any]], said: str, model: cr.Model, tmp_path: Path
) -> None:
    tensors, header = content
    save_file(tensors, tmp_path / files.FILE, {"lora_adapter_metadata": json.dumps(header)})
    with pytest.raises(cr.UserError, match=said) as caught:
        model.using(tmp_path)
    assert ("\n" not in str(caught.value) and str(tmp_path) in str(caught.value)) or "another model" in str(caught.value)
    assert not getattr(model.network, "peft_config", {})


HEADS = {"cut": "{", "a list": "[1]", "deep": "[" * 100_000, "a word": '"alpha"'}


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_a_header_that_is_no_header(head: str, model: cr.Model, tmp_path: Path) -> None:
    save_file(lora()[0], tmp_path / files.FILE, {"lora_adapter_metadata": head})
    with pytest.raises(cr.UserError, match="is damaged: its header") as caught:
        model.using(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 8], ids=["0 bytes", "zeros", "a long header"])
def test_what_is_no_safetensors_file(data: bytes, model: cr.Model, tmp_path: Path) -> None:
    (tmp_path / files.FILE).write_bytes(data)
    with pytest.raises(cr.UserError, match="damaged or not a safetensors file"):
        model.using(tmp_path)


BANDS = {
    "words": {"early": {"levels": [["a", "b"]]}}, "a text": {"early": {"levels": "now"}}, "no levels": {"early": {}},
    "a way out": {"../early": {"levels": None}}, "a list": ["early"], "three ends": {"early": {"levels": [[1, 2, 3]]}},
    "no beginning": {"early": {"levels": [[None, 3]]}},
}  # fmt: skip


@pytest.mark.parametrize("bands", BANDS.values(), ids=list(BANDS))
def test_levels_that_are_no_levels(bands: Any, model: cr.Model, tmp_path: Path) -> None:
    (tmp_path / files.BANDS).write_text(json.dumps(bands))
    with pytest.raises(cr.UserError, match=r"bands.json is damaged \(") as caught:
        model.using(tmp_path)
    assert "\n" not in str(caught.value)


KOHYA = {
    "StableDiffusionPipeline": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "FluxPipeline": "lora_unet_double_blocks_0_img_attn_proj",
}


@pytest.mark.parametrize("pipeline", KOHYA)
def test_a_small_scale_in_half_precision_loses_nothing(pipeline: str, tmp_path: Path) -> None:
    """alpha 1 at rank 128 divides float16 numbers by 128, which rounds small ones away where it is done in float16."""
    torch.manual_seed(0)
    down, up = (1e-3 * torch.randn(128, 16)).half(), (1e-4 * torch.randn(16, 128)).half()
    name = KOHYA[pipeline]
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0).half()}
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = loras.read(tmp_path / "kohya.safetensors", pipeline)
    (layer,) = found.targets
    ours = found.tensors[f"{layer}.lora_B.weight"].double() @ found.tensors[f"{layer}.lora_A.weight"].double()
    torch.testing.assert_close(ours * found.alpha / found.rank, up.double() @ down.double() / 128, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_mix_and_a_kohya_file_of_half_precision_lose_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """The sum in float64 of what the files hold; small numbers by a small scale are below what float16 has."""
    torch.manual_seed(0)
    layer, expected = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", torch.zeros(16, 16, dtype=torch.float64)
    for name, scale in (("a", 0.05), ("b", -0.3)):
        down, up = (torch.randn(4, 16) * 1e-2).to(dtype), (torch.randn(16, 4) * 8e-6).to(dtype)
        save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, tmp_path / f"{name}.safetensors")
        expected += scale * up.double() @ down.double()
    mixed = cr.mix({tmp_path / "a.safetensors": 0.05, tmp_path / "b.safetensors": -0.3})
    kohya = load_file(save_kohya(mixed, tmp_path / "kohya.safetensors"))
    halves = [(mixed.tensors[f"{layer}.lora_B.weight"], mixed.tensors[f"{layer}.lora_A.weight"])]
    halves += [tuple(next(value for key, value in kohya.items() if f"lora_{part}" in key) for part in ("up", "down"))]
    for up, down in halves:
        torch.testing.assert_close(up.double() @ down.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_a_mix_of_more_than_a_denoiser_and_an_unknown_pipeline_are_one_line(tmp_path: Path) -> None:
    layer, ones = "blocks.0.attn1.to_q", torch.ones(2, 2)
    keys = [f"{part}.{layer}.lora_{half}.weight" for part in ("unet", "text_encoder") for half in "AB"]
    save_file({key: ones.clone() for key in keys}, tmp_path / "both.safetensors")
    save_file({f"lora_unet_x.lora_{half}.weight": ones.clone() for half in ("down", "up")}, tmp_path / "kohya.safetensors")
    for name in ("both", "kohya"):
        with pytest.raises(cr.UserError, match=r"adapts more than the denoiser|in diffusers' spelling"):
            cr.mix({tmp_path / f"{name}.safetensors": 0.5})
    with pytest.raises(cr.UserError, match="adapts a text encoder too"):
        loras.read(tmp_path / "both.safetensors", "StableDiffusionXLImg2ImgPipeline")


def test_a_run_does_not_begin_on_what_its_config_cannot_name(model: cr.Model, tmp_path: Path) -> None:
    """A scale, steps or weights of one's own would be left out of the config, and the run's images would be another model's."""
    shaken(loaded(CASES["sd"])).save(tmp_path / "strong")
    saved = str(tmp_path / "strong")
    for base in (
        model.using(saved, scale=0.25),
        model.using(saved, adapter_steps=(0, 2), steps=4),
        model.using(cr.mix({saved: 0.5})),
    ):
        with pytest.raises(cr.UserError, match="is on at a scale or steps of its own, or is in no file"):
            cr.finetune(base, "draft-1", "symmetry", ["a fox"], out=tmp_path / "run", updates=1, sample_steps=2)
        with pytest.raises(cr.UserError, match="save it as it is to be"):
            cr.steer(base, "a fox", "symmetry", updates=1, sample_steps=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    cr.steer(model.using(saved, scale=0.25), "a fox", "symmetry", updates=1, sample_steps=2)  # writes nothing
