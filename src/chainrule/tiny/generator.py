"""Stages `latents` and `unet`: the denoiser and its text encoder, trained together."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from chainrule.errors import UserError
from chainrule.tiny import autoencoder, scenes, text
from chainrule.tiny.loop import DEVICE, RANK, WORLD, train

PREVIEW = (
    "a fox", "a painting of a cat on a sea background", "a turtle, pink background", "an angry face", "a zebra", "two bees",
    "a rabbit and a car", "three apples on a sunset background", "a guitar", "a lion", "a small dog", "a spider",
)  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule and DDIM settings, with velocity prediction (arXiv:2202.00512)."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip


class Generator(nn.Module):
    """The two networks that are trained, as one module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocabulary = text.tokenizer()
        self.text_encoder = CLIPTextModel(text.config(self.vocabulary))
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=16,
        )
        self.to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The velocity (b, 4, 16, 16) of latents x at timesteps t (b,), for token ids (b, 24)."""
        states = self.text_encoder(tokens.to(DEVICE)).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=states).sample


def pipeline(generator: Generator, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The generator as a Stable Diffusion pipeline without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=generator.text_encoder, tokenizer=generator.vocabulary, unet=generator.unet,
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def scene(index: int) -> scenes.Scene:
    """Scene number `index` of the training data, always the same."""
    return scenes.draw(random.Random(f"scene/{index}"))


def cache_latents(vae: AutoencoderKL, out: Path, count: int) -> None:
    """Encode `count` scenes and write their latents into `out`; under `torchrun` every rank encodes its share."""
    share = count // WORLD
    first = RANK * share
    encoded = []
    for start in range(first, first + share, 512):
        images = [scenes.render(scene(i)) for i in range(start, min(start + 512, first + share))]
        encoded.append(autoencoder.encode(vae, images))
        print(f"latents of rank {RANK}: {start - first + len(images)} of {share}", flush=True)
    save_file({"latents": torch.cat(encoded).contiguous()}, out / f"latents-{RANK}.safetensors")


def load_latents(out: Path) -> tuple[Tensor, float]:
    """Read the posterior means and deviations of all encoded scenes, (n, 8, 16, 16), and the factor to unit variance.

    Raises UserError if there are none.
    """
    files = sorted(out.glob("latents-*.safetensors"))
    if not files:
        raise UserError(f"{out} has no latents yet; run the stage `latents` first")
    latents = torch.cat([load_file(file)["latents"] for file in files])
    return latents, float(1 / latents[:, :4].float().std())


def fit(out: Path, vae: AutoencoderKL, steps: int, batch: int = 32) -> Generator:
    """Train the generator for `steps` steps with checkpoints in `out`. Returns it frozen. Raises UserError without latents."""
    latents, scale = load_latents(out)
    vae.register_to_config(scaling_factor=scale)
    drawn = [scene(i) for i in range(len(latents))]
    generator = Generator()
    cumulative = scheduler().alphas_cumprod.to(DEVICE)

    def loss(rng: random.Random) -> Tensor:
        torch.manual_seed(rng.getrandbits(32))
        picked = [rng.randrange(len(drawn)) for _ in range(batch)]
        captions = ["" if rng.random() < 0.1 else drawn[i].caption(rng) for i in picked]
        mean, std = latents[picked].to(DEVICE).float().chunk(2, 1)
        x0 = (mean + std * torch.randn_like(mean)) * scale
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        a2 = cumulative[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x, target = a2.sqrt() * x0 + (1 - a2).sqrt() * noise, a2.sqrt() * noise - (1 - a2).sqrt() * x0
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = generator(x, t, text.ids(generator.vocabulary, captions))
        # Plain velocity loss where noise dominates, capped where signal does: SNR + 1 = 1 / (1 - a2).
        weight = (6 * (1 - a2)).clamp(max=1)
        return (weight * (predicted.float() - target).square()).mean()

    def check() -> dict[str, float]:
        generator.eval()
        pipe = pipeline(generator, vae)
        pipe.set_progress_bar_config(disable=True)
        noise = [torch.Generator().manual_seed(i) for i in range(len(PREVIEW))]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            shown = pipe(list(PREVIEW), num_inference_steps=20, guidance_scale=2.0, generator=noise).images
        grid = Image.new("RGB", (6 * scenes.SIZE, 2 * scenes.SIZE))
        for i, image in enumerate(shown):
            grid.paste(image, (i % 6 * scenes.SIZE, i // 6 * scenes.SIZE))
        grid.save(out / "preview.png")
        generator.train()
        return {}

    train("unet", generator, loss, out, steps=steps, lr=0.015, every=250, check=check)
    return generator.eval().requires_grad_(False)
