"""Stable Diffusion 1.x / 2.x: `StableDiffusionPipeline`, with noise or velocity prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.denoise import Condition
from chainrule.models.model import Defaults, Model
from chainrule.models.solvers import made


@dataclass(frozen=True, slots=True)
class UNet:
    """A `UNet2DConditionModel` at a level: its timestep is one below."""

    network: nn.Module

    def __call__(self, x: Tensor, level: float, text: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        t = torch.tensor(level - 1, device=x.device)
        return self.network(x.to(dtype), t, encoder_hidden_states=text.to(dtype), return_dict=False)[0].to(x.dtype)  # type: ignore[no-any-return]


def build(name: str, pipe: Any, defaults: Defaults) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        device = next(pipe.unet.parameters()).device
        return Condition(*pipe.encode_prompt(list(prompts), device, 1, True))

    def decode(latents: Tensor) -> Tensor:
        """(b, c, h, w) latents to (b, 3, 8h, 8w) in [0, 1]; values outside are clipped and pass no gradient."""
        dtype = next(pipe.vae.parameters()).dtype
        image = pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(dtype), return_dict=False)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1] to the means of their latents, (b, c, h/8, w/8)."""
        weight = next(pipe.vae.parameters())
        found = pipe.vae.encode((images * 2 - 1).to(weight.device, weight.dtype)).latent_dist.mean
        return (found * pipe.vae.config.scaling_factor).to(torch.promote_types(weight.dtype, torch.float32))  # type: ignore[no-any-return]

    side = pipe.unet.config.sample_size
    return Model(
        name=name,
        pipe=pipe,
        denoiser=UNet(pipe.unet),
        **made(pipe.scheduler, "ddim"),
        embed=embed,
        decode=decode,
        encode=encode,
        latent_shape=(pipe.unet.config.in_channels, side, side),
        image_size=side * pipe.vae_scale_factor,
        defaults=defaults,
    )
