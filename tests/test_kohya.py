"""LoRA files for ComfyUI and kohya's scripts: ComfyUI's key maps restated, and what diffusers' own loader makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, PROMPTS, SEEDS, images_of, loaded
from safetensors.torch import load_file
from torch import Tensor

import chainrule as cr
from chainrule.adapters import Weights
from chainrule.models import loras
from chainrule.models.kohya import save_kohya

# ComfyUI's tables (comfy/utils.py: flux_to_diffusers, mmdit_to_diffusers, pixart_to_diffusers): diffusers' layer of a block, the
# weight it is part of, its first row and its number of rows in parts of the hidden width; () is the whole weight.
QKV = ((0, 1), (1, 1), (2, 1))
DOUBLE: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"attn.to_{x}": ("img_attn.qkv", at) for x, at in zip("qkv", QKV, strict=True)},
    **{f"attn.add_{x}_proj": ("txt_attn.qkv", at) for x, at in zip("qkv", QKV, strict=True)},
    "attn.to_out.0": ("img_attn.proj", ()), "attn.to_add_out": ("txt_attn.proj", ()), "ff.net.0.proj": ("img_mlp.0", ()),
    "ff.net.2": ("img_mlp.2", ()), "ff_context.net.0.proj": ("txt_mlp.0", ()), "ff_context.net.2": ("txt_mlp.2", ()),
}  # fmt: skip
SINGLE = {f"attn.to_{x}": ("linear1", at) for x, at in zip("qkv", QKV, strict=True)} | {"proj_mlp": ("linear1", (3, 4))}
JOINT: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"attn.to_{x}": ("x_block.attn.qkv", at) for x, at in zip("qkv", QKV, strict=True)},
    **{f"attn.add_{x}_proj": ("context_block.attn.qkv", at) for x, at in zip("qkv", QKV, strict=True)},
    "attn.to_out.0": ("x_block.attn.proj", ()), "attn.to_add_out": ("context_block.attn.proj", ()),
    "ff.net.0.proj": ("x_block.mlp.fc1", ()), "ff.net.2": ("x_block.mlp.fc2", ()),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", ()), "ff_context.net.2": ("context_block.mlp.fc2", ()),
}  # fmt: skip
PIXART: dict[str, tuple[str, tuple[int, ...]]] = {
    **{f"attn1.to_{x}": ("attn.qkv", at) for x, at in zip("qkv", QKV, strict=True)}, "attn1.to_out.0": ("attn.proj", ()),
    "attn2.to_q": ("cross_attn.q_linear", ()), "attn2.to_k": ("cross_attn.kv_linear", (0, 1)),
    "attn2.to_v": ("cross_attn.kv_linear", (1, 1)), "attn2.to_out.0": ("cross_attn.proj", ()),
    "ff.net.0.proj": ("mlp.fc1", ()), "ff.net.2": ("mlp.fc2", ()),
}  # fmt: skip
BLOCKS = {
    "flux": {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)},
    "sd3": {"transformer_blocks": ("joint_blocks", JOINT)}, "pixart-sigma": {"transformer_blocks": ("blocks", PIXART)},
}  # fmt: skip
ROWS = {"linear1": 7, "attn.qkv": 3, "img_attn.qkv": 3, "txt_attn.qkv": 3, "x_block.attn.qkv": 3, "context_block.attn.qkv": 3,
        "cross_attn.kv_linear": 2}  # fmt: skip


def place(family: str, layer: str) -> tuple[str, str, tuple[int, ...]]:
    """ComfyUI's weight for a layer of diffusers, its last part, and the rows."""
    kind, number, *rest = layer.split(".")
    stem, table = BLOCKS[family][kind]
    name, rows = table[".".join(rest)]
    return f"{stem}.{number}.{name}", name, rows


def added(family: str, deltas: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """What layers of diffusers' add to ComfyUI's weights."""
    found: dict[str, Tensor] = {}
    for layer, delta in deltas.items():
        weight, name, rows = place(family, layer)
        if not rows:
            found[weight] = delta
            continue
        whole = found.setdefault(weight, torch.zeros(ROWS[name] * hidden, delta.shape[1]))
        whole[rows[0] * hidden : (rows[0] + rows[1]) * hidden] += delta
    return found


def read_by_comfy(family: str, file: Path, layers: list[str], hidden: int) -> dict[str, Tensor]:
    """What a file adds to ComfyUI's weights. A key that its map does not have is a KeyError.

    comfy/lora.py knows `lora_unet_` with the weight's own name, and `transformer.` with diffusers'. comfy/weight_adapter/lora.py:
    alpha / rank, or 1 where there is no alpha, times up times down.
    """
    stored = load_file(file)
    own = {f"lora_unet_{place(family, layer)[0].replace('.', '_')}": place(family, layer)[0] for layer in layers}
    theirs = {f"transformer.{layer}": layer for layer in layers}
    found: dict[str, Tensor] = {}
    for stem in {re.sub(r"\.(alpha|lora_(up|down|A|B)\.weight)$", "", key) for key in stored}:
        up = stored[f"{stem}.lora_up.weight" if stem in own else f"{stem}.lora_B.weight"]
        down = stored[f"{stem}.lora_down.weight" if stem in own else f"{stem}.lora_A.weight"]
        scale = stored[f"{stem}.alpha"].item() / down.shape[0] if f"{stem}.alpha" in stored else 1.0
        delta = scale * up @ down
        for weight, value in ({own[stem]: delta} if stem in own else added(family, {theirs[stem]: delta}, hidden)).items():
            found[weight] = found[weight] + value if weight in found else value
    return found


def deltas_of(weights: Weights) -> dict[str, Tensor]:
    scale = weights.alpha / weights.rank
    return {
        layer: scale * weights.tensors[f"{layer}.lora_B.weight"] @ weights.tensors[f"{layer}.lora_A.weight"]
        for layer in weights.targets
    }


def drawn(model: cr.Model) -> Weights:
    """An adapter away from the identity, whose alpha is not its rank."""
    adapter = model.adapt("mine", rank=3, alpha=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    return adapter.weights()


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", BLOCKS)
def test_comfy_adds_what_the_adapter_adds(family: str, tmp_path: Path, chainrule: Any) -> None:
    """By its own key maps; every key has a place there."""
    model = loaded(CASES[family])
    weights, hidden = drawn(model), next(m for n, m in model.network.named_modules() if n.endswith(".to_q")).out_features
    weights.save(tmp_path / "own")
    file = tmp_path / "for" / "comfy.safetensors"
    done = chainrule("mix", f"{tmp_path / 'own'}=1", "--out", tmp_path / "mixed", "--kohya", file)
    assert done.code == 0, done.err
    layers = list(weights.targets)
    assert len(layers) > 15
    alike(read_by_comfy(family, file, layers, hidden), added(family, deltas_of(weights), hidden))
    if family == "flux":
        assert all(key.startswith("lora_unet_") for key in load_file(file))


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_diffusers_loads_the_file(family: str, tmp_path: Path) -> None:
    """Into the plain pipeline, whose images are ours. Of FLUX's single blocks it takes one matrix of the published width only."""
    case = CASES[family]
    model = loaded(case)
    weights = drawn(model)
    if family == "flux":
        first = "single_transformer_blocks.0"
        kept = {k: v for k, v in weights.tensors.items() if not k.startswith(first)}
        kept |= {
            f"{first}.proj_out.lora_A.weight": torch.randn(3, 160) / 5,
            f"{first}.proj_out.lora_B.weight": torch.randn(32, 3) / 5,
        }
        weights = Weights(kept, weights.alpha, weights.component)
    guidance = case.guidances[-1]
    plainly, ours = (
        loaded(case).render(PROMPTS, SEEDS, 3, guidance),
        loaded(case).using(weights).render(PROMPTS, SEEDS, 3, guidance),
    )
    file = save_kohya(weights, tmp_path / "x.safetensors")
    plain = case.pipe()
    plain.load_lora_weights(tmp_path, weight_name=file.name)
    theirs = images_of(case.run(plain, PROMPTS, SEEDS, guidance, 3, output_type="np"))
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)
    assert (ours - plainly).abs().max() > 0.01
    torch.testing.assert_close(loaded(case).using(file).render(PROMPTS, SEEDS, 3, guidance), ours, rtol=0, atol=2e-5)


PARTS = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}


@pytest.mark.parametrize("adapted", [tuple(PARTS), tuple(PARTS)[:3], ("proj_mlp",), ("attn.to_q", "attn.to_v")], ids=str)
def test_diffusers_takes_fluxs_single_blocks_apart(adapted: tuple[str, ...], tmp_path: Path) -> None:
    """At the published widths, which its converter is written for: each layer gets its own product back, and others nothing."""
    torch.manual_seed(0)
    block, tensors = "single_transformer_blocks.7", {}
    for part in adapted:
        tensors[f"{block}.{part}.lora_A.weight"] = torch.randn(4, 3072)
        tensors[f"{block}.{part}.lora_B.weight"] = torch.randn(PARTS[part], 4)
    weights = Weights(tensors, 0.5, "transformer")
    expected = deltas_of(weights)
    found = deltas_of(loras.read(save_kohya(weights, tmp_path / "x.safetensors"), "FluxPipeline"))
    assert expected.keys() <= found.keys() <= {f"{block}.{part}" for part in PARTS}
    for layer, delta in found.items():
        torch.testing.assert_close(delta, expected[layer] if layer in expected else torch.zeros_like(delta), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [("proj_out",), ("x_embedder", "single_transformer_blocks.0.proj_out")], ids=str)
def test_a_layer_without_a_name_is_refused(layers: tuple[str, ...], tmp_path: Path) -> None:
    tensors = {f"{layer}.lora_{part}.weight": torch.ones(2, 2) for layer in layers for part in "AB"}
    with pytest.raises(cr.UserError, match=f"no name for {layers[0]} in a file for ComfyUI"):
        save_kohya(Weights(tensors, 2.0, "transformer"), tmp_path / "new" / "x.safetensors")
    assert not (tmp_path / "new").exists()
