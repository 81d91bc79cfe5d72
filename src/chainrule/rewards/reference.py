"""Rewards that compare an image with another one: with a style picture, or with itself before it was steered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, load_clip, normalize, resize_and_crop
from chainrule.rewards.loaded import load_once
from chainrule.rewards.scorers import CLIP_L


def layers(images: Tensor, source: str) -> tuple[Tensor, ...]:
    """The hidden states of CLIP's vision tower, each (b, tokens, width); the first is the patches' embedding."""
    clip = load_clip(source, "clip", images.device)
    pixels = normalize(resize_and_crop(images, clip.size)).to(clip.model.visual_projection.weight.dtype)
    return tuple(clip.model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states)


def perceptual(images: Tensor, reference: Tensor, source: str = "tiny") -> Tensor:
    """The perceptual distance of images (b, 3, h, w) to others, by CLIP's vision layers: (b,), in [0, 4].

    LPIPS' formula (arXiv:1801.03924) without its trained weights, on CLIP's vision layers instead of a VGG's: every
    token's state is brought to unit length, squared differences are summed over width and averaged over tokens and layers.
    A stand-in that needs no download; its values are not comparable with LPIPS'.
    """
    pairs = zip(layers(images, source)[1:], layers(reference, source)[1:], strict=True)
    unit = torch.nn.functional.normalize
    return torch.stack([(unit(a, dim=-1) - unit(b, dim=-1)).square().sum(-1).mean(1) for a, b in pairs]).mean(0)


@dataclass(frozen=True)
class Referenced(Reward):
    """A reward that compares the image with `reference` (b, 3, h, w), the image before it was steered."""

    source: str = CLIP_L
    reference: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_source(self.source, "clip")

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.source, "clip", device)
        return self

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return replace(self, reference=reference)

    def before(self, images: Tensor) -> Tensor:
        """The images before steering, (b, 3, h, w); gray if the reward was given none.

        Raises UserError if there are more or fewer of them than images.
        """
        if self.reference is None:
            return torch.full_like(images, 0.5)  # so that `probe` can try the reward before there is a reference
        if len(self.reference) != len(images):
            raise UserError(f"reward {self.name!r} got {len(images)} images but {len(self.reference)} references")
        return self.reference.to(images)


@dataclass(frozen=True)
class Perceptual(Referenced):
    """Minus the perceptual distance to the image before steering; see `perceptual`. For `steer`. Range [-4, 0]."""

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "perceptual" if self.source == CLIP_L else f"perceptual:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return -perceptual(images, self.before(images), self.source)


@dataclass(frozen=True)
class Directional(Referenced):
    """Directional CLIP: does the image change as the text does? cos(E(image) - E(image before), E(text) - E(text before)).

    Paper: arXiv:2108.00946, section 4.2.

    `text` is "FROM to TO", as in "a face to an angry face". An image that has not changed has no direction: its reward is
    zero. Source and preprocessing as `CLIPScore`. Range [-1, 1].
    """

    text: str = "a photo to a painting"

    def __post_init__(self) -> None:
        check_source(self.source, "clip")
        if self.text.count(" to ") != 1:
            raise UserError(f"directional is {self.text!r}, but must say from what to what, as in 'a face to an angry face'")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"directional:{'' if self.source == CLIP_L else self.source + ':'}{self.text}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.source, "clip", images.device)
        now, texts = clip.embed(normalize(resize_and_crop(images, clip.size)), self.text.split(" to "))
        with torch.no_grad():
            before = clip.image(normalize(resize_and_crop(self.before(images), clip.size)))
        return torch.cosine_similarity(now - before, texts[1:] - texts[:1], dim=-1, eps=1e-6)


@dataclass(frozen=True)
class Style(Reward):
    """Minus the squared distance of Gram matrices to a picture's, on one layer of CLIP's vision tower.

    -||G(picture) - G(image)||_F^2 with G = F^T F / tokens of the patches' states F (SDO, arXiv:2505.07477, Eq. 24;
    arXiv:1508.06576). The third layer is the paper's. Source and preprocessing as `CLIPScore`. Range up to 0.
    """

    picture: str
    layer: int = 3
    source: str = CLIP_L

    def __post_init__(self) -> None:
        if not Path(self.picture).is_file():
            raise UserError(f"no style picture {self.picture!r}")
        check_source(self.source, "clip")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"style:{'' if self.source == CLIP_L else self.source + ':'}{self.picture}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        wanted = _gram_of(self.picture, _changed(self.picture), self.layer, self.source, full_name(images.device))
        return -(_gram(images, self.layer, self.source) - wanted).square().sum((1, 2))

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        _gram_of(self.picture, _changed(self.picture), self.layer, self.source, full_name(device))
        return self


def _gram(images: Tensor, layer: int, source: str) -> Tensor:
    """(b, width, width), without the class token."""
    states = layers(images, source)
    if not 1 <= layer < len(states):
        raise UserError(f"layer is {layer}, but the vision tower of {source!r} has 1 to {len(states) - 1}")
    patches = states[layer][:, 1:]
    return patches.transpose(1, 2) @ patches / patches.shape[1]


def _changed(picture: str) -> int:
    """When a file was last written, in nanoseconds. It is part of the cache's key, so that a replaced picture is read again."""
    return Path(picture).stat().st_mtime_ns


@load_once
def _gram_of(picture: str, changed: int, layer: int, source: str, device: str) -> Tensor:
    try:
        with Image.open(picture) as opened:
            image: Any = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the style picture {picture!r}: {' '.join(str(error).split())}") from error
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None].to(device)
    with torch.no_grad():
        return _gram(pixels, layer, source)
