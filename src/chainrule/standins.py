"""Rewards on the meta device: the weights and the activations of real ones, without their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.models.outline import META, made_on
from chainrule.rewards import On, Reward, reward_of
from chainrule.rewards.clip import BUNDLED, normalize, resize_and_crop

TOWERS: Mapping[str, Mapping[str, int]] = {  # the image towers of published rewards, as their configurations say
    "ViT-H/14": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 224, "projection_dim": 1024,
    },
    "ViT-L/14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 224, "projection_dim": 768,
    },
}  # fmt: skip
READS = {  # by their towers, and what the bundled ones are called
    "pickscore": ("ViT-H/14", "pick"), "hpsv2": ("ViT-H/14", "hps"), "hpsv2.1": ("ViT-H/14", "hps"), "clip": ("ViT-L/14", "clip"),
    "aesthetic": ("ViT-L/14", "clip"),
}  # fmt: skip


class Tower(nn.Module):
    """A reward that reads images by a CLIP image tower: its weights and its activations; elsewhere than on meta, random numbers."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device = META) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        with made_on(device, dtype):
            self.tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(b, 3, h, w) to (b,)."""
        tower = self.tower
        pixels = normalize(resize_and_crop(images, tower.config.image_size)).to(tower.visual_projection.weight.dtype)
        return tower(pixel_values=pixels).image_embeds.float().mean(1)


def stand_in(reward: Reward) -> Reward:
    """A reward of the same weights and activations on the meta device, its texts known already; its numbers mean nothing.

    Raises UserError for a reward whose image tower is not known.
    """
    terms: dict[str, Reward] = {}
    for _, term in reward.weighted():
        place, dtype = (term.reward, term.dtype) if isinstance(term, On) else (term, "float32")
        name = place.name.partition(":")[0]
        if name in READS:
            word, kind = READS[name]
            config = _vision(str(getattr(place, "clip_source", getattr(place, "source", ""))), kind) or TOWERS[word]
            label = f"{config['hidden_size']} wide in {dtype}"
            terms[label] = reward_of(Tower(config, getattr(torch, dtype)), name=label)
        elif type(place).__module__.endswith("weightless"):
            terms["none"] = holding(1)
        else:
            known = ", ".join(READS)
            raise UserError(f"how much memory {place.name!r} takes is not known; take {known}, or a reward without weights")
    return sum(terms.values())  # type: ignore[return-value]


def _vision(source: str, kind: str) -> dict[str, Any] | None:
    """The configuration of the image tower in a folder, or of the bundled scorer."""
    place = (BUNDLED / kind if source == "tiny" else Path(source)) / "config.json"
    if not place.is_file():
        return None
    config = json.loads(place.read_text())
    return {**config["vision_config"], "projection_dim": config["projection_dim"]}


class _Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, size: int) -> Tensor:
        ctx.shape = images.shape
        ctx.save_for_backward(torch.empty(size, dtype=torch.uint8, device=images.device))
        return images.float().mean((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        assert ctx.saved_tensors
        return upstream.view(-1, 1, 1, 1).expand(ctx.shape), None


def holding(size: int) -> Reward:
    """The stand-in of a reward that holds so many bytes until its backward pass, and no weights."""
    return reward_of(lambda images, prompts: _Holding.apply(images, size), name="holding")
