"""Adapters on disk: the folder plain diffusers' `load_lora_weights` reads, alone or several by level; and exact mixes."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chainrule.errors import Note, UserError
from chainrule.files import make_folder, write_text
from chainrule.tensors import write_tensors

FILE = "pytorch_lora_weights.safetensors"
BANDS = "bands.json"  # of several adapters: which is on at which levels
LEARNED = "learned"  # folder of what was learned besides adapters, a folder for each part
OTHERS = ("text_encoder", "lora_te", "unet.", "transformer.", "lora_unet_", "diffusion_model.")  # with which no layer begins
COMPONENTS = ("unet", "transformer")  # what a pipeline calls the network that denoises: the first word of every key
Spans = tuple[tuple[float, float | None], ...]


@dataclass(frozen=True, slots=True, repr=False)
class Weights:
    """A LoRA as tensors, `...to_q.lora_A.weight` (rank, in) and `...to_q.lora_B.weight` (out, rank).

    `component` is the name the pipeline has for the network they belong to.
    """

    tensors: Mapping[str, Tensor]
    alpha: float
    component: str = "unet"

    def __repr__(self) -> str:
        return f"Weights(rank {self.rank}, {len(self.targets)} layers of the {self.component})"

    @property
    def rank(self) -> int:
        """The rank of its matrices."""
        return next(t.shape[0] for k, t in self.tensors.items() if "lora_A" in k)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the adapted layers."""
        return tuple(sorted({key.split(".lora_")[0] for key in self.tensors}))

    def half(self) -> Weights:
        """The same in float16."""
        return replace(self, tensors={key: value.half() for key, value in self.tensors.items()})

    def save(self, folder: str | Path) -> Path:
        """Write `folder/pytorch_lora_weights.safetensors`; rank and alpha go into the header, as diffusers does."""
        path = make_folder(folder)
        meta = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": list(self.targets), "peft_type": "LORA"}
        meta |= {"rank_pattern": {}, "alpha_pattern": {}}  # older diffusers looks for them
        header = {"format": "pt", "lora_adapter_metadata": json.dumps({f"{self.component}.{k}": v for k, v in meta.items()})}
        write_tensors(path / FILE, {f"{self.component}.{k}": v for k, v in self.tensors.items()}, header)
        return path


def save_bands(folder: str | Path, bands: Mapping[str, Spans | None]) -> None:
    """Write down at which levels each of the adapters in `folder/NAME` is on (None: at all)."""
    write_text(Path(folder) / BANDS, json.dumps({name: {"levels": spans} for name, spans in bands.items()}, indent=2) + "\n")


def adapter_files(source: str | Path) -> dict[Path, Spans | None]:
    """The files of one adapter, or of several by level, with their levels (None: all). Raises UserError if there is none."""
    for folder in (Path(source), Path(source) / "adapter"):
        if (folder / BANDS).is_file():
            try:
                bands = json.loads((folder / BANDS).read_text())
                levels = {name: _spans(band["levels"]) for name, band in bands.items()}
                if not all(re.fullmatch(r"[\w-]+", name) for name in levels):
                    raise ValueError("a name in it is no folder's")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{folder / BANDS} is damaged ({error})") from error
            return {find(folder / name): spans for name, spans in levels.items()}
    try:
        return {find(source): None}
    except UserError:
        if learned_folders(source):  # a sampler was learned, and no adapter
            return {}
        raise


def learned_folders(source: str | Path) -> list[Path]:
    """The folders of the parts that an adapter folder or a run folder has besides its adapters."""
    for folder in (Path(source) / LEARNED, Path(source) / "adapter" / LEARNED):
        if folder.is_dir():
            return sorted(path for path in folder.iterdir() if path.is_dir())
    return []


def _spans(levels: Any) -> Spans | None:
    """As `Band` takes them. Raises ValueError or TypeError for anything but numbers."""
    if levels is None:
        return None
    spans = tuple((low, high) for low, high in levels)
    if not all(type(end) in (int, float) or (end is None and i) for span in spans for i, end in enumerate(span)):
        raise ValueError(f"levels are {levels!r}")
    return spans


def find(source: str | Path) -> Path:
    """The safetensors file of an adapter file, an adapter folder or a run folder. Raises UserError if there is none."""
    path = Path(source)
    if any((folder / BANDS).is_file() for folder in (path, path / "adapter")):
        raise UserError(f"{source} has several adapters, each for its own levels; this needs a single one")
    candidates = (path, path / FILE, path / "adapter" / FILE)
    for candidate in candidates:
        if candidate.is_file():
            if candidate.suffix != ".safetensors":
                raise UserError(f"{candidate} is not a safetensors file; pickled weights are refused")
            return candidate
    raise UserError(f"no adapter at {str(source)!r}: expected {FILE} there, or a run folder that has one")


def read(source: str | Path) -> Weights:
    """An adapter's tensors from disk, in either of diffusers' key spellings."""
    path = find(source)
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its header is no JSON ({str(error).splitlines()[0]})") from error
    component = next((name for name in COMPONENTS if all(key.startswith(f"{name}.") for key in tensors)), COMPONENTS[0])
    tensors = {
        k.removeprefix(f"{component}.").replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B."): v
        for k, v in tensors.items()
    }
    if other := next((k for k in tensors if k.startswith(OTHERS)), None):
        raise UserError(f"{path} adapts more than the denoiser ({other.split('.')[0]}), or is in another spelling than diffusers'")
    if not tensors or not all(".lora_A." in k or ".lora_B." in k for k in tensors):
        raise UserError(f"{path} holds no LoRA for the denoiser in diffusers' spelling")
    if any(key.endswith(".bias") for key in tensors):
        raise UserError(f"{path} has a LoRA with biases, which is not supported")
    check(path, tensors)
    try:
        scales = {layer: _scale(layer, tensors[f"{layer}.lora_A.weight"].shape[0], meta, component) for layer in layers(tensors)}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its header says no scale of a LoRA ({error})") from error
    ranks = {value.shape[0] for key, value in tensors.items() if ".lora_A." in key}
    if len(ranks) == 1 and len(set(scales.values())) == 1:
        return Weights(tensors, ranks.pop() * next(iter(scales.values())), component)
    return one_rank(tensors, scales, component)


def check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the first tensor, unless every layer has two matrices of finite numbers of one rank."""
    for layer in layers(tensors):
        down, up = (tensors.get(f"{layer}.lora_{half}.weight") for half in "AB")
        if down is None or up is None:
            raise UserError(f"{path} is damaged: it holds half of a LoRA for the layer {layer}")
        for name, value in ((f"{layer}.lora_A.weight", down), (f"{layer}.lora_B.weight", up)):
            if not value.is_floating_point() or value.ndim < 2 or not value.numel():
                kind = str(value.dtype).removeprefix("torch.")
                raise UserError(f"{path} is damaged: {name} is {kind} of shape {tuple(value.shape)}, no matrix of a LoRA")
            if not value.isfinite().all():
                raise UserError(f"{path} is damaged: {name} has a NaN or Inf")
        if down.shape[0] != up.shape[1]:
            raise UserError(f"{path} is damaged: the layer {layer} has ranks {down.shape[0]} and {up.shape[1]}")


def layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The adapted layers."""
    return sorted({key.split(".lora_")[0] for key in tensors})


def _scale(layer: str, rank: int, meta: Mapping[str, Any], component: str) -> float:
    """alpha / rank of a layer, as the header's LoraConfig says: layers may have an alpha of their own, by the ends of their names.

    peft takes these ends for regular expressions, diffusers writes names; an expression from a stranger's file can hang. Raises
    ValueError for one, and for an alpha that is no number or 0.
    """
    header = {key.removeprefix(f"{component}."): value for key, value in meta.items()}
    alphas = header.get("alpha_pattern") or {}
    for end in alphas:
        if not re.fullmatch(r"[\w.^-]+", end):
            raise ValueError(f"alpha_pattern has {end!r}, which is no layer's name")
    own = next((alpha for end, alpha in alphas.items() if f".{layer}".endswith(f".{end.removeprefix('^')}")), None)
    alpha = float(own if own is not None else header.get("lora_alpha", rank))
    if not alpha or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha:g}")
    return alpha / (rank**0.5 if header.get("use_rslora") else rank)


def one_rank(tensors: Mapping[str, Tensor], scales: Mapping[str, float], component: str) -> Weights:
    """Layers of different rank and scale as one adapter of scale 1: scales go into the up matrices, zeros fill up ranks."""
    rank = max(value.shape[0] for key, value in tensors.items() if ".lora_A." in key)
    filled = {}
    for key, value in tensors.items():
        axis = 0 if ".lora_A." in key else 1
        # alpha / rank can be small, and float16 ends at 6e-8.
        scaled = value if axis == 0 else value.to(torch.promote_types(value.dtype, torch.float32)) * scales[key.split(".lora_")[0]]
        missing = [rank - value.shape[i] if i == axis else value.shape[i] for i in range(value.ndim)]
        filled[key] = torch.cat([scaled, value.new_zeros(missing)], axis) if missing[axis] else scaled
    return Weights(filled, float(rank), component)


def mix(weights: Mapping[str, float] | Mapping[Path, float]) -> Weights:
    """The exact sum of scaled adapters, as one: ranks concatenate (arXiv:2309.17400, section 5.3).

    sum_j s_j * alpha_j / r_j * B_j A_j = [B_1 ... B_n] diag(...) [A_1; ...; A_n]. Raises UserError when two of them adapt
    different layers.
    """
    if not weights:
        raise UserError("nothing to mix: give at least one adapter and its weight")
    loaded = [(read(source), weight, str(source)) for source, weight in weights.items()]
    for source in weights:
        if learned_folders(source):
            warnings.warn(Note(f"{source} learned a sampler too, which is no part of a mix"), stacklevel=2)
    first = loaded[0][0]
    for other, _, source in loaded[1:]:
        if other.targets != first.targets:
            raise UserError(f"{source} adapts other layers than {loaded[0][2]}; they cannot be mixed")
    tensors = {}
    for target in first.targets:
        down, up = f"{target}.lora_A.weight", f"{target}.lora_B.weight"
        tensors[down] = torch.cat([w.tensors[down] for w, _, _ in loaded])
        # In float32 or better: scales can be small, and float16 ends at 6e-8.
        ups = [w.tensors[up].to(torch.promote_types(w.tensors[up].dtype, torch.float32)) for w, _, _ in loaded]
        tensors[up] = torch.cat([b * (scale * w.alpha / w.rank) for b, (w, scale, _) in zip(ups, loaded, strict=True)], 1)
    return Weights(tensors, float(sum(w.rank for w, _, _ in loaded)), first.component)
