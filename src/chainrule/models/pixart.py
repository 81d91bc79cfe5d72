"""PixArt-alpha (arXiv:2310.00426) and PixArt-Sigma (arXiv:2403.04692): a diffusion transformer over T5's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.models.codec import kl_autoencoder
from chainrule.models.defaults import Defaults
from chainrule.models.model import Model
from chainrule.models.pipeline import call_default, freeze, weight_type
from chainrule.models.solvers import sampler_of


@dataclass(frozen=True, slots=True)
class DiT:
    """A `PixArtTransformer2DModel` at a level: its timestep is one below. The learned variance it may answer with is dropped.

    PixArt-alpha's at 1024 pixels is told the height and width of its images, and the one divided by the other.
    """

    network: Any
    height: int
    width: int

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        dtype, t = weight_type(self.network), torch.full((len(x),), level - 1, device=x.device)
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            numbers = torch.tensor([[self.height, self.width, self.height / self.width]], device=x.device, dtype=dtype)
            numbers = numbers.expand(len(x), -1)
            told = {"resolution": numbers[:, :2], "aspect_ratio": numbers[:, 2:]}
        found = self.network(
            x.to(dtype), encoder_hidden_states=embedding.states.to(dtype), encoder_attention_mask=embedding.mask, timestep=t,
            added_cond_kwargs=told, return_dict=False,
        )[0]  # fmt: skip
        return found[:, : x.shape[1]].to(x.dtype)


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it.

    Prompts are lowercased and stripped, as the pipeline does; its cleaning of captions from the web is left out.
    """
    freeze(pipe, "transformer", "vae", "text_encoder")
    length, config = call_default(pipe, "max_sequence_length", 120), pipe.transformer.config

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Condition:
        device = next(pipe.transformer.parameters()).device
        states, mask, negative, negative_mask = pipe.encode_prompt(
            list(prompts), True, device=device, clean_caption=False, max_sequence_length=length
        )
        return Condition(PromptEmbedding(states, mask=mask), PromptEmbedding(negative, mask=negative_mask))

    codec = kl_autoencoder(pipe, config.in_channels, defaults.size, config.sample_size, config.patch_size)
    return Model(
        name=name, pipe=pipe, component="transformer", denoiser=DiT(pipe.transformer, codec.height, codec.width),
        sampler=sampler_of(pipe.scheduler, solver), embed=embed, codec=codec, defaults=defaults,
    )  # fmt: skip
