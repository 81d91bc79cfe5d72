"""The published architectures with random weights, or none: what `sizes.py` counts and measures.

Written down from the published configurations and held against the published numbers of parameters (`Architecture.published`).
On the meta device a model has shapes and no numbers, so that FLUX.1 is built in a second on a laptop.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

import chainrule as cr
from chainrule.models.loading import build
from chainrule.models.outline import META, made_on, of_parts, outlined
from chainrule.rewards import Reward, reward_of
from chainrule.rewards.base import FunctionReward
from chainrule.standins import Tower

Config = Mapping[str, Any]
Part = tuple[str, Config]  # a class of diffusers or transformers, and its configuration

VAE: Config = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 512,
}  # fmt: skip
VAE_16: Config = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
CLIP_L: Config = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G: Config = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL: Config = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
CLIP_H: Config = {  # PickScore's and HPSv2's
    "text_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 224, "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}  # fmt: skip
BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A pipeline's parts by configuration."""

    title: str
    pipeline: str
    network: Part
    vae: Config
    texts: tuple[Part, ...]
    scheduler: Part
    reward: Config = field(default_factory=lambda: CLIP_H)
    published: Mapping[str, str] = field(default_factory=dict)  # part -> its parameters as published, in millions


VISION = "reward's image tower"
OF_REWARD = {VISION: "632"}
ARCHITECTURES: dict[str, Architecture] = {
    "sd15": Architecture(
        title="Stable Diffusion 1.5, 512 pixels", pipeline="StableDiffusionPipeline",
        network=("UNet2DConditionModel", {
            "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
            "attention_head_dim": 8, "sample_size": 64,
        }),
        vae=VAE, texts=(("CLIPTextModel", CLIP_L),),
        scheduler=("DDIMScheduler", BETAS | {"clip_sample": False, "set_alpha_to_one": False}),
        published={"unet": "859.5", "vae": "83.7", "text_encoder": "123.1"} | OF_REWARD,
    ),
    "sdxl": Architecture(
        title="Stable Diffusion XL, 1024 pixels", pipeline="StableDiffusionXLPipeline",
        network=("UNet2DConditionModel", {
            "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        }),
        vae=VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        texts=(("CLIPTextModel", CLIP_L), ("CLIPTextModelWithProjection", CLIP_G)),
        scheduler=("EulerDiscreteScheduler", BETAS | {"timestep_spacing": "leading"}),
        published={"unet": "2567", "vae": "83.7", "text_encoder": "123.1", "text_encoder_2": "694.7"} | OF_REWARD,
    ),
    "sd3": Architecture(
        title="Stable Diffusion 3 medium, 1024 pixels", pipeline="StableDiffusion3Pipeline",
        network=("SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
        }),
        vae=VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        texts=(
            ("CLIPTextModelWithProjection", CLIP_L | {"projection_dim": 768}), ("CLIPTextModelWithProjection", CLIP_G),
            ("T5EncoderModel", T5_XXL),
        ),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        published={"transformer": "2.0 billion", "text_encoder_3": "4762"} | OF_REWARD,
    ),
    "sd35": Architecture(
        title="Stable Diffusion 3.5 medium, 1024 pixels", pipeline="StableDiffusion3Pipeline",
        network=("SD3Transformer2DModel", {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
            "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        }),
        vae=VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        texts=(
            ("CLIPTextModelWithProjection", CLIP_L | {"projection_dim": 768}), ("CLIPTextModelWithProjection", CLIP_G),
            ("T5EncoderModel", T5_XXL),
        ),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        published={"text_encoder_3": "4762"} | OF_REWARD,  # "2.5 billion" are its 2.24 and a table of positions
    ),
    "flux": Architecture(
        title="FLUX.1-dev, 1024 pixels", pipeline="FluxPipeline",
        network=("FluxTransformer2DModel", {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        }),
        vae=VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        texts=(("CLIPTextModel", CLIP_L), ("T5EncoderModel", T5_XXL)),
        scheduler=("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True, "max_shift": 1.15}),
        published={"transformer": "11.9 billion", "text_encoder_2": "4762"} | OF_REWARD,
    ),
}  # fmt: skip

SMALL: Config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VAE: Config = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "sample_size": 32,
}  # fmt: skip
SMALL_REWARD: Config = {
    "text_config": SMALL, "vision_config": SMALL | {"image_size": 16, "patch_size": 4}, "projection_dim": 16,
}  # fmt: skip
TINY: dict[str, Architecture] = {  # the same families, for the tests
    "tiny-sd": replace(
        ARCHITECTURES["sd15"], title="a Stable Diffusion of a few thousand weights", vae=SMALL_VAE, reward=SMALL_REWARD,
        texts=(("CLIPTextModel", SMALL),), published={},
        network=("UNet2DConditionModel", {
            "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2,
            "norm_num_groups": 4, "sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }),
    ),
    "tiny-sd3": replace(
        ARCHITECTURES["sd3"], title="a Stable Diffusion 3 of a few thousand weights", reward=SMALL_REWARD,
        vae=SMALL_VAE | {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609},
        texts=(
            *(("CLIPTextModelWithProjection", SMALL | {"projection_dim": 16}),) * 2,
            ("T5EncoderModel", {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2}),
        ),
        published={},
        network=("SD3Transformer2DModel", {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
        }),
    ),
}  # fmt: skip


def open_model(shape: Architecture, device: torch.device, dtype: torch.dtype, quantize: str | None = None) -> cr.Model:
    """The architecture as `chainrule.load` opens it, with random weights or none. Every prompt reads as the same zeros."""
    component = "transformer" if "Transformer" in shape.network[0] else "unet"
    named = {component: shape.network, "vae": ("AutoencoderKL", shape.vae), "scheduler": shape.scheduler}
    parts = {name: (getattr(diffusers, kind), config) for name, (kind, config) in named.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outlined(build(shape.title, of_parts(shape.pipeline, parts, dtype, device), None, None, None), quantize)


def open_reward(shape: Architecture, device: torch.device, dtype: torch.dtype) -> Reward:
    """PickScore's image tower; its texts are known."""
    config = {**shape.reward["vision_config"], "projection_dim": shape.reward["projection_dim"]}
    return reward_of(Tower(config, dtype, device).requires_grad_(False).eval(), name="tower")


def parameters(shape: Architecture) -> dict[str, int]:
    """The number of parameters of every part, text encoders too."""
    model, judge = open_model(shape, META, torch.bfloat16), open_reward(shape, META, torch.bfloat16)
    assert isinstance(judge, FunctionReward) and isinstance(judge.function, nn.Module)
    with made_on(META, torch.bfloat16):
        texts = {f"text_encoder{f'_{i + 1}' if i else ''}": _text(part) for i, part in enumerate(shape.texts)}
    parts: dict[str, nn.Module] = {"vae": model.pipe.vae, **texts, model.component: model.network, VISION: judge.function}
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def _text(part: Part) -> nn.Module:
    name, config = part
    kind = transformers.T5Config if name.startswith("T5") else transformers.CLIPTextConfig
    return getattr(transformers, name)(kind(**config))  # type: ignore[no-any-return]
