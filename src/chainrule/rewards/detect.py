"""An open-vocabulary object detector as a reward: more of a thing in the image, or with a minus less of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward
from chainrule.rewards.clip import check_source, full_name, normalize, resize
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import first_line, pretrained

OWL = "google/owlvit-base-patch32"


@dataclass(frozen=True)
class _OpenVocabulary(Reward):
    """What the two rewards of a detector share: the text that is looked for, and the detector."""

    text: str
    source: str = OWL

    def __post_init__(self) -> None:
        check_source(self.source, "detector")
        _queries(self.text)

    def to(self, device: torch.device | str) -> Reward:
        """Load the networks onto `device` now. Returns the reward."""
        load_owl(self.source, device)
        return self


@dataclass(frozen=True)
class Detection(_OpenVocabulary):
    """How much of `text` a detector finds: the sum of sigmoid(logit) over its boxes and over the queries of `text`.

    DRaFT, Appendix B.6 (arXiv:2309.17400), which subtracts it to remove things. A comma separates queries: "a person, people".
    No threshold: every box counts a little. Source: google/owlvit-base-patch32 (licence: see its card), or any OWL-ViT or OWLv2, as
    google/owlv2-base-patch16-ensemble. Range 0 to boxes times queries. Preprocessing: for OWL-ViT bicubic to the model's
    square, whatever the aspect; for OWLv2 see `pad_and_shrink`.
    """

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"detect:{'' if self.source == OWL else self.source + ':'}{self.text}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits, _ = load_owl(self.source, images.device)(images, _queries(self.text))
        return logits.sigmoid().sum((1, 2))


@dataclass(frozen=True)
class DetectedArea(_OpenVocabulary):
    """How much of the picture is `text`: `Detection` with each score times its box's width and height.

    The other form of DRaFT's Appendix B.6. Both are shares of what the model sees, so for OWLv2 of the padded square.
    """

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"area:{'' if self.source == OWL else self.source + ':'}{self.text}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        logits, boxes = load_owl(self.source, images.device)(images, _queries(self.text))
        return (logits.sigmoid().sum(-1) * boxes[..., 2] * boxes[..., 3]).sum(-1)


def _queries(text: str) -> list[str]:
    """The queries a text names. Raises UserError if it names none."""
    if found := [query.strip() for query in text.split(",") if query.strip()]:
        return found
    raise UserError("say what to detect, as in 'detect:a person, people'")


@dataclass(frozen=True)
class Owl:
    """A frozen OWL-ViT or OWLv2 and its tokenizer, on one device."""

    model: Any
    tokenizer: Any

    def __call__(self, images: Tensor, queries: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Logits (b, boxes, queries) and boxes (b, boxes, 4): center, width and height as shares of what the model sees."""
        side = self.model.config.vision_config.image_size
        square = pad_and_shrink(images, side) if self.model.config.model_type == "owlv2" else resize(images, (side, side))
        found, _ = self.model.image_embedder(normalize(square).float())
        patches = found.flatten(1, 2)
        words = self.embed(queries, images.device).expand(len(images), -1, -1)
        logits, _ = self.model.class_predictor(patches, words, torch.ones(words.shape[:2], device=images.device) > 0)
        return logits, self.model.box_predictor(patches, found)

    @torch.no_grad()
    def embed(self, queries: Sequence[str], device: torch.device) -> Tensor:
        """Unit text embeddings (queries, d). The model was trained on queries padded to its length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(queries), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        owl = getattr(self.model, self.model.base_model_prefix)
        out = owl.text_model(input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device))
        return F.normalize(owl.text_projection(out.pooler_output), dim=-1)


def pad_and_shrink(images: Tensor, size: int) -> Tensor:
    """OWLv2's geometry: gray at the bottom and right to a square, a Gaussian blur where it shrinks, linear interpolation.

    As its authors train and evaluate it (a deviation of (factor - 1) / 2 pixels, mirrored edges). Differs from transformers
    5.23, whose processor pads with black; on square images the two agree.
    """
    height, width = images.shape[-2:]
    longest = max(height, width)
    x = F.pad(images if images.dtype == torch.float64 else images.float(), (0, longest - width, 0, longest - height), value=0.5)
    if longest == size:
        return x
    shrink = _shrink(longest, size).to(x)
    return shrink @ x @ shrink.T


@lru_cache(maxsize=8)
def _shrink(before: int, after: int) -> Tensor:
    """The matrix (after, before) that blurs and interpolates one side, float64."""
    factor = before / after
    blur = torch.eye(before, dtype=torch.float64)
    if factor > 1:
        deviation = (factor - 1) / 2
        reach = int(4 * deviation + 0.5)
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        weights = (-0.5 * (offsets / deviation) ** 2).exp()
        blur = _gather(torch.arange(before)[:, None] + offsets.long(), (weights / weights.sum()).expand(before, -1), before)
    at = (torch.arange(after, dtype=torch.float64) + 0.5) * factor - 0.5
    low = at.floor()
    weights = torch.stack([1 - (at - low), at - low], -1)
    return _gather(torch.stack([low, low + 1], -1).long(), weights, before) @ blur


def _gather(places: Tensor, weights: Tensor, before: int) -> Tensor:
    """Rows of a matrix from the pixels they read, mirrored about the centers of the outermost ones, and their weights."""
    period = max(2 * (before - 1), 1)
    places = places.remainder(period)
    places = torch.where(places >= before, period - places, places)
    return torch.zeros(len(places), before, dtype=torch.float64).scatter_add_(1, places, weights.contiguous())


def load_owl(source: str, device: torch.device | str = "cpu") -> Owl:
    """The frozen detector of a folder or hub id: float32, safetensors only."""
    return _load(check_source(source, "detector"), full_name(device))


@load_once
def _load(source: str, device: str) -> Owl:
    from transformers import AutoConfig, AutoTokenizer, Owlv2ForObjectDetection, OwlViTForObjectDetection

    kinds = {"owlvit": OwlViTForObjectDetection, "owlv2": Owlv2ForObjectDetection}
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a detector from {source!r}: {first_line(error)}") from error
    if kind not in kinds:
        raise UserError(f"{source!r} is a {kind}, not an OWL-ViT or OWLv2 detector")
    return Owl(pretrained(kinds[kind], source, "a detector").to(device), tokenizer)
