"""ImageReward (arXiv:2304.05977): BLIP reads prompt and image together, and a small network rates the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, crop, full_name, normalize, resize_shortest
from chainrule.rewards.loaded import load_once
from chainrule.rewards.scorers import aesthetic_head
from chainrule.rewards.weights import depth, fetch, fill, heads, read_config, read_state, tokenizer_of

SOURCE = "THUDM/ImageReward/ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the official scores on its validation set
LENGTH = 35  # tokens of a prompt
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm": "post_layernorm",
}


@dataclass(frozen=True)
class ImageReward(Reward):
    """Human preference for an image given its prompt: (head(h) - 0.16717) / 1.03334.

    h is the first token of BLIP's text encoder, which attends to the image's patches. The head is five linear layers without
    activations. Paper: arXiv:2304.05977. Source: THUDM/ImageReward/ImageReward.pt (BLIP-L; licence: see its card), a path to that
    file, a .safetensors file with the same keys, or a folder holding one, with bert-base-uncased's tokenizer (or the one beside
    it; [CLS] is the first token, as in the official scorer). A .pt is opened for its tensors alone (`weights_only`). Roughly
    standard normal, in practice -2 to 2. Preprocessing: bicubic to the shortest side, center crop, 224 pixels. Checked: names,
    formula and preprocessing, against a second implementation with random weights; not checked: the published weights.
    """

    source: str = SOURCE

    def __post_init__(self) -> None:
        check_source(self.source, "imagereward", needs=())

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "imagereward" if self.source == SOURCE else f"imagereward:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return load_imagereward(self.source, images.device)(images, prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_imagereward(self.source, device)
        return self


@dataclass(frozen=True)
class Blip:
    """ImageReward's frozen networks and tokenizer, on one device."""

    vision: Any  # transformers.BlipVisionModel
    text: Any  # transformers.BlipTextModel with cross-attention
    head: nn.Sequential
    tokenizer: Any

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores (b,) of images (b, 3, h, w) in [0, 1] for their b prompts."""
        pixels = normalize(crop(resize_shortest(images, self.vision.config.image_size), self.vision.config.image_size))
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        seen = self.vision(pixel_values=pixels.float()).last_hidden_state
        read = self.text(
            input_ids=tokens["input_ids"].to(images.device),
            attention_mask=tokens["attention_mask"].to(images.device),
            encoder_hidden_states=seen,
        )
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD


def load_imagereward(source: str, device: torch.device | str = "cpu") -> Blip:
    """The frozen ImageReward of a file or folder, in float32. Raises UserError for a file that is something else."""
    return _load(check_source(source, "imagereward", needs=()), full_name(device))


@load_once
def _load(source: str, device: str) -> Blip:
    path = fetch(source)
    state = read_state(path)
    try:
        vision, text, head = _networks(state, path)
    except KeyError as error:
        raise UserError(f"{str(path)!r} is not an ImageReward checkpoint: it has no {error.args[0]!r}") from error
    return Blip(vision.to(device), text.to(device), head.to(device), tokenizer_of(path, "bert-base-uncased"))


def _networks(state: dict[str, Tensor], path: Path) -> tuple[Any, Any, Any]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    seeing, reading, rating = (without_stem(state, stem) for stem in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."))
    vision, text = sizes(seeing, reading, read_config(path))
    head = aesthetic_head(rating["0.weight"].shape[1])
    model = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
    reading = {key: value for key, value in reading.items() if key in model.state_dict() or not key.endswith("position_ids")}
    return (
        fill(BlipVisionModel(BlipVisionConfig(**vision)), {to_transformers(key): seeing[key] for key in seeing}, path),
        fill(model, reading, path),
        fill(head, rating, path),
    )


def sizes(seeing: dict[str, Tensor], reading: dict[str, Tensor], facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of BlipVisionConfig and BlipTextConfig, read off the tensors.

    `facts`, a config.json's values, may give the number of attention heads.
    BLIP's vision tower has layer norms with 1e-6, where BlipVisionConfig defaults to 1e-5.
    """
    width, _, patch, _ = seeing["patch_embed.proj.weight"].shape
    vocabulary, narrow = reading["embeddings.word_embeddings.weight"].shape
    vision = {
        "hidden_size": width,
        "intermediate_size": len(seeing["blocks.0.mlp.fc1.bias"]),
        "num_hidden_layers": depth(seeing, "blocks"),
        "num_attention_heads": heads(width, facts.get("vision_config") or {}),
        "image_size": round((seeing["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": narrow,
        "encoder_hidden_size": width,
        "intermediate_size": len(reading["encoder.layer.0.intermediate.dense.bias"]),
        "num_hidden_layers": depth(reading, "encoder.layer"),
        "num_attention_heads": heads(narrow, facts.get("text_config") or {}),
        "max_position_embeddings": len(reading["embeddings.position_embeddings.weight"]),
        "is_decoder": True,  # what gives the layers their cross-attention; the mask stays bidirectional
    }
    return vision, text


def without_stem(state: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    """The tensors of a state dict whose names begin with `stem`, named without it."""
    return {key.removeprefix(stem): value for key, value in state.items() if key.startswith(stem)}


def to_transformers(key: str) -> str:
    """BlipVisionModel's name for a tensor of the official checkpoint's vision tower."""
    front, dot, last = key.rpartition(".")
    if not dot or key in _VISION:
        return _VISION.get(key, key)
    if not front.startswith("blocks."):
        return f"{_VISION.get(front, front)}.{last}"
    _, number, inner = front.split(".", 2)
    return f"{_VISION['blocks']}.{number}.{_VISION.get(inner, inner)}.{last}"
