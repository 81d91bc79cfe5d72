"""An image classifier as a reward: raised towards a class, or subtracted to lead away from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chainrule.errors import UserError, unknown
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, normalize, resize, resize_shortest
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import pretrained

RESNET = "microsoft/resnet-50"
MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Classifier(Reward):
    """log p(class | image): minus the cross-entropy towards a class, to be subtracted to lead away from it.

    Source: microsoft/resnet-50 (ImageNet; Apache-2.0) or any image classifier transformers loads. `label` is one of its class
    names, a part of one up to a comma, or its number. Range up to 0. Preprocessing: its own `preprocessor_config.json`'s: to the
    shortest side over `crop_pct`, center crop (or its `crop_size`), or to a height and width whatever the aspect; its
    `resample`, its mean and deviation. Without one bicubic and ImageNet's.
    """

    label: str
    source: str = RESNET

    def __post_init__(self) -> None:
        check_source(self.source, "classifier")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"classifier:{'' if self.source == RESNET else self.source + ':'}{self.label}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        network = load_classifier(self.source, images.device)
        return network(images).log_softmax(-1)[:, network.index(self.label)]

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_classifier(self.source, device).index(self.label)
        return self


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a classifier's `preprocessor_config.json`: resize, crop, normalize."""

    size: tuple[int, int]  # height and width of what the network reads
    whole: int | None  # the shortest side before the crop; None: no crop, resized to `size` whatever the aspect
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] -> normalized pixels (b, 3, *size)."""
        if self.whole is None:
            return normalize(resize(images, self.size, self.mode), self.mean, self.std)
        x = resize_shortest(images, self.whole, self.mode)
        top, left = ((side - kept) // 2 for side, kept in zip(x.shape[-2:], self.size, strict=True))
        return normalize(x[..., top : top + self.size[0], left : left + self.size[1]], self.mean, self.std)


@dataclass(frozen=True)
class Network:
    """A frozen classifier with its preprocessing, on one device."""

    model: Any
    preprocess: Preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, 3, h, w) in [0, 1]."""
        logits = self.model(pixel_values=self.preprocess(images).to(self.model.dtype)).logits
        return logits.to(torch.promote_types(images.dtype, torch.float32))

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def index(self, label: str) -> int:
        """The number of a class, given its name, one of its names between commas, or the number. Raises UserError for none."""
        for i, name in enumerate(self.labels):
            if label in (name, *(synonym.strip() for synonym in name.split(","))):
                return i
        if label.isdecimal() and int(label) < len(self.labels):
            return int(label)
        synonyms = [synonym.strip() for name in self.labels for synonym in name.split(",")]
        raise unknown("class", label, get_close_matches(label, synonyms, 5, 0.3) or synonyms[:5])


def load_classifier(source: str, device: torch.device | str = "cpu", kind: str = "classifier") -> Network:
    """The frozen classifier of a folder, a hub id, or the bundled `kind` ("tiny"): float32, safetensors only."""
    return _load(check_source(source, kind), full_name(device))


@load_once
def _load(source: str, device: str) -> Network:
    from transformers import AutoModelForImageClassification

    model = pretrained(AutoModelForImageClassification, source, "an image classifier")
    facts = read_facts(source)
    return Network(model.to(device), preprocessing_of(facts, getattr(model.config, "image_size", 224)))


def preprocessing_of(facts: dict[str, Any], otherwise: int = 224) -> Preprocessing:
    """The preprocessing that a `preprocessor_config.json` describes. `otherwise` is the side, in pixels, if it gives none.

    Processors differ in what they leave out: ViT's is bilinear and squashes, ConvNeXt's crops 7/8 and squashes from 384 on.
    """
    kind = str(facts.get("image_processor_type") or facts.get("feature_extractor_type") or "")
    resample, size = facts.get("resample") or (2 if kind.startswith("ViT") else 3), facts.get("size")
    if resample not in MODES:
        raise UserError(f"resample is {resample} in a preprocessor_config.json, but must be 2 (bilinear) or 3 (bicubic)")
    colors = MODES[resample], tuple(facts.get("image_mean") or IMAGENET[0]), tuple(facts.get("image_std") or IMAGENET[1])
    side, convnext = _side(size, otherwise), kind.startswith("ConvN")
    both = (int(size["height"]), int(size["width"])) if isinstance(size, dict) and "height" in size else (side, side)
    squashed = kind.startswith("ViT") or (convnext and side >= 384) or (isinstance(size, dict) and "shortest_edge" not in size)
    if squashed and not facts.get("do_center_crop"):
        return Preprocessing(both, None, *colors)
    crop = facts.get("crop_pct") or (7 / 8 if convnext else None)
    kept = side if crop and not facts.get("do_center_crop") else _side(facts.get("crop_size"), side)
    return Preprocessing((kept, kept), int(side / crop) if crop else side, *colors)


def _side(size: Any, otherwise: int) -> int:
    """The side of a processor's `size` or `crop_size`, which may be a number or a dictionary."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return int(size or otherwise)


def read_facts(source: str) -> dict[str, Any]:
    """The values of the `preprocessor_config.json` of a folder or hub id; empty if there is none."""
    place = Path(source) / "preprocessor_config.json"
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            place = Path(hf_hub_download(source, "preprocessor_config.json"))
        except OSError:
            return {}
    return dict(json.loads(place.read_text())) if place.is_file() else {}
