"""LoRA files for programs other than diffusers: ComfyUI, and kohya's scripts where they have names for a family.

ComfyUI reads no header, so that alpha / rank, which diffusers' own file has there, goes into the matrices. Its key maps are
those of `comfy/lora.py` and `comfy/utils.py` of Comfy-Org/ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from chainrule.adapters import Weights
from chainrule.errors import UserError
from chainrule.tensors import write_tensors

QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
LINEAR1 = (*(f"attn.{part}" for part in QKV), "proj_mlp")  # of FLUX's single blocks, in the order of its rows
WIDTHS = (1, 1, 1, 4)  # of these, in parts of the hidden width
DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn_qkv": tuple(f"attn.{part}" for part in QKV), "txt_attn_qkv": tuple(f"attn.{part}" for part in ADDED),
    "img_attn_proj": ("attn.to_out.0",), "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",), "img_mod_lin": ("norm1.linear",),
    "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",), "txt_mod_lin": ("norm1_context.linear",),
}  # fmt: skip
SINGLE: Mapping[str, tuple[str, ...]] = {"linear1": LINEAR1, "linear2": ("proj_out",), "modulation_lin": ("norm.linear",)}
FLUX = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}
"""Kohya's names for the layers of FLUX's blocks, and which of diffusers' layers lie one above the other in each."""
NAMED = re.compile(
    r"""transformer_blocks\.\d+\.( attn[12]?\.to_(q|k|v|out\.0) | attn\.(add_[qkv]_proj|to_add_out)
    | ff(_context)?\.net\.(0\.proj|2) | norm1(_context)?\.linear )""",
    re.X,
)
"""Layers of transformers that ComfyUI knows by diffusers' names: Stable Diffusion 3's, FLUX's double blocks', PixArt's."""


def save_kohya(weights: Weights, file: Path) -> Path:
    """Write a LoRA as ComfyUI reads it, without approximation.

    UNets' and FLUX's are in kohya's spelling, which kohya's scripts read too; FLUX's layers that are one matrix there become one,
    with their ranks side by side. Stable Diffusion 3's and PixArt's, for which diffusers and ComfyUI share a spelling, are in
    that one. Raises UserError for a layer that has no name there.
    """
    scale = weights.alpha / weights.rank
    wide = lambda value: value.to(torch.promote_types(value.dtype, torch.float32))  # scales can be small, and float16 ends at 6e-8
    tensors = {key: wide(value) * scale if ".lora_B." in key else value for key, value in weights.tensors.items()}
    if weights.component == "unet":
        from diffusers.utils import convert_state_dict_to_kohya

        named: dict[str, Tensor] = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in tensors.items()})
    elif any(layer.startswith("single_transformer_blocks.") for layer in weights.targets):
        named = _flux(tensors, weights.targets)
    else:
        unknown = next((layer for layer in weights.targets if not NAMED.fullmatch(layer)), None)
        if unknown:
            raise _nameless(unknown)
        named = {f"{weights.component}.{key}": value.contiguous() for key, value in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, named, {"format": "pt"})
    return file


def _nameless(layer: str) -> UserError:
    return UserError(
        f"there is no name for {layer} in a file for ComfyUI; leave --kohya out, and give ComfyUI the adapter's own file"
    )


def _flux(tensors: Mapping[str, Tensor], targets: Sequence[str]) -> dict[str, Tensor]:
    """FLUX's in kohya's spelling: matrices down, up, and alpha, which is the rank."""
    found: dict[str, Tensor] = {}
    there, named = set(targets), set()
    for block in sorted({".".join(layer.split(".")[:2]) for layer in targets}):
        kind, _, number = block.partition(".")
        stem, names = FLUX.get(kind, ("", {}))
        for name, parts in names.items():
            layers = [f"{block}.{part}" for part in parts]
            if there.isdisjoint(layers):
                continue
            down, up = _above(tensors, layers, WIDTHS[: len(layers)])
            key = f"lora_unet_{stem}_{number}_{name}"
            alpha = torch.tensor(float(down.shape[0]))
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}
            named |= set(layers)
    if nameless := sorted(there - named):
        raise _nameless(nameless[0])
    return found


def _above(tensors: Mapping[str, Tensor], layers: Sequence[str], widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Layers with one input as one with all of their outputs: the A's above each other, the B's on a diagonal.

    A layer without a LoRA has rows of zeros, as many as its share of `widths` says.
    """
    there = {layer: tensors[f"{layer}.lora_B.weight"] for layer in layers if f"{layer}.lora_B.weight" in tensors}
    first = next(iter(there))
    unit = there[first].shape[0] // widths[layers.index(first)]
    none = there[first].new_zeros
    blocks = [there[layer] if layer in there else none(unit * width, 0) for layer, width in zip(layers, widths, strict=True)]
    return torch.cat([tensors[f"{layer}.lora_A.weight"] for layer in there]), torch.block_diag(*blocks)
