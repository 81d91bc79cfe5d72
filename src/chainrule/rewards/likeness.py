"""How similar a steered image still is to the image before: rewards for `steer` that keep it similar, and metrics."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chainrule.errors import UserError, unknown
from chainrule.rewards.base import Reward
from chainrule.rewards.classifier import Preprocessing, preprocessing_of, read_facts
from chainrule.rewards.clip import check_source, full_name
from chainrule.rewards.loaded import load_once
from chainrule.rewards.reference import Referenced
from chainrule.rewards.weights import pretrained

DINO = "facebook/dinov2-base"
NETS = ("alex", "vgg", "squeeze")


@dataclass(frozen=True)
class Identity(Referenced):
    """Likeness to the image before steering: cos(E(image), E(image before)), E a vision transformer's class token.

    Paper: arXiv:2208.12242, section 4.1 (its DINO score, against photos of the subject). Source: facebook/dinov2-base
    (Apache-2.0), or any vision transformer transformers loads. Range [-1, 1]. Preprocessing: its own
    `preprocessor_config.json`'s. In Python `encoder`, a function of images (b, 3, h, w) in [0, 1] to embeddings (b, d), takes
    its place: a face recognition network, say.
    """

    source: str = DINO
    encoder: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.encoder is None:
            check_source(self.source, "identity")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "identity" if self.source == DINO else f"identity:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        encode = self.encoder or load_encoder(self.source, images.device)
        with torch.no_grad():
            before = encode(self.before(images))
        return torch.cosine_similarity(encode(images), before, dim=-1)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        if self.encoder is None:
            load_encoder(self.source, device)
        return self


@dataclass(frozen=True)
class Encoder:
    """A frozen vision transformer's class token, with its preprocessing."""

    model: Any
    preprocess: Preprocessing

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (b, width) of images (b, 3, h, w) in [0, 1], in float32 or better."""
        states = self.model(pixel_values=self.preprocess(images).to(self.model.dtype)).last_hidden_state
        return states[:, 0].to(torch.promote_types(images.dtype, torch.float32))


def load_encoder(source: str, device: torch.device | str = "cpu") -> Encoder:
    """The frozen vision transformer of a folder or a hub id: float32, safetensors only."""
    return _load(check_source(source, "identity"), full_name(device))


@load_once
def _load(source: str, device: str) -> Encoder:
    from transformers import AutoModel

    model = pretrained(AutoModel, source, "a vision transformer")
    return Encoder(model.to(device), preprocessing_of(read_facts(source), getattr(model.config, "image_size", 224)))


@dataclass(frozen=True)
class LPIPS(Referenced):
    """Minus LPIPS, a learned perceptual distance, to the image before steering (arXiv:1801.03924).

    `source` is its network: alex, vgg or squeeze. Range up to 0. Preprocessing: [-1, 1], at the images' own size. It is
    computed by its authors' package, `pip install 'chainrule[lpips]'`, which needs a torchvision that fits torch and
    downloads that network's weights.
    """

    source: str = "alex"

    def __post_init__(self) -> None:
        if self.source not in NETS:
            raise unknown("LPIPS network", self.source, NETS)
        if importlib.util.find_spec("lpips") is None:
            raise UserError("the reward 'lpips' needs the package lpips; pip install 'chainrule[lpips]', or take 'perceptual'")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "lpips" if self.source == "alex" else f"lpips:{self.source}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        network = _lpips(self.source, full_name(images.device))
        return -network(images * 2 - 1, self.before(images) * 2 - 1).flatten()

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        _lpips(self.source, full_name(device))
        return self


@load_once
def _lpips(net: str, device: str) -> Any:
    try:
        network = importlib.import_module("lpips").LPIPS(net=net, verbose=False)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load LPIPS ({reason}); it needs torchvision and its weights, 'perceptual' does not") from error
    return network.to(device).requires_grad_(False).eval()
