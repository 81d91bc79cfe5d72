"""An image classifier as a reward: towards a class, or with a minus away from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainrule.errors import UserError, unknown
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, resize_and_crop

RESNET = "microsoft/resnet-50"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Classifier(Reward):
    """log p(class | image): minus the cross-entropy towards a class, to be subtracted to lead away from it.

    Source: microsoft/resnet-50 (ImageNet; Apache-2.0) or any image classifier transformers loads. `label` is one of its class
    names, a part of one up to a comma, or its number. Range up to 0. Preprocessing: bicubic to the shortest side over `crop_pct`,
    center crop (or its `crop_size`), the mean and deviation of its own `preprocessor_config.json` (ImageNet's without one).
    """

    label: str
    source: str = RESNET

    def __post_init__(self) -> None:
        check_source(self.source, "classifier")

    @property
    def name(self) -> str:
        return f"classifier:{'' if self.source == RESNET else self.source + ':'}{self.label}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        network = load_classifier(self.source, images.device)
        return network(images).log_softmax(-1)[:, network.index(self.label)]

    def to(self, device: torch.device | str) -> Reward:
        load_classifier(self.source, device).index(self.label)
        return self


@dataclass(frozen=True)
class Network:
    """A frozen classifier with its preprocessing, on one device."""

    model: Any
    size: int
    crop: float  # share of the resized shortest side that is kept
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, 3, h, w) in [0, 1]."""
        whole = round(self.size / self.crop)
        x = resize_and_crop(images, whole)
        edge = (whole - self.size) // 2
        x = x[..., edge : edge + self.size, edge : edge + self.size]
        x = (x - x.new_tensor(self.mean).view(1, 3, 1, 1)) / x.new_tensor(self.std).view(1, 3, 1, 1)
        return self.model(pixel_values=x.to(self.model.dtype)).logits.to(images.dtype)  # type: ignore[no-any-return]

    @property
    def labels(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def index(self, label: str) -> int:
        """The class of a name, of a part of one up to a comma, or of a number. UserError for none."""
        for i, name in enumerate(self.labels):
            if label in (name, *(part.strip() for part in name.split(","))):
                return i
        if label.isdecimal() and int(label) < len(self.labels):
            return int(label)
        parts = [part.strip() for name in self.labels for part in name.split(",")]
        raise unknown("class", label, get_close_matches(label, parts, 5, 0.3) or parts[:5])


def load_classifier(source: str, device: torch.device | str = "cpu") -> Network:
    """The frozen classifier of a folder, a hub id, or the bundled one ("tiny"): float32, safetensors only."""
    return _load(check_source(source, "classifier"), full_name(device))


@lru_cache(maxsize=4)
def _load(source: str, device: str) -> Network:
    from transformers import AutoModelForImageClassification

    try:
        model: Any = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load an image classifier from {source!r}: {str(error).splitlines()[0]}") from error
    facts = _facts(source)
    whole = _side(facts.get("size"), getattr(model.config, "image_size", 224))
    side = _side(facts.get("crop_size"), whole) if facts.get("do_center_crop") or "crop_pct" not in facts else whole
    mean, std = tuple(facts.get("image_mean") or IMAGENET[0]), tuple(facts.get("image_std") or IMAGENET[1])
    crop = float(facts.get("crop_pct") or side / whole)
    return Network(model.to(device).requires_grad_(False).eval(), side, crop, mean, std)


def _side(size: Any, otherwise: int) -> int:
    """The side of a processor's `size` or `crop_size`, which may be a number or a dictionary."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size or otherwise)


def _facts(source: str) -> dict[str, Any]:
    place = Path(source) / "preprocessor_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            place = Path(hf_hub_download(source, "preprocessor_config.json"))
        except OSError:
            return {}
    return dict(json.loads(place.read_text())) if place.is_file() else {}
