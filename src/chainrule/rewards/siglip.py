"""SigLIP (arXiv:2303.15343) as a frozen, differentiable reward for the agreement of image and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, normalize, resize
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import first_line, pretrained

SIGLIP = "google/siglip-so400m-patch14-384"
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SigLIP(Reward):
    """The agreement of image and prompt by SigLIP, a CLIP trained with a sigmoid loss: cos(image, text).

    Paper: arXiv:2303.15343. The model's own logit is exp(logit_scale) cos + logit_bias, the same order. Source:
    google/siglip-so400m-patch14-384 (licence: see its card) or any SiglipModel; its tokenizer needs the package
    sentencepiece. Range [-1, 1]. Preprocessing: bicubic to the model's square, whatever the aspect; mean and deviation 0.5.
    Prompts are padded to the model's length and the padding is read, as in its training. `text`, where given, is read
    instead of the prompts.
    """

    source: str = SIGLIP
    text: str | None = None

    def __post_init__(self) -> None:
        check_source(self.source, "siglip")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "siglip" + ("" if self.source == SIGLIP else f":{self.source}") + (f":{self.text}" if self.text else "")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        model, tokenizer = load_siglip(self.source, images.device)
        texts = [self.text] * len(images) if self.text else list(prompts)
        length, side = model.config.text_config.max_position_embeddings, model.config.vision_config.image_size
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        pixels = normalize(resize(images, (side, side)), HALF, HALF)
        out = model(input_ids=tokens["input_ids"].to(images.device), pixel_values=pixels.float())
        return (out.image_embeds * out.text_embeds).sum(-1)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_siglip(self.source, device)
        return self


def load_siglip(source: str, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """The frozen SiglipModel of a folder or hub id, and its tokenizer: float32, safetensors only."""
    return _load(check_source(source, "siglip"), full_name(device))


@load_once
def _load(source: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, SiglipModel

    model = pretrained(SiglipModel, source, "a SigLIP model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the tokenizer of {source!r}: {first_line(error)}") from error
    return model.to(device), tokenizer
