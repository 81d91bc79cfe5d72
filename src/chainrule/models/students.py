"""Few-step students: checked by what their files say, loaded as a member of the cast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from chainrule import adapters
from chainrule.adapters.files import find
from chainrule.errors import UserError
from chainrule.models import bundled
from chainrule.plan import Jump, walk

if TYPE_CHECKING:
    from chainrule.denoise import Member
    from chainrule.models.model import Model

# What two networks must have in common for one to answer for the other.
SHARED = ("in_channels", "out_channels", "cross_attention_dim", "sample_size")


def boundaries(top: int, steps: int) -> tuple[int, ...]:
    """Where a student's segments end, falling, 0 last: the `steps`-th parts of the levels."""
    return tuple(round(top * i / steps) for i in range(steps - 1, -1, -1))


def route(start: int, top: int, steps: int) -> tuple[Jump, ...]:
    """A student's jumps from a level to the image: to the end of every segment on the way."""
    levels = (start, *(level for level in boundaries(top, steps) if level < start))
    return walk(levels, via="student")


def locate(source: str | Path | None, base: str) -> str | Path:
    """Where a student is: the source itself, or the bundled one. UserError when there is none."""
    if source is not None:
        return source
    if base not in bundled.STUDENTS:
        raise UserError(f"{base} has no student of its own; pass one (chainrule distill {base} --out runs/student makes it)")
    return bundled.student(base)


def _is_lora(place: Path) -> bool:
    return place.is_file() or any((folder / adapters.files.FILE).is_file() for folder in (place, place / "adapter"))


def _network(place: Path) -> Path:
    """The folder of a network, of a pipeline's or its own. UserError when there is none."""
    for folder in (place / "unet", place):
        if (folder / "config.json").is_file():
            if not any(folder.glob("*.safetensors")):
                raise UserError(f"{folder} has no .safetensors weights; pickled ones are refused")
            return folder
    raise UserError(f"no student at {str(place)!r}: expected a LoRA ({adapters.files.FILE}) or a network (config.json) there")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def facts(place: str | Path) -> dict[str, Any]:
    """What `distill` wrote about a student: its base, steps and prediction; {} for others."""
    return _read(Path(place) / "adapter" / "student.json") or _read(Path(place) / "student.json")


def check(source: str | Path | None, base: str) -> None:
    """Everything about a student that its files say before anything is loaded: there, of this architecture and prediction.

    `base` is the model's name; when that is a hub id, its files are not here to compare with. Raises UserError.
    """
    place = Path(locate(source, base))
    if not place.exists():
        if str(source).split(":")[0].count("/") == 1 and not str(source).startswith((".", "/", "~")):
            return  # a hub id
        raise UserError(
            f"no student at {str(source)!r}: give a folder, a .safetensors file, or a hub id OWNER/NAME or OWNER/NAME:FILE"
        )
    here = bundled.folder(base) if base in bundled.BUNDLED else Path(base)
    predicts = _read(here / "scheduler" / "scheduler_config.json").get("prediction_type")
    said = facts(place).get("prediction") or _read(place / "scheduler" / "scheduler_config.json").get("prediction_type")
    if said and predicts and said != predicts:
        raise UserError(f"the student {source} predicts {said}, but {base} predicts {predicts}; it needs a student of its own kind")
    if _is_lora(place):
        weights = sorted((here / "unet").glob("*.safetensors"))
        if weights:
            _check_lora(find(place), weights, base)
    else:
        _check_config(_read(_network(place) / "config.json"), _read(here / "unet" / "config.json"), source, base)


def _check_config(config: dict[str, Any], base_config: dict[str, Any], source: object, base: str) -> None:
    for key in SHARED:
        if base_config and config.get(key) != base_config.get(key):
            differ = f"its {key} is {config.get(key)}, that of {base} {base_config.get(key)}"
            raise UserError(f"the student {source} was made for another model: {differ}")


def _check_lora(file: Path, weights: list[Path], base: str) -> None:
    """Every adapted layer exists in the base, with the widths the LoRA was made for. Reads headers only."""
    shapes: dict[str, list[int]] = {}
    for path in weights:
        with safe_open(path, "pt") as stored:
            shapes |= {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118  not a dict
    for key, tensor in adapters.files.read(file).tensors.items():
        layer, _, part = key.partition(".lora_")
        shape = shapes.get(f"{layer}.weight")
        width = shape and (shape[1] if part.startswith("A") else shape[0])
        if width != tensor.shape[1 if part.startswith("A") else 0]:
            raise UserError(f"the student {file} was made for another model: {base} has no layer {layer} of that shape")


def load(model: Model, source: str | Path | None) -> Member:
    """The student as a member without guidance: a LoRA on the model's own network, or a network of its own."""
    place = locate(source, model.name)
    check(source, model.name)
    if not Path(place).exists():
        place = _download(str(place))
    path = Path(place)
    if _is_lora(path):
        name = model._free("student")
        adapters.load(model.network, name, find(path))
        active = adapters.Active({name: adapters.Band()})
        return replace(model.bare(1.0), active=active)
    from diffusers import UNet2DConditionModel

    folder = _network(path)
    weight = next(model.network.parameters())
    try:
        network = UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=weight.dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the student {source}: {str(error).strip().splitlines()[0]}") from error
    _check_config(dict(network.config), dict(model.pipe.unet.config), source, model.name)
    network.requires_grad_(False).eval().to(weight.device)
    return replace(model.bare(1.0), denoiser=replace(model.denoiser, network=network))  # type: ignore[type-var]


def _download(name: str) -> Path:
    """A file or a pipeline's network from the hub."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository, _, file = name.partition(":")
    try:
        if file:
            return Path(hf_hub_download(repository, file))
        return Path(snapshot_download(repository, allow_patterns=["unet/*", "*.json", "*lora*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot get the student {name!r} from the hub: {reason}; a local folder or file works offline") from error
