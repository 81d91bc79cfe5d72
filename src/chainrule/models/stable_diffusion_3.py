"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): a flow by a multimodal transformer; the T5 encoder may be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.errors import UserError
from chainrule.models.codec import kl_autoencoder
from chainrule.models.defaults import Defaults
from chainrule.models.model import Model
from chainrule.models.pipeline import call_default, freeze, weight_type
from chainrule.models.solvers import sampler_of, shifted
from chainrule.size import config_size


@dataclass(frozen=True, slots=True)
class MMDiT:
    """An `SD3Transformer2DModel`: its timestep is the level, 1000 sigma."""

    network: nn.Module

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        dtype, t = weight_type(self.network), torch.full((len(x),), level, device=x.device)
        assert embedding.pooled is not None
        return self.network(
            hidden_states=x.to(dtype), timestep=t, encoder_hidden_states=embedding.states.to(dtype),
            pooled_projections=embedding.pooled.to(dtype), return_dict=False,
        )[0].to(x.dtype)  # fmt: skip


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    freeze(pipe, "transformer", "vae", "text_encoder", "text_encoder_2", *(["text_encoder_3"] if pipe.text_encoder_3 else []))
    length, config = call_default(pipe, "max_sequence_length", 256), pipe.transformer.config

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        device = next(pipe.transformer.parameters()).device
        states, negative, pooled, pooled_negative = pipe.encode_prompt(
            list(prompts), None, None, device=device, max_sequence_length=length
        )
        return Condition(PromptEmbedding(states, pooled), PromptEmbedding(negative, pooled_negative))

    codec = kl_autoencoder(pipe, config.in_channels, defaults.size, config.sample_size, config.patch_size)
    rows, columns = (side // config.patch_size for side in codec.latent_shape[1:])
    if max(rows, columns) > config.pos_embed_max_size:
        largest, size = config.pos_embed_max_size * config.patch_size * codec.factor, config_size((codec.height, codec.width))
        raise UserError(f"size is {size}, but this model has places for images up to {largest} pixels a side")
    return Model(
        name=name, pipe=pipe, component="transformer", denoiser=MMDiT(pipe.transformer),
        sampler=sampler_of(pipe.scheduler, solver, shifted(rows * columns, 1.16)),
        embed=embed, codec=codec, defaults=defaults,
    )  # fmt: skip
