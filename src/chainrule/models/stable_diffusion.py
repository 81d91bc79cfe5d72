"""Stable Diffusion 1.x / 2.x with noise or velocity prediction, and latent consistency models, which read the guidance."""

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


@dataclass(frozen=True, slots=True)
class UNet:
    """A `UNet2DConditionModel` at a level: its timestep is one below.

    A latent consistency model's reads the guidance `scale` that it was distilled with (arXiv:2310.04378, section 4.2);
    `embed_guidance` is its pipeline's embedding of it.
    """

    network: nn.Module
    embed_guidance: Callable[..., Tensor] | None = None

    @property
    def guidance_is_input(self) -> bool:
        """Whether the network reads its guidance scale."""
        return self.embed_guidance is not None

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, scale: float | Tensor = 1.0) -> Tensor:
        dtype, t = weight_type(self.network), torch.tensor(level - 1, device=x.device)
        return self.network(
            x.to(dtype), t, encoder_hidden_states=embedding.states.to(dtype), return_dict=False,
            timestep_cond=embedded_guidance(self.network, self.embed_guidance, x, scale),
        )[0].to(x.dtype)  # fmt: skip


def embedded_guidance(network: Any, embed: Callable[..., Tensor] | None, x: Tensor, scale: float | Tensor) -> Tensor | None:
    """The guidance scale, where a network reads it: w = scale - 1, for every image of the batch; None where it does not."""
    if not embed:
        return None
    w = scale.expand(len(x)) - 1 if isinstance(scale, Tensor) else torch.full((len(x),), scale - 1)
    return embed(w, embedding_dim=network.config.time_cond_proj_dim).to(x.device, weight_type(network))


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    freeze(pipe, "unet", "vae", "text_encoder")

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        found = pipe.encode_prompt(list(prompts), next(pipe.unet.parameters()).device, 1, True)
        return Condition(*map(PromptEmbedding, found))

    reads = bool(pipe.unet.config.time_cond_proj_dim)
    return Model(
        name=name, pipe=pipe, denoiser=UNet(pipe.unet, pipe.get_guidance_scale_embedding if reads else None),
        sampler=sampler_of(pipe.scheduler, solver), embed=embed,
        codec=kl_autoencoder(pipe, pipe.unet.config.in_channels, defaults.size, pipe.unet.config.sample_size), defaults=defaults,
    )  # fmt: skip
