"""Models without numbers: from their configurations alone, on PyTorch's meta device, where a tensor has a shape and a type only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding, guidance_is_input
from chainrule.errors import UserError
from chainrule.models import bundled
from chainrule.models.bundled import BUNDLED
from chainrule.models.families import FAMILIES, class_of, index
from chainrule.models.loading import build, check, defaults_in
from chainrule.models.model import Model
from chainrule.models.pipeline import call_default, weight_type
from chainrule.models.published import refusal
from chainrule.offload import blocks_of, lend
from chainrule.size import Size

META = torch.device("meta")
Parts = Mapping[str, tuple[type[Any], Mapping[str, Any]]]  # component -> its class and configuration
BITS = {"int8": (8.0, 2), "8bit": (8.0, 4), "4bit": (4.5, 0)}  # of a weight, its share of a block's scale included; bytes a row


def outline(
    source: str | Path, *, dtype: str = "bfloat16", size: Size | None = None, solver: str | None = None,
    quantize: str | None = None, network: str = "device",
) -> Model:  # fmt: skip
    """The model of a name, folder or hub id as `chainrule.load` opens it, without its weights. Its prompts read as zeros.

    Raises UserError as `load` does for a folder that is no model's, and for a hub id whose configuration cannot be had.
    """
    folder = _configurations(str(source))
    parts: dict[str, tuple[type[Any], Mapping[str, Any]]] = {}
    for name, kind in index(folder).items():
        place = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        if isinstance(kind, list) and kind[0] == "diffusers" and place.is_file():
            try:
                parts[name] = getattr(diffusers, kind[1]), json.loads(place.read_text())
            except (AttributeError, ValueError) as error:
                raise UserError(f"{place} is damaged: {error}") from error
    pipe = of_parts(class_of(folder), parts, getattr(torch, dtype))
    made = outlined(build(str(source), pipe, defaults_in(folder), size, solver), quantize)
    if network == "cpu":
        lend(blocks_of(made.network), META)
    return made


def _configurations(source: str) -> Path:
    """The folder of a model's configurations: of a hub id they are downloaded, without the weights."""
    if source in BUNDLED:
        return bundled.folder(source)
    if Path(source).is_dir():
        return Path(source)
    check(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration of {source!r}: {refusal(error)}; a local folder works offline") from error


def outline_of(model: Model) -> Model:
    """The outline of a live model, with its settings and with the adapters of nobody."""
    names = {"vae": model.pipe.components.get("vae"), "scheduler": model.pipe.scheduler, model.component: model.network}
    parts = {name: (type(part), dict(part.config)) for name, part in names.items() if part is not None}
    pipe = of_parts(model.family, parts, weight_type(model.network))
    made = build(model.name, pipe, model.defaults, model.size, None)
    return replace(outlined(made, model.quantize), sampler=model.sampler, asked=model.asked)


def of_parts(family: str, parts: Parts, dtype: torch.dtype, device: torch.device = META) -> Any:
    """A pipeline of these parts, with random weights on a device that holds numbers; its text encoders are empty modules."""
    if family not in FAMILIES:
        raise UserError(f"{family} is not a supported model family (supported: {', '.join(FAMILIES)})")
    kind = getattr(diffusers, family)
    made: dict[str, Any] = {}
    for name, (part, config) in parts.items():
        with made_on(device if name != "scheduler" else torch.device("cpu"), dtype):
            made[name] = part.from_config(dict(config))
    expected, optional = kind._get_signature_keys(kind)
    for name in expected - made.keys():
        made[name] = nn.Identity() if name.startswith("text_encoder") else None
    options = {"requires_safety_checker": False, "add_watermarker": False}
    pipe = kind(**made, **{name: value for name, value in options.items() if name in optional})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is made inside is made there and in this type, and nowhere else first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def outlined(model: Model, quantize: str | None = None) -> Model:
    """A model of `of_parts` whose prompts read as zeros of the right form; on the meta device its weights may be in fewer bits."""
    model.network.requires_grad_(False)
    if quantize:
        hold(model.network, *BITS[quantize])
    shape, kind, device = _words(model.pipe, model.network), weight_type(model.network), model.device

    def words(count: int) -> PromptEmbedding:
        if shape is None:
            return PromptEmbedding(torch.zeros(count, dtype=torch.long, device=device))
        tokens, width, pooled = shape
        mask = torch.ones(count, tokens, device=device, dtype=torch.long) if model.family.startswith("PixArt") else None
        made = [torch.zeros(count, *size, device=device, dtype=kind) for size in ((tokens, width), (pooled,))]
        return PromptEmbedding(made[0], made[1] if pooled else None, mask)

    def embed(prompts: Sequence[str]) -> Condition:
        positive = words(len(prompts))
        return Condition(positive, positive if guidance_is_input(model.denoiser) else words(len(prompts)))

    return replace(model, embed=embed, quantize=quantize)


def _words(pipe: Any, network: Any) -> tuple[int, int, int] | None:
    """What a network reads of a prompt: tokens, their width, and the width of its pooled vector or 0. None: a class."""
    config, tokens = network.config, call_default(pipe, "max_sequence_length", 77)
    match type(network).__name__:
        case "SD3Transformer2DModel":
            return 77 + tokens, config.joint_attention_dim, config.pooled_projection_dim
        case "FluxTransformer2DModel":
            return tokens, config.joint_attention_dim, config.pooled_projection_dim
        case "PixArtTransformer2DModel":
            return tokens, config.caption_channels, 0
        case "UNet2DConditionModel":
            times = 6 * (config.addition_time_embed_dim or 0)
            pooled = config.projection_class_embeddings_input_dim - times if config.addition_embed_type == "text_time" else 0
            return 77, config.cross_attention_dim, pooled
    return None


# Weights in fewer bits


class _Held(torch.autograd.Function):
    """x W^T, with W made from what is held for the moment of the product, forwards and backwards: as bitsandbytes does it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, shape: tuple[int, int]) -> Tensor:
        """x (..., in) to (..., out)."""
        ctx.shape = shape
        return F.linear(x, torch.empty(shape, device=x.device, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        """The gradient at x."""
        return upstream @ torch.empty(ctx.shape, device=upstream.device, dtype=upstream.dtype), None, None


class HeldLinear(nn.Linear):
    """A linear layer on the meta device whose frozen weight takes so many bits a number, and so many bytes a row besides."""

    bits: float
    row: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        found: Tensor = _Held.apply(x, self.weight, (self.out_features, self.in_features))
        return found if self.bias is None else found + self.bias


def hold(network: nn.Module, bits: float, row: int) -> None:
    """Let every linear layer of a network on the meta device take so many bits a weight and so many bytes a row."""
    for layer in list(network.modules()):
        if type(layer) is nn.Linear:
            size = int(layer.weight.numel() * bits / 8) + row * layer.out_features
            layer.__class__ = HeldLinear
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.int8, device=META), requires_grad=False)
