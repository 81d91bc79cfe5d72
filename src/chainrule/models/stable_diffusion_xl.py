"""Stable Diffusion XL (arXiv:2307.01952): two text encoders, a pooled embedding, and the sizes of the image as condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.models.codec import kl_autoencoder
from chainrule.models.defaults import Defaults
from chainrule.models.model import Model
from chainrule.models.pipeline import freeze, weight_type
from chainrule.models.solvers import sampler_of
from chainrule.models.stable_diffusion import embedded_guidance


@dataclass(frozen=True, slots=True)
class UNet:
    """SDXL's `UNet2DConditionModel`, told that its images are whole: of this height and width, cropped nowhere."""

    network: nn.Module
    height: int
    width: int
    embed_guidance: Callable[..., Tensor] | None = None

    @property
    def guidance_is_input(self) -> bool:
        """Whether the network reads its guidance scale, as LCM-SDXL's does."""
        return self.embed_guidance is not None

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, scale: float | Tensor = 1.0) -> Tensor:
        dtype, t = weight_type(self.network), torch.tensor(level - 1, device=x.device)
        assert embedding.pooled is not None
        sizes = torch.tensor([[self.height, self.width, 0, 0, self.height, self.width]], device=x.device, dtype=dtype)
        added = {"text_embeds": embedding.pooled.to(dtype), "time_ids": sizes.expand(len(x), -1)}
        return self.network(
            x.to(dtype), t, encoder_hidden_states=embedding.states.to(dtype), added_cond_kwargs=added, return_dict=False,
            timestep_cond=embedded_guidance(self.network, self.embed_guidance, x, scale),
        )[0].to(x.dtype)  # fmt: skip


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    freeze(pipe, "unet", "vae", "text_encoder", "text_encoder_2")

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        device = next(pipe.unet.parameters()).device
        states, negative, pooled, pooled_negative = pipe.encode_prompt(list(prompts), device=device)
        return Condition(PromptEmbedding(states, pooled), PromptEmbedding(negative, pooled_negative))

    codec = kl_autoencoder(pipe, pipe.unet.config.in_channels, defaults.size, pipe.unet.config.sample_size)
    reads = bool(pipe.unet.config.time_cond_proj_dim)
    denoiser = UNet(pipe.unet, codec.height, codec.width, pipe.get_guidance_scale_embedding if reads else None)
    return Model(
        name=name, pipe=pipe, denoiser=denoiser, sampler=sampler_of(pipe.scheduler, solver),
        embed=embed, codec=codec, defaults=defaults,
    )  # fmt: skip
