"""A small random-weight pipeline of every family, in the real format, and how its own pipeline is called."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from pipelines import byte_tokenizer, make_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

import chainrule as cr

PROMPTS, SEEDS = ["a fox", "two bees"], [3, 8]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def autoencoder(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


def clip_text(projected: bool = False) -> Any:
    words = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5_tokenizer() -> T5TokenizerFast:
    """One token per letter."""
    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    words = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in letters)], unk_id=2))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=words, extra_ids=0, model_max_length=77)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=2, pad_token_id=0,
        feed_forward_proj="gated-gelu", eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config)


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    usual = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 16,
        "attention_head_dim": 2, "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**usual | options)


def sdxl() -> Any:
    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025), text_encoder=clip_text(), text_encoder_2=clip_text(True),
        tokenizer=byte_tokenizer(), tokenizer_2=byte_tokenizer(), add_watermarker=False,
        unet=unet(cross_attention_dim=32, use_linear_projection=True, transformer_layers_per_block=(1, 2), **size),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    )  # fmt: skip


def sd3(shift: float = 3.0) -> Any:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=clip_text(True), tokenizer=byte_tokenizer(), text_encoder_2=clip_text(True), tokenizer_2=byte_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux(guided: bool = True) -> Any:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guided,
    )  # fmt: skip
    shift = {"shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return FluxPipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided, **shift),
        vae=autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=clip_text(), tokenizer=byte_tokenizer(), text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def pixart(kind: type = diffusers.PixArtSigmaPipeline, told: bool = False) -> Any:
    network = diffusers.PixArtTransformer2DModel(
        sample_size=128 if told else 8, num_layers=2, patch_size=2, attention_head_dim=12, num_attention_heads=2, in_channels=4,
        out_channels=8, cross_attention_dim=24, caption_channels=32, attention_bias=True, norm_num_groups=4,
        use_additional_conditions=told,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return kind(tokenizer=t5_tokenizer(), text_encoder=t5(), vae=autoencoder(), transformer=network, scheduler=scheduler)


def lcm() -> Any:
    pipe = make_pipeline(dtype=torch.float32)
    pipe.register_modules(unet=unet(time_cond_proj_dim=16), scheduler=diffusers.LCMScheduler(**BETAS))
    return diffusers.LatentConsistencyModelPipeline(**pipe.components, requires_safety_checker=False)


def pixels(kind: type = diffusers.DDPMPipeline, size: int | tuple[int, int] = 16) -> Any:
    network = diffusers.UNet2DModel(
        sample_size=size, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler if kind is diffusers.DDPMPipeline else diffusers.DDIMScheduler
    return kind(unet=network, scheduler=scheduler(clip_sample=False))


@dataclass(frozen=True)
class Case:
    """One family: its pipeline, what else its call wants, guidance off and on, height and width, its latents as (b, c, h, w)."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    guidances: tuple[float, ...] = (1.0, 4.0)
    steps: int = 4
    unpack: Callable[[Tensor, tuple[int, int]], Tensor] = lambda x, size: x
    texts: bool = True
    size: tuple[int, int] | None = (16, 16)

    def pipe(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        made = self.make()
        for part in made.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(dtype).eval()
        made.set_progress_bar_config(disable=True)
        return made

    def run(self, pipe: Any, prompts: list[str], seeds: list[int], guidance: float, steps: int, **options: Any) -> Any:
        """The pipeline's own answer to these prompts and seeds."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        if not self.texts:
            return pipe(batch_size=len(seeds), generator=generators, num_inference_steps=steps, **self.call, **options)
        assert self.size is not None
        height, width = self.size
        return pipe(
            prompt=prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators, height=height, width=width,
            **self.call, **options,
        )  # fmt: skip

    def latents(self, told: Tensor) -> Tensor:
        """What the pipeline holds between its steps, as (b, c, h, w)."""
        return self.unpack(told, self.size) if self.size else told


def unpacked(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, *size, 2)


PLAIN = {"use_resolution_binning": False, "clean_caption": False}
CASES: dict[str, Case] = {
    "sd": Case(lambda: make_pipeline(dtype=torch.float32)),
    "sd-v": Case(lambda: make_pipeline("v_prediction", torch.float32)),
    "lcm": Case(lcm, guidances=(8.5,)),
    "sdxl": Case(sdxl),
    "sd3": Case(sd3),
    "flux": Case(flux, guidances=(3.5,), unpack=unpacked),
    "flux-schnell": Case(lambda: flux(False), guidances=(1.0,), unpack=unpacked),
    "pixart-sigma": Case(pixart, call=PLAIN),
    "pixart-alpha": Case(lambda: pixart(diffusers.PixArtAlphaPipeline, told=True), call=PLAIN),
    "ddpm": Case(pixels, guidances=(1.0,), texts=False, size=None),
    "ddim": Case(lambda: pixels(diffusers.DDIMPipeline), guidances=(1.0,), texts=False, size=None),
}
# The same, higher than wide; a pixel-space network has its own size.
TALL: dict[str, Case] = {name: replace(case, size=(24, 16)) for name, case in CASES.items() if case.texts} | {
    "ddpm": replace(CASES["ddpm"], make=lambda: pixels(size=(24, 16))),
    "ddim": replace(CASES["ddim"], make=lambda: pixels(diffusers.DDIMPipeline, (24, 16))),
}


def loaded(case: Case, pipe: Any = None) -> cr.Model:
    return cr.load(pipe or case.pipe(), size=case.size)


def said(case: Case) -> list[str]:
    return PROMPTS if case.texts else ["", ""]


def shaken(model: cr.Model, name: str = "mine") -> Any:
    """An adapter away from the identity."""
    adapter = model.adapt(name, rank=2)
    torch.manual_seed(1)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    return adapter


def images_of(found: Any) -> np.ndarray:
    return np.asarray(found.images if hasattr(found, "images") else found)
