"""FLUX.1: a flow over packed latents by a transformer that reads the guidance, unless it was distilled without (schnell)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.models.codec import kl_autoencoder
from chainrule.models.defaults import Defaults
from chainrule.models.model import Model
from chainrule.models.pipeline import call_default, freeze, weight_type
from chainrule.models.solvers import sampler_of, shifted


@dataclass(frozen=True, slots=True)
class Transformer:
    """A `FluxTransformer2DModel`: its time is level / 1000, its tokens are patches of 2 x 2 latents."""

    network: nn.Module
    guidance_is_input: ClassVar[bool] = True

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, scale: float | Tensor = 1.0) -> Tensor:
        dtype, (b, c, h, w) = weight_type(self.network), x.shape
        assert embedding.pooled is not None
        tokens = FluxPipeline._pack_latents(x, b, c, h, w).to(dtype)
        places = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, dtype)
        read = scale.to(x.device).expand(b) if isinstance(scale, Tensor) else torch.full((b,), scale, device=x.device)
        found = self.network(
            hidden_states=tokens, timestep=torch.full((b,), level / 1000, device=x.device, dtype=dtype),
            guidance=read if self.network.config.guidance_embeds else None,  # type: ignore[union-attr]
            pooled_projections=embedding.pooled.to(dtype), encoder_hidden_states=embedding.states.to(dtype),
            txt_ids=torch.zeros(embedding.states.shape[1], 3, device=x.device, dtype=dtype), img_ids=places, return_dict=False,
        )[0]  # fmt: skip
        return FluxPipeline._unpack_latents(found, h, w, 1).to(x.dtype)


def flux_spacing(scheduler: Any, steps: int, **options: Any) -> None:
    """FLUX's own spacing: sigma from 1 to 1 / steps, then shifted."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    freeze(pipe, "transformer", "vae", "text_encoder", "text_encoder_2")
    length = call_default(pipe, "max_sequence_length", 512)

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        device = next(pipe.transformer.parameters()).device
        states, pooled, _ = pipe.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
        embedding = PromptEmbedding(states, pooled)
        return Condition(embedding, embedding)

    codec = kl_autoencoder(pipe, pipe.transformer.config.in_channels // 4, defaults.size, pipe.default_sample_size, 2)
    _, height, width = codec.latent_shape
    return Model(
        name=name, pipe=pipe, component="transformer", denoiser=Transformer(pipe.transformer),
        sampler=sampler_of(pipe.scheduler, solver, shifted((height // 2) * (width // 2), 1.15, flux_spacing)),
        embed=embed, codec=codec, defaults=defaults,
    )  # fmt: skip
