"""Pixel-space diffusion: `DDPMPipeline` or `DDIMPipeline` with a `UNet2DModel`, unconditional or by class.

A prompt is the name of a class, or its number. Names come from `labels` in the folder's `chainrule.json`; where the network has
one class more than there are names, the last one stands for the empty prompt, and guidance leads away from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.errors import UserError, unknown
from chainrule.models.codec import Pixels
from chainrule.models.defaults import Defaults
from chainrule.models.model import Model
from chainrule.models.pipeline import freeze, weight_type
from chainrule.models.solvers import sampler_of
from chainrule.size import Size, config_size


@dataclass(frozen=True, slots=True)
class UNet:
    """A `UNet2DModel` at a level: its timestep is one below. The words' states are the class of each image, (b,)."""

    network: nn.Module

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        dtype, classes = weight_type(self.network), embedding.states if self.network.config.num_class_embeds else None  # type: ignore[union-attr]
        t = torch.tensor(level - 1, device=x.device)
        return self.network(x.to(dtype), t, class_labels=classes, return_dict=False)[0].to(x.dtype)


def build(name: str, pipe: Any, defaults: Defaults, solver: str | None) -> Model:
    """The family's `Model` around a live pipeline. Freezes every weight; changes nothing else in it."""
    freeze(pipe, "unet")
    config, names = pipe.unet.config, defaults.labels
    count = config.num_class_embeds or 0
    has_empty = bool(names) and count == len(names) + 1
    if (config.in_channels, config.out_channels) != (3, 3):
        counts = f"{config.in_channels} channels and answers {config.out_channels}"
        raise UserError(f"{name} reads {counts}; color images without learned variance (3 and 3) are supported")

    def index(prompt: str) -> int:
        if prompt in names:
            return names.index(prompt)
        if prompt.isdecimal() and int(prompt) < count:
            return int(prompt)
        if not prompt and has_empty:
            return count - 1
        raise unknown("class", prompt, names or [f"0 to {count - 1}"])

    def embed(prompts: Sequence[str]) -> Condition:
        if not count:
            unread = torch.zeros(len(prompts), dtype=torch.long, device=pipe.unet.device)
            return Condition(PromptEmbedding(unread), PromptEmbedding(unread))
        classes = torch.tensor([index(prompt) for prompt in prompts], device=pipe.unet.device)
        return Condition(
            PromptEmbedding(classes), PromptEmbedding(torch.full_like(classes, count - 1) if has_empty else classes)
        )  # else guidance changes nothing

    if config.sample_size is None:
        raise UserError(f"the configuration of {name} does not say its size, sample_size; put it there")
    own: Size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
    if defaults.size not in (None, own):
        raise UserError(f"size is {config_size(defaults.size)}, but {name} is a model of {config_size(own)} pixels")
    defaults = replace(defaults, labels=names or tuple(map(str, range(count))))
    return Model(
        name=name, pipe=pipe, denoiser=UNet(pipe.unet),
        sampler=sampler_of(pipe.scheduler, solver), embed=embed, codec=Pixels(*own), defaults=defaults,
    )  # fmt: skip
