"""Loading: the bundled model, a local diffusers folder, a hub id, or a pipeline object."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chainrule.adapters.files import COMPONENTS
from chainrule.errors import UserError, unknown
from chainrule.models import bundled
from chainrule.models.bundled import BUNDLED
from chainrule.models.compiled import channels_last, check_compiler, compiled
from chainrule.models.defaults import Defaults
from chainrule.models.embeddings import check_cache, place
from chainrule.models.families import FAMILIES, class_of, index
from chainrule.models.given import prepare
from chainrule.models.model import Model
from chainrule.models.pipeline import call_default
from chainrule.models.published import refusal
from chainrule.models.quantize import check as check_quantization
from chainrule.models.quantize import quantization
from chainrule.models.solvers import check as check_solver
from chainrule.models.solvers import check_scheduler
from chainrule.offload import blocks_of, lend
from chainrule.processes import ALONE, Processes, default_device
from chainrule.shards import holders, shard
from chainrule.size import Size, size_of

UNUSED = ("safety_checker", "feature_extractor")  # components that are not asked for anything and may be absent
SETTINGS = "chainrule.json"  # how a model is best sampled, in its folder
PLACES = {"text_encoders": ("device", "cpu"), "network": ("device", "cpu", "shard")}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}


def _family(class_name: str) -> Any:
    if class_name not in FAMILIES:
        raise UserError(
            f"{class_name} is not a supported model family (supported: {', '.join(FAMILIES)}); "
            "for another one, build a chainrule.models.Model yourself (docs/models.md)"
        )
    return importlib.import_module(f"chainrule.models.{FAMILIES[class_name].module}")


def _check_components(folder: Path, solver: str | None) -> None:
    """Every component the pipeline says it has is there, and its scheduler is one that can be reproduced or replaced."""
    for component, kind in index(folder).items():
        if isinstance(kind, list) and kind[0] and component not in UNUSED and not (folder / component).is_dir():
            raise UserError(f"{folder} is incomplete: it has no {component} folder")
    settings = folder / "scheduler" / "scheduler_config.json"
    if settings.is_file():
        try:
            check_scheduler(str(json.loads(settings.read_text()).get("_class_name")), solver)
        except (ValueError, AttributeError) as error:
            raise UserError(f"{settings} is damaged: {error}") from error


def _check_weights(folder: Path) -> None:
    for component in FAMILIES[class_of(folder)].components:
        place = folder / component
        if not place.is_dir():
            raise UserError(f"{folder} is incomplete: it has no {component} folder")
        if not any(place.glob("*.safetensors")):
            pickled = [p.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for p in place.glob(pattern)]
            if pickled:
                raise UserError(f"{place / pickled[0]} is a pickle, which can run code; convert it to safetensors first")
            raise UserError(f"{folder} is incomplete: {component} has no .safetensors weights")


def check(source: str | Path, solver: str | None = None) -> None:
    """Everything about a model's name that can be checked without loading it. Raises UserError."""
    if str(source) in BUNDLED:
        return
    folder = Path(source)
    if folder.is_dir():
        _family(class_of(folder))
        _check_weights(folder)
        _check_components(folder, solver)
    elif folder.exists():
        raise UserError(f"{folder} is a file; give a diffusers folder, a hub id or one of {', '.join(BUNDLED)}")
    elif str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise unknown("model", str(source), BUNDLED)


def defaults_in(folder: Path) -> Defaults | None:
    """How a model says that it is best sampled, in its folder. Raises UserError for a damaged file."""
    settings = folder / SETTINGS
    if not settings.is_file():
        return None
    try:
        values = json.loads(settings.read_text())
        size = None if values.get("size") is None else size_of(values["size"])
        return Defaults(**values | {"labels": tuple(values.get("labels", ())), "size": size})
    except (ValueError, TypeError) as error:
        raise UserError(f"{settings} is damaged: {error}") from error


def load(
    source: Any, *, dtype: str | torch.dtype = "float32", device: str | None = None, solver: str | None = None,
    size: int | str | Sequence[int] | None = None, quantize: str | None = None, text_encoders: str = "device",
    network: str = "device", shards: int | None = None, compile: bool = False, prompt_cache: str | Path | None = None,
) -> Model:  # fmt: skip
    """A model from a name (`tiny-emoji`), a local diffusers folder, a hub id (`owner/name`) or a pipeline object.

    A pipeline object is used as it is; otherwise `dtype` is the weights' type (torch.bfloat16, "bfloat16", "bf16"), and
    `device` defaults to the GPU if there is one. `solver` samples by another solver than the pipeline's own scheduler. `size`
    is that of the images in pixels: 512, a square; (768, 1024) or "768x1024", height and width. `quantize` holds the
    denoiser's weights in fewer bits: int8 (torchao), 8bit or 4bit (bitsandbytes, on a GPU); adapters stay in float32.
    `text_encoders="cpu"` leaves those of a pipeline that is opened here on the CPU and moves their layers to the device one
    after the other while they are asked; then `model.pipe` by itself cannot be called. `network="cpu"` does the same with the
    blocks of the network, for cards that are too small for it; a gradient then wants `memory="blocks"`.
    `network="shard"` shares them out over the processes that were launched (`chainrule.shards`), or over every `shards` of them.
    `compile` lets torch.compile make the network faster, a minute or more after the first call of a kind. `prompt_cache` is a
    folder where `embedded` keeps the embeddings of prompts. Only safetensors are read. UNets are opened in the channels-last
    layout, which convolutions are faster in.
    Raises UserError in one line before anything heavy is loaded.
    """
    dtype = _checked(dtype, solver, quantize, text_encoders, network, shards, compile)
    pixels = None if size is None else size_of(size)
    device = _device(device)
    if compile:
        check_compiler(device)
    cache = None if prompt_cache is None else check_cache(prompt_cache)
    if not isinstance(source, (str, Path)):
        if network == "shard":
            raise UserError("network is 'shard', but a pipeline object is used as it is; give its folder or hub id")
        _family(type(source).__name__)
        prepare(source, FAMILIES[type(source).__name__].network)
        made = build(type(source).__name__, source, None, pixels, solver)
        return replace(compiled(made) if compile else made, prompt_cache=cache)
    check(source, solver)
    name = str(source)
    if name in BUNDLED:
        source = bundled.folder(name)
    if name in BUNDLED and not (Path(source) / SETTINGS).is_file():
        raise UserError(f"the bundled model {name} is missing from this installation; reinstall chainrule")
    defaults = defaults_in(Path(source))
    processes = holders(torch.device(device), shards) if network == "shard" else ALONE
    pipe = _open(Path(source), name, dtype, quantize)
    _family(type(pipe).__name__)
    pipe.set_progress_bar_config(disable=True)
    _put(pipe, device, text_encoders, network, processes, shards)
    made = build(name, pipe, defaults, pixels, solver)
    return replace(compiled(made) if compile else made, quantize=quantize, prompt_cache=cache)


def _checked(
    dtype: str | torch.dtype, solver: str | None, quantize: str | None, text_encoders: str, network: str, shards: int | None,
    compile: bool,
) -> str:  # fmt: skip
    """The type by its name. Raises UserError for an option that is not known, or does not go with another."""
    word = str(dtype).removeprefix("torch.")
    word = SHORT.get(word, word)
    if word not in DTYPES:
        raise unknown("dtype", word, DTYPES)
    check_solver(solver)
    check_quantization(quantize)
    for key, where in (("text_encoders", text_encoders), ("network", network)):
        if where not in PLACES[key]:
            raise unknown(key, where, PLACES[key])
    if network != "device" and compile:
        raise UserError(f"network is {network!r} and compile is on, which does not go together; take one of the two")
    if network == "cpu" and quantize in ("8bit", "4bit"):
        raise UserError(f"network is 'cpu' and quantize {quantize!r}, whose weights cannot be moved; take int8, or one of the two")
    if network == "shard" and quantize:
        raise UserError(f"network is 'shard' and quantize {quantize!r}, whose weights cannot be parted; take one of the two")
    if shards is not None and (network != "shard" or shards < 2):
        wanted = "must be at least 2" if network == "shard" else f"network is {network!r}; take network shard with it"
        raise UserError(f"shards is {shards}, but {wanted}")
    return word


def _put(pipe: Any, device: str, text_encoders: str, network: str, processes: Processes, shards: int | None) -> None:
    """Lay a pipeline out, and put its parts where they are to be."""
    component = FAMILIES[type(pipe).__name__].network
    denoiser = getattr(pipe, component)
    if component == "unet":
        channels_last(denoiser)
    blocks = [] if network == "device" else blocks_of(denoiser)
    if network == "cpu":
        lend(blocks, device)
    place(pipe, component, device, text_encoders, blocks)
    if network == "shard":
        shard(denoiser, blocks, torch.device(device), processes, shards)


def build(name: str, pipe: Any, defaults: Defaults | None, size: Size | None, solver: str | None) -> Model:
    """The `Model` around a pipeline. Without `defaults`, it is sampled as the pipeline's own call does it."""
    defaults = defaults or Defaults(call_default(pipe, "num_inference_steps", 50), call_default(pipe, "guidance_scale", 1.0))
    family = _family(type(pipe).__name__)
    return family.build(name, pipe, replace(defaults, size=size or defaults.size), solver)


def _device(name: str | None) -> str:
    """The device by name, or the GPU if there is one. Raises UserError for one that is not there."""
    if name is None:
        return default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {name!r}, which torch does not find here: {str(error).splitlines()[0]}") from error
    return name


def _half_only(folder: Path) -> bool:
    """Whether a part has its weights as the variant fp16 alone, in one file or in shards."""
    files = list(folder.glob("*.safetensors"))
    return bool(files) and all(re.search(r"\.fp16[.-]", file.name) for file in files)


def _open(source: Path, name: str, dtype: str, quantize: str | None) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):  # loading bars say nothing here, errors come after them
        library.disable_progress_bar()
    local = source.is_dir()
    # A checker that paints images black has no gradient; other pipelines know no such word.
    checks = not local or class_of(source) in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False} if checks else {}
    if local:
        named = index(source)
        options |= {part: None for part in UNUSED if part in named and not (source / part).is_dir()}
        if any(_half_only(source / part) for part in named):
            options["variant"] = "fp16"  # parts without it are loaded as they are
    try:
        with warnings.catch_warnings():  # newer versions rename torch_dtype, older ones know no other word
            warnings.simplefilter("ignore", FutureWarning)
            return DiffusionPipeline.from_pretrained(
                str(source), torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=local, **options,
                **quantization(quantize, dtype, [FAMILIES[class_of(source)].network] if local else COMPONENTS),
            )  # fmt: skip
    except RuntimeError as error:
        if not quantize:
            raise
        raise UserError(f"quantize is {quantize!r}, which does not work here: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError) as error:
        advice = (
            "the folder is damaged" if local else "no such hub model, or the hub cannot be reached; a local folder works offline"
        )
        raise UserError(f"cannot load {name!r}: {advice} ({refusal(error)})") from error
