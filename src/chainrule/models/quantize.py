"""Base weights in fewer bits, where diffusers supports it. Adapters on them stay in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from chainrule.errors import UserError, unknown

PACKAGES: Mapping[str, str] = {"int8": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}


def check(name: str | None) -> None:
    """Raises UserError for a name that is not known, and for one whose package is not installed."""
    if name is None:
        return
    if name not in PACKAGES:
        raise unknown("quantize", name, PACKAGES)
    if find_spec(PACKAGES[name]) is None:
        raise UserError(f"quantize is {name!r}, which needs {PACKAGES[name]}; pip install {PACKAGES[name]}")


def quantization(name: str | None, dtype: str, components: Sequence[str]) -> dict[str, Any]:
    """What diffusers' `from_pretrained` is told so that the linear layers of these components are held like this."""
    if name is None:
        return {}
    import torch
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif name == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype))
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict.fromkeys(components, config))}
