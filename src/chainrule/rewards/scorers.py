"""Learned rewards built on CLIP. A class's docstring is its card: formula, source, licence, range, preprocessing.

`source` is a hub id, a local folder in the `CLIPModel.save_pretrained` format, or "tiny" for the model bundled with
tiny-emoji. Making a reward loads nothing; the weights arrive on the first call, or with `.to(device)`, on that device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import (
    check_source,
    crop,
    full_name,
    load_clip,
    normalize,
    resize_and_crop,
    resize_and_pad,
    resize_shortest,
)
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import fetch, fill, read_state

CLIP_L = "openai/clip-vit-large-patch14"
AESTHETIC = "ttj/sac-logos-ava1-l14-linearMSE"
HPS_21 = "xswu/HPSv2/HPS_v2.1_compressed.pt"


@dataclass(frozen=True)
class CLIPScore(Reward):
    """CLIP score, the agreement of image and prompt: cos(image, text).

    Paper: arXiv:2104.08718. Differs from the paper: no factor 2.5, no cut at zero (no gradient there), no prefix.
    Source: openai/clip-vit-large-patch14 (MIT), or any CLIPModel. Range [-1, 1], in practice 0.1 to 0.35.
    Preprocessing: bicubic to the shortest side, center crop. `text`, where given, is read instead of the prompts.
    """

    source: str = CLIP_L
    text: str | None = None

    def __post_init__(self) -> None:
        check_source(self.source, "clip")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("clip", self.source, CLIP_L) + (f":{self.text}" if self.text else "")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.source, "clip", images.device)
        texts = [self.text] * len(images) if self.text else prompts
        return clip.cosine(normalize(resize_and_crop(images, clip.size)), texts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.source, "clip", device)
        return self


@dataclass(frozen=True)
class PickScore(Reward):
    """PickScore, which of two images people would pick for a prompt: exp(logit_scale) cos(image, text).

    Paper: arXiv:2305.01569. Source: yuvalkirstain/PickScore_v1 (CLIP-H fine-tuned on Pick-a-Pic; MIT), with the
    tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Range [-100, 100], in practice 15 to 25; 1 more multiplies the
    odds of being picked by e. Where 0.2 is reported, the scale of 100 was left out. Preprocessing: bicubic to the
    shortest side, center crop.
    """

    source: str = "yuvalkirstain/PickScore_v1"

    def __post_init__(self) -> None:
        check_source(self.source, "pick")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("pickscore", self.source, "yuvalkirstain/PickScore_v1")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.source, "pick", images.device)
        return clip.scale * clip.cosine(normalize(resize_and_crop(images, clip.size)), prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.source, "pick", device)
        return self


@dataclass(frozen=True)
class HPSv2(Reward):
    """Human Preference Score v2: cos(image, text).

    Paper: arXiv:2306.09341. Source: adams-story/HPSv2-hf, a CLIPModel copy (hidden_act "gelu") of xswu/HPSv2 (CLIP-H
    fine-tuned on HPD v2; Apache-2.0), with the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. The repository itself
    holds a pickle, which is refused; transformers then takes the safetensors of its conversion pull request. The official
    file does too: xswu/HPSv2/HPS_v2_compressed.pt, or a path to it; see `HPSv21`.
    Range [-1, 1], in practice 0.2 to 0.35. Preprocessing, unlike PickScore's: bicubic to the longest side, padded with
    black; on square images the two agree.
    """

    source: str = "adams-story/HPSv2-hf"

    def __post_init__(self) -> None:
        check_source(self.source, "hps")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("hpsv2", self.source, "adams-story/HPSv2-hf")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = load_clip(self.source, "hps", images.device)
        return clip.cosine(normalize(resize_and_pad(images, clip.size)), prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.source, "hps", device)
        return self


@dataclass(frozen=True)
class HPSv21(Reward):
    """Human Preference Score v2.1: `HPSv2`'s formula and preprocessing with its authors' newer weights.

    Source: HPS_v2.1_compressed.pt of xswu/HPSv2 (CLIP-H; Apache-2.0), an open_clip checkpoint that is converted on loading;
    a path to that file does too. A .pt is opened for its tensors alone (`weights_only`). Tokenizer and range as `HPSv2`.
    """

    source: str = HPS_21

    def __post_init__(self) -> None:
        check_source(self.source, "hps")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("hpsv2.1", self.source, HPS_21)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return HPSv2(self.source)(images, prompts)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.source, "hps", device)
        return self


@dataclass(frozen=True)
class Aesthetic(Reward):
    """LAION aesthetic predictor v2: head(image / |image|), a rating of the image alone. Prompts are ignored.

    Source: the head is ttj/sac-logos-ava1-l14-linearMSE (Apache-2.0; safetensors of sac+logos+ava1-l14-linearMSE from
    christophschuhmann/improved-aesthetic-predictor), on openai/clip-vit-large-patch14 (MIT). Trained on ratings from
    1 to 10 but unbounded, in practice 4 to 7. Preprocessing: that of OpenAI's clip, bicubic to the shortest side and
    torchvision's center crop. With source "tiny" both parts are the bundled ones.
    """

    source: str = AESTHETIC
    clip: str = CLIP_L

    def __post_init__(self) -> None:
        check_source(self.source, "aesthetic", needs=())
        check_source(self.clip_source, "clip")

    @property
    def clip_source(self) -> str:
        """The source of the CLIP whose features the head reads; the bundled head's is the bundled CLIP."""
        return "tiny" if self.source == "tiny" and self.clip == CLIP_L else self.clip

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return _name("aesthetic", self.source, AESTHETIC)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        image, head = features_and_head(self, images)
        return head(image)[:, 0]

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_clip(self.clip_source, "clip", device)
        _load_head(check_source(self.source, "aesthetic", needs=()), full_name(device))
        return self


def features_and_head(reward: Aesthetic, images: Tensor) -> tuple[Tensor, nn.Sequential]:
    """CLIP's features (b, d) of images (b, 3, h, w), of unit length, and the head that rates them.

    Raises UserError if the head was made for features of another width.
    """
    clip = load_clip(reward.clip_source, "clip", images.device)
    head = _load_head(check_source(reward.source, "aesthetic", needs=()), full_name(images.device))
    image = clip.image(normalize(crop(resize_shortest(images, clip.size), clip.size)))
    if image.shape[-1] != head[0].in_features:
        dims = f"{head[0].in_features} features and {reward.clip_source!r} gives {image.shape[-1]}"
        raise UserError(f"the aesthetic head {reward.source!r} reads {dims}; use the CLIP it was trained on")
    return image, head


def aesthetic_head(dim: int) -> nn.Sequential:
    """The LAION MLP on `dim` CLIP features: five linear layers and dropout between them, no activations.

    The linear layers sit at 0, 2, 4, 6, 7: the official keys `layers.0.weight` ... `layers.7.bias` without `layers.`.
    """
    return nn.Sequential(
        nn.Linear(dim, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


@load_once
def _load_head(source: str, device: str) -> nn.Sequential:
    """The frozen head of a file (LAION's own .pth too), a folder (its safetensors file) or a hub id, in float32."""
    path = fetch(source)
    state = {key.removeprefix("layers."): value.float() for key, value in read_state(path).items()}
    if "0.weight" not in state or state["0.weight"].ndim != 2:
        raise UserError(f"{path} is not an aesthetic head: it has no '0.weight' or 'layers.0.weight'")
    head: nn.Sequential = fill(aesthetic_head(state["0.weight"].shape[1]), state, path)
    return head.to(device)


def _name(word: str, source: str, default: str) -> str:
    return word if source == default else f"{word}:{source}"
