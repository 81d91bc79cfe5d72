"""Rewards for safe images: a classifier's, and the distance to the concepts that Stable Diffusion's safety checker refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.classifier import load_classifier
from chainrule.rewards.clip import check_source, full_name, normalize, resize_and_crop
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import fetch, fill, first_line, read_state

NSFW = "Falconsai/nsfw_image_detection"
CHECKER = "CompVis/stable-diffusion-safety-checker"
CARE = 0.01  # the checker lowers its thresholds by this where a special-care concept is found


@dataclass(frozen=True)
class Safe(Reward):
    """log p("normal" | image) of a classifier of images that are not safe for work. Prompts are ignored.

    DRaFT's Appendix B.11 (arXiv:2309.17400) trains on such a classifier. Source: Falconsai/nsfw_image_detection (a ViT-B; licence:
    see its card), or another classifier of which one class is called normal. Range up to 0. Preprocessing: the model's own
    `preprocessor_config.json`, that is bilinear to 224 x 224, whatever the aspect, mean and deviation 0.5.
    """

    source: str = NSFW

    def __post_init__(self) -> None:
        check_source(self.source, "nsfw")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "safe" if self.source == NSFW else f"safe:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        network = load_classifier(self.source, images.device, "nsfw")
        return network(images).log_softmax(-1)[:, network.index("normal")]

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_classifier(self.source, device, "nsfw").index("normal")
        return self


@dataclass(frozen=True)
class Concepts(Reward):
    """Distance to what Stable Diffusion's safety checker refuses: -max_i (cos(image, concept_i) - threshold_i + care).

    care is 0.01 where any of the three special-care concepts is over its own threshold. Negative exactly where the checker,
    which rounds to three decimals, would black the image out. The maximum, not a sum of what is over a threshold, so that a
    safe image has a gradient too; it reaches one concept at a time. Prompts are ignored. Source:
    CompVis/stable-diffusion-safety-checker (CLIP-L's vision tower; licence: see its card). Range about [-1, 1]. Preprocessing:
    CLIP's, bicubic to the shortest side, center crop.
    """

    source: str = CHECKER

    def __post_init__(self) -> None:
        check_source(self.source, "safety-checker")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "concepts" if self.source == CHECKER else f"concepts:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        margins, care = load_checker(self.source, images.device)(images)
        return -(margins.amax(-1) + CARE * (care > 0).any(-1))

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_checker(self.source, device)
        return self


@dataclass(frozen=True)
class Checker:
    """The frozen safety checker, on one device."""

    vision: Any  # transformers.CLIPVisionModel
    concepts: dict[str, Tensor]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """cos - threshold of images (b, 3, h, w) in [0, 1]: (b, 17) for the concepts, (b, 3) for special care."""
        pixels = normalize(resize_and_crop(images, self.vision.config.image_size)).float()
        x = F.normalize(self.vision(pixel_values=pixels).pooler_output @ self.concepts["visual_projection.weight"].T, dim=-1)
        return self._margins(x, "concept"), self._margins(x, "special_care")

    def _margins(self, x: Tensor, kind: str) -> Tensor:
        return x @ F.normalize(self.concepts[f"{kind}_embeds"], dim=-1).T - self.concepts[f"{kind}_embeds_weights"]


def load_checker(source: str, device: torch.device | str = "cpu") -> Checker:
    """The frozen checker of a folder or hub id, in the format of StableDiffusionSafetyChecker: float32, safetensors only."""
    return _load(check_source(source, "safety-checker"), full_name(device))


@load_once
def _load(source: str, device: str) -> Checker:
    from transformers import CLIPConfig, CLIPVisionModel

    path = fetch(source)
    try:
        model = CLIPVisionModel(CLIPConfig.from_pretrained(source).vision_config)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a safety checker from {source!r}: {first_line(error)}") from error
    state = {key: value for key, value in read_state(path).items() if not key.endswith("position_ids")}
    tower = {_without_stem(key): value for key, value in state.items() if key.startswith("vision_model.")}
    names = {_without_stem(key): key for key in model.state_dict()}  # transformers 4 says vision_model. before each
    rest = {key: value.float().to(device) for key, value in state.items() if not key.startswith("vision_model.")}
    for key in ("visual_projection.weight", *(f"{k}_embeds{w}" for k in ("concept", "special_care") for w in ("", "_weights"))):
        if key not in rest:
            raise UserError(f"{str(path)!r} is not a safety checker: it has no {key!r}")
    vision = fill(model, {names.get(key, key): value for key, value in tower.items()}, path)
    return Checker(vision.to(device), rest)


def _without_stem(key: str) -> str:
    while key.startswith("vision_model."):
        key = key.removeprefix("vision_model.")
    return key
