"""LoRA files in the spellings people publish them in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from chainrule.adapters import Weights
from chainrule.adapters.files import COMPONENTS, check, layers, one_rank
from chainrule.adapters.files import read as own
from chainrule.errors import UserError
from chainrule.models.families import FAMILIES

OWN = (".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.")


BY_CALLS = "put it into the pipeline by load_lora_weights, fuse_lora, unload_lora_weights in this order, and give that"
BY_PEFT = "not a LoRA; put it into the network by peft, merge it there, and give the pipeline"
REASONS = (
    (("lora_magnitude_vector", "dora_scale"), f"is a DoRA, whose magnitudes are not a LoRA's; {BY_CALLS}"),
    (("hada_",), f"is a LoHa, {BY_PEFT}"),
    (("lokr_",), f"is a LoKr, {BY_PEFT}"),
    (
        ("base_model.model.",),
        "is in peft's own spelling; load it by peft's PeftModel.from_pretrained(pipe.NETWORK, ...), put merge_and_unload() of that "
        "into the pipeline, and give that",
    ),
    (("text_encoder", "lora_te"), f"adapts a text encoder too; {BY_CALLS}"),
)
"""What parts of keys say of a file, and what its owner can do."""


def keys_of(file: Path) -> list[str]:
    """The names of a file's tensors. Raises UserError for a damaged one."""
    try:
        with safe_open(file, "pt") as stored:
            return list(stored.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file ({error})") from error


def is_lora(file: Path) -> bool:
    """Whether a file holds low-rank factors, rather than a network's weights."""
    return any("lora" in key for key in keys_of(file))


def read(file: Path, pipeline: str, config: Any = None) -> Weights:
    """A LoRA for the denoiser of a diffusers pipeline class: in diffusers' spelling, or in any that its loader converts.

    `config` is the denoiser's own, by which kohya's names of SDXL's blocks are found.

    Layers may have scales and ranks of their own: scales go into the up matrices, smaller ranks are filled up with zeros.
    Raises UserError for a LoRA that adapts a text encoder too, and for a spelling the pipeline's loader does not know.
    """
    keys = keys_of(file)
    for marks, reason in REASONS:
        if any(mark in key for mark in marks for key in keys):
            network = FAMILIES[pipeline].network if pipeline in FAMILIES else " or ".join(COMPONENTS)
            raise UserError(f"{file} {reason.replace('NETWORK', network)}")
    comfy = any(key.startswith("diffusion_model.") for key in keys)
    if keys and not comfy and all(any(mark in key for mark in OWN) for key in keys):
        return own(file)
    import diffusers

    kind: Any = getattr(diffusers, pipeline, None)
    if not hasattr(kind, "lora_state_dict"):
        raise UserError(f"{file} is not in diffusers' spelling, and diffusers has no LoRA loader for {pipeline} to convert it")
    # FLUX's loader leaves the alphas out unless they are asked for.
    options = {"return_alphas": True} if "return_alphas" in inspect.signature(kind.lora_state_dict).parameters else {}
    options |= {} if config is None else {"unet_config": config}
    try:
        # In float32, because converters multiply by alpha / rank, which can be small.
        found: Any = kind.lora_state_dict({key: _wide(value) for key, value in load_file(file).items()}, **options)
    except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is no LoRA that diffusers can load into a {pipeline}: {reason}") from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    component = next((name for name in COMPONENTS if any(key.startswith(f"{name}.") for key in state)), COMPONENTS[0])
    tensors, scales = _peft(state, component), _peft({key: torch.tensor(float(a)) for key, a in (alphas or {}).items()}, component)
    if not tensors or not all(".lora_A." in key or ".lora_B." in key for key in tensors):
        raise UserError(f"{file} holds no LoRA for the denoiser")
    if comfy and any(key.startswith("diffusion_model.") for key in tensors):
        raise UserError(
            f"{file} has keys that begin with diffusion_model., as ComfyUI's do, which diffusers converts for some families, "
            f"not for {pipeline}; convert it to diffusers' keys first"
        )
    check(file, tensors)
    alphas = {key.removesuffix(".alpha").removesuffix(".lora_A.weight"): float(value) for key, value in scales.items()}
    if wrong := next((alpha for alpha in alphas.values() if not alpha or not math.isfinite(alpha)), None):
        raise UserError(f"{file} is damaged: a layer has alpha {wrong:g}")
    ranks = {layer: tensors[f"{layer}.lora_A.weight"].shape[0] for layer in layers(tensors)}
    return one_rank(tensors, {layer: alphas.get(layer, rank) / rank for layer, rank in ranks.items()}, component)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _peft(state: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """Without the component's name, in peft's spelling."""
    from diffusers.utils import convert_unet_state_dict_to_peft as renamed

    return dict(renamed({key.removeprefix(f"{component}."): value for key, value in state.items()}))
