"""CLIP as a frozen, differentiable network: exact preprocessing on tensors, and one loader for every CLIP-based reward.

The official scorers resize with Pillow, which works on 8 bits and rounds after each of its two passes. Doing the same,
with straight-through rounding, gives their pixels back (99-100 % of values identical) and still passes a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.errors import UserError
from chainrule.offload import streamed
from chainrule.rewards import openclip
from chainrule.rewards.loaded import load_once
from chainrule.rewards.weights import HUB_FILE, PICKLED, fetch, first_line, pretrained, tokenizer_of

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP, per RGB channel in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
BUNDLED = Path(__file__).parent.parent / "tiny" / "weights"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZERS = {"yuvalkirstain/PickScore_v1": CLIP_H, "adams-story/HPSv2-hf": CLIP_H}  # models whose text side is their parent's
TOGETHER = 4  # texts embedded at a time, always as many, so that none depends on its company
MOST_TEXTS = 2**16  # that are remembered
SINGLE = (".pt", ".pth", ".safetensors")
# Kinds whose weights are published as one file, which may be given as it is, and what such a file's name ends in.
OFFICIAL = {"hps": SINGLE, "imagereward": SINGLE, "aesthetic": SINGLE, "hpsv3": (".safetensors",)}


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Resize the shortest side to `size` and crop the center, as CLIPImageProcessor does: (b, 3, size, size) in [0, 1].

    Images that are `size` on their shortest side already keep their values, unrounded.
    """
    images = resize_shortest(images, size)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def crop(images: Tensor, size: int) -> Tensor:
    """The center (b, 3, size, size) of images (b, 3, h, w), as torchvision crops it.

    It rounds half a pixel to the even one, where CLIP's processor rounds down.
    """
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def resize_shortest(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Resize images (b, 3, h, w) in [0, 1] so that the shortest side is `size`; the other is in proportion, rounded down."""
    height, width = images.shape[-2:]
    longest = int(size * max(height, width) / min(height, width))
    return resize(images, (longest, size) if width <= height else (size, longest), mode)


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Resize the longest side to `size` and center on black, as HPSv2 does (open_clip's ResizeMaxSize): (b, 3, size, size)."""
    longest = max(images.shape[-2:])
    height, width = (max(1, round(side * size / longest)) for side in images.shape[-2:])
    down, right = size - height, size - width
    return F.pad(resize(images, (height, width)), (right // 2, right - right // 2, down // 2, down - down // 2))


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """(b, 3, h, w) in [0, 1] -> a model's units, zero mean and unit variance per channel; CLIP's unless others are given."""
    return (images - images.new_tensor(mean).view(1, 3, 1, 1)) / images.new_tensor(std).view(1, 3, 1, 1)


def resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Resize to (height, width) as Pillow does, "bicubic" or "bilinear": the horizontal pass, 8 bits, the vertical pass, 8 bits.

    In float32 unless float64 is given. A side that has its size already is left alone, unrounded. Pillow 13 takes the
    vertical pass first where the height shrinks much more than the width; the models were trained with older ones.
    """
    x = images if images.dtype == torch.float64 else images.float()  # no half-precision antialias kernels on CPU
    for step in ((x.shape[-2], size[1]), size):
        if tuple(x.shape[-2:]) != step:
            x = _eight_bits(F.interpolate(x, size=step, mode=mode, align_corners=False, antialias=True))
    return x


def _eight_bits(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x + ((x * 255).round() / 255 - x).detach()


@dataclass(frozen=True)
class Clip:
    """A frozen CLIPModel and its tokenizer, on one device."""

    model: Any  # transformers.CLIPModel
    tokenizer: Any
    known: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # of texts

    @property
    def size(self) -> int:
        """Side of the square images the vision tower reads, in pixels."""
        return int(self.model.config.vision_config.image_size)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), the learned inverse temperature; 100 for most models."""
        return self.model.logit_scale.exp()

    def image(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (b, 3, size, size) -> unit embeddings (b, d), in float32 or better."""
        seen = self.model.vision_model(pixel_values=pixels.to(self.model.visual_projection.weight.dtype)).pooler_output
        return _unit(self.model.visual_projection(seen))

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> unit embeddings (n, d), made once for each, to the bit the same in any company, and without a gradient.

        Prompts are cut at the model's length. They are padded to it, so that no prompt depends on its neighbours.
        """
        length, device = self.model.config.text_config.max_position_embeddings, self.model.visual_projection.weight.device
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        if len(self.known) + len(new) > MOST_TEXTS:
            self.known.clear()
            new = list(dict.fromkeys(prompts))
        for i in range(0, len(new), TOGETHER):
            some = new[i : i + TOGETHER]
            some += some[-1:] * (TOGETHER - len(some))
            tokens = self.tokenizer(some, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            given = {key: tokens[key].to(device) for key in ("input_ids", "attention_mask")}
            with torch.autocast(device.type, enabled=False) if lowered(device) else nullcontext():  # exact: they cost nothing
                said = _unit(self.model.text_projection(self.model.text_model(**given).pooler_output))
            self.known.update(zip(some, said, strict=True))
        return torch.stack([self.known[prompt] for prompt in prompts])

    def embed(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Normalized pixels (b, 3, size, size) and n prompts -> unit image (b, d) and text (n, d) embeddings."""
        return self.image(pixels), self.text(prompts)

    def cosine(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine between each image and its prompt, (b,)."""
        image, text = self.embed(pixels, prompts)
        return (image * text).sum(-1)


def _unit(features: Tensor) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features / features.norm(dim=-1, keepdim=True)


def check_source(source: str, kind: str, needs: Sequence[str] = ("config.json",)) -> str:
    """The folder or hub id `source` stands for ("tiny": the bundled `kind`), without loading anything.

    A kind of `OFFICIAL` may be one file too, in a folder or on the hub (owner/name/file).
    Raises UserError for a folder that is missing, lacks one of the files `needs` or has only pickled weights, and for a
    text that is neither a folder nor a hub id.
    """
    folder = BUNDLED / kind if source == "tiny" else Path(source).expanduser()
    pickled = "pickled weights can run code when opened; convert them to safetensors and give that folder"
    if folder.suffix in OFFICIAL.get(kind, ()):
        if not folder.is_file() and not HUB_FILE.fullmatch(source):
            raise UserError(f"no file {source!r}")
        return str(folder) if folder.is_file() else source
    if folder.suffix in PICKLED:
        raise UserError(f"refusing {source!r}: {pickled}")
    if not folder.is_dir():
        if source == "tiny" and kind not in ("aesthetic", "classifier", "clip", "hps", "pick"):
            raise UserError(f"there is no tiny {kind}; give a folder or a hub id")
        if source == "tiny":
            raise UserError(f"the bundled reward weights are missing: no folder {folder}")
        if folder.exists():
            raise UserError(f"{source!r} is a file; give the folder it is in")
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
            raise UserError(f"no folder {source!r} (a source is a local folder, a hub id like owner/name, or 'tiny')")
        return source
    if not any(folder.glob("*.safetensors")):
        if any(file.suffix in PICKLED for file in folder.iterdir()):
            raise UserError(f"refusing {str(folder)!r}, which has no safetensors file: {pickled}")
        raise UserError(f"no safetensors weights in {str(folder)!r}")
    if missing := [name for name in needs if not (folder / name).is_file()]:
        raise UserError(f"no {missing[0]} in {str(folder)!r}, so it is not a saved transformers model")
    return str(folder)


def load_clip(source: str, kind: str = "clip", device: torch.device | str = "cpu") -> Clip:
    """The frozen CLIP of a local folder, a hub id, or the bundled `kind` ("tiny"): float32, safetensors only.

    The same source and device give the same object, so rewards share weights. Within an autocast (`On`'s) the image tower has
    that type. On a GPU the text tower stays on the CPU, and its layers are moved in while it reads. `hps` may also be an
    open_clip checkpoint, which is converted; its tokenizer is the one in its folder, or CLIP-H's. Raises UserError as
    `check_source` does, and if the hub has no such model or no safetensors for it.
    """
    name = full_name(device)
    return _load(check_source(source, kind), name, lowered(torch.device(name)) or torch.float32)


def lowered(device: torch.device) -> torch.dtype | None:
    """The type of an autocast on this device, if this is within one."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


def full_name(device: torch.device | str) -> str:
    """A device's name with its index, so that "cuda" and "cuda:0" are the same key."""
    return str(torch.empty(0, device=device).device)


@load_once
def _load(source: str, device: str, image_type: torch.dtype) -> Clip:
    from transformers import AutoTokenizer, CLIPModel

    if Path(source).suffix in (".pt", ".safetensors"):
        file = fetch(source)
        return Clip(_placed(openclip.load(file), device, image_type), tokenizer_of(file, CLIP_H))
    model = pretrained(CLIPModel, source, "a CLIP model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS.get(source, source))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {source!r}: {first_line(error)}") from error
    return Clip(_placed(model, device, image_type), tokenizer)


def _placed(model: Any, device: str, image_type: torch.dtype) -> Any:
    """Image tower, projections and temperature on the device; the text tower too, if that is the CPU."""
    for part in (model.vision_model, model.visual_projection):
        part.to(image_type)
    if device == "cpu":
        return model
    for name, part in model.named_children():
        streamed(part, device) if name == "text_model" else part.to(device)
    model.logit_scale.data = model.logit_scale.data.to(device)
    return model
