"""A pipeline object as its owner has it: what chains cannot differentiate or would answer otherwise is refused in one line."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from chainrule.adapters import recompute
from chainrule.errors import UserError


def prepare(pipe: Any, component: str) -> None:
    """Check the network that denoises; one that checkpoints its gradients keeps to it, under the adapters of the first pass.

    Raises UserError for what its owner put on it that would be lost or answer otherwise, and says how to take it off.
    """
    network: Any = getattr(pipe, component)
    if network is not None and (found := _in_the_way(network, component)):
        raise UserError(f"the pipeline's {component} {found}")
    if getattr(network, "is_gradient_checkpointing", False):
        network.enable_gradient_checkpointing(recompute)


def _in_the_way(network: Any, component: str) -> str:
    """What is on a network that a chain would lose or answer otherwise, and how to take it off; "" for nothing."""
    if hasattr(network, "_orig_mod"):
        return f"is wrapped by torch.compile; compile it in place instead, pipe.{component}.compile()"
    if isinstance(network, PeftModel):
        return f"is wrapped by peft; set pipe.{component} = pipe.{component}.merge_and_unload(), or give the LoRA's file to using"
    modules = dict(network.named_modules())
    layers = [module for module in modules.values() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        return "has fused LoRAs that are still attached; call pipe.unload_lora_weights() after fuse_lora()"
    active = dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters)
    if active:
        named = ", ".join(active)
        return f"has active LoRAs ({named}); call fuse_lora() and unload_lora_weights(), or unload them and give the file to using"
    if any(getattr(module, "fused_projections", False) for module in modules.values()):
        return "has fused QKV projections, which LoRA cannot train; call unfuse_qkv_projections()"
    if getattr(network.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        return "has an IP-Adapter, whose picture a chain does not get; call pipe.unload_ip_adapter()"
    return _hooks(modules)


def _hooks(modules: dict[str, nn.Module]) -> str:
    """The hooks of accelerate and diffusers: they move weights or change answers behind a chain's back."""
    if any(hasattr(module, "_hf_hook") for module in modules.values()):
        return "has offloading hooks; call pipe.remove_all_hooks() and put it on one device"
    registries = [module._diffusers_hook for module in modules.values() if hasattr(module, "_diffusers_hook")]
    hooks = dict.fromkeys(name for registry in registries for name in getattr(registry, "hooks", {}))
    return f"has hooks ({', '.join(hooks)}); load it without layerwise casting, caches or group offloading" if hooks else ""
