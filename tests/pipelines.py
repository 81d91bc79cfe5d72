"""Random-weight pipelines in the real format, small enough for a laptop."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

torch.set_num_threads(1)


def byte_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def make_pipeline(prediction_type: str = "epsilon", dtype: torch.dtype = torch.float64, seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.5 look-alike: every part real, every weight random, 8x8 latents, 16x16 images."""
    torch.manual_seed(seed)
    words = byte_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16, attention_head_dim=2,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.to(dtype).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel_pipeline(classes: int | None, dtype: torch.dtype = torch.float64) -> DDIMPipeline:
    """A model in pixel space, of classes or of nothing."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes,
    ).to(dtype).eval()  # fmt: skip
    return DDIMPipeline(unet, DDIMScheduler(clip_sample=False))


@dataclass(frozen=True)
class Worth:
    """A term on states of any shape, where an objective's rewards want images: minus a function (x, prompts) -> (b,)."""

    function: Callable[[Tensor, object], Tensor]
    weight: float = -1.0
    name: str = "worth"

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        return self.function(images, prompts)


def score(images: Tensor, prompts: object) -> Tensor:
    """A smooth reward that reads every pixel differently."""
    ramp = torch.linspace(-1, 1, images[0].numel(), dtype=images.dtype).view_as(images[0])
    return -(images - 0.4 - 0.2 * ramp).square().mean((1, 2, 3))
