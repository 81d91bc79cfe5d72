"""Few-step students: checked by what their files say, loaded as a member of the cast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from chainrule import adapters
from chainrule.adapters.files import COMPONENTS, find
from chainrule.cast import Member
from chainrule.denoise import Denoiser, guidance_is_input
from chainrule.errors import UserError
from chainrule.guidance import Embedded, of_number
from chainrule.models import bundled, loras, published
from chainrule.models.families import FAMILIES, family_of
from chainrule.models.pipeline import weight_type
from chainrule.models.solvers import Sampler
from chainrule.plan import Grid, segment_ends

# What two networks must have in common for one to answer for the other, as far as their kind has it.
SHARED = ("in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "caption_channels", "sample_size")


def resolve(source: str | Path | None, base: str) -> Path:
    """A student's files on this disk: those of the source, downloaded if it is on the hub, or of the bundled student.

    Raises UserError for everything that its files say before anything is loaded: missing, of another architecture, of another
    prediction. `base` is the name of its model; when that is a hub id, there are no files here to compare with.
    """
    if source is not None and (family := family_of(base)):
        published.find(source, family)
    if source is None and base not in bundled.STUDENTS:
        raise UserError(f"{base} has no student of its own; pass one (chainrule distill {base} --out runs/student makes it)")
    place = bundled.student(base) if source is None else published.local(source)
    if not place.exists():
        if source is None:
            raise UserError(f"the bundled student of {base} is missing from this installation; reinstall chainrule")
        place = _download(str(source))
    _check(place, bundled.folder(base) if base in bundled.BUNDLED else Path(base), base)
    return place


def _lora_in(place: Path) -> Path | None:
    """The LoRA file in a folder, or the file itself; None where there is no LoRA."""
    if place.is_file():
        return place if loras.is_lora(place) else None
    holds = any((folder / adapters.files.FILE).is_file() for folder in (place, place / "adapter"))
    return find(place) if holds else None


def _network(place: Path) -> Path:
    """The folder or file of a network, of a pipeline's or its own. Raises UserError when there is none."""
    if place.is_file():
        return place
    for folder in (*(place / component for component in COMPONENTS), place):
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


def few_steps(source: str | Path) -> bool:
    """Whether an adapter says itself in how many steps it is sampled."""
    return str(source) in published.PUBLISHED or bool(facts(source))


def known(source: object, family: str) -> published.Published | None:
    """How a few-step adapter is sampled: a published one by name, or one that `distill` made, by its folder; None for others."""
    found = published.find(source, family)
    if found or not isinstance(source, str | Path) or not (said := facts(source)):
        return found
    if not isinstance(steps := said.get("steps"), int) or steps < 1:
        raise UserError(f"the student {source} is damaged: its student.json says that it makes images in {steps!r} steps")
    return published.distilled(source, family, steps)


def sampler(how: published.Published, plain: Sampler) -> Sampler:
    """The sampler of a few-step adapter, given the one of its solver: from where fifty steps start, over its segments' ends."""
    if not how.segments:
        return plain
    ends = (plain.levels(50)[0], *segment_ends(plain.solver.process.schedule.top, how.steps))

    def levels(steps: int) -> Grid:
        if steps != how.steps:
            raise UserError(f"steps is {steps}, but this student has {how.steps} segments and makes an image in {how.steps} steps")
        return ends

    return replace(plain, levels=levels)


def _check(place: Path, here: Path, base: str) -> None:
    """Against the base model's files in `here`, as far as they are there."""
    _check_prediction(place, _read(here / "scheduler" / "scheduler_config.json").get("prediction_type"), base)
    file, pipeline = _lora_in(place), str(_read(here / "model_index.json").get("_class_name"))
    component = FAMILIES[pipeline].network if pipeline in FAMILIES else COMPONENTS[0]
    if not file:
        _check_config(_read(_network(place) / "config.json"), _read(here / component / "config.json"), place, base)
    elif weights := sorted((here / component).glob("*.safetensors")):
        own = _read(here / component / "config.json")
        _check_lora(file, weights, base, pipeline, SimpleNamespace(**own) if own else None)


def _check_prediction(place: Path, predicts: str | None, base: str) -> None:
    own = facts(place).get("prediction") or _read(place / "scheduler" / "scheduler_config.json").get("prediction_type")
    if own and predicts and own != predicts:
        raise UserError(f"the student {place} predicts {own}, but {base} predicts {predicts}; it needs a student of its own kind")


def _check_config(config: dict[str, Any], base_config: dict[str, Any], source: object, base: str) -> None:
    for key in SHARED:
        if config and base_config and config.get(key) != base_config.get(key):
            differ = f"its {key} is {config.get(key)}, that of {base} {base_config.get(key)}"
            raise UserError(f"the student {source} was made for another model: {differ}")


def _check_lora(file: Path, weights: list[Path], base: str, pipeline: str, config: Any) -> None:
    """Every adapted layer exists in the base, with the widths the LoRA was made for. Reads headers only."""
    shapes: dict[str, list[int]] = {}
    for path in weights:
        with safe_open(path, "pt") as stored:
            shapes |= {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118  not a dict
    for key, tensor in loras.read(file, pipeline, config).tensors.items():
        layer, _, matrix = key.partition(".lora_")
        shape = shapes.get(f"{layer}.weight")
        width = shape and (shape[1] if matrix.startswith("A") else shape[0])
        if width != tensor.shape[1 if matrix.startswith("A") else 0]:
            raise UserError(f"the student {file} was made for another model: {base} has no layer {layer} of that shape")


def load(
    source: str | Path | None, *, base: str, pipe: Any, denoiser: Denoiser, prediction: str, guidance: float,
) -> Member:  # fmt: skip
    """The student as a member of the cast: a LoRA on the base model's own network, or a network of its own.

    `base` is the base model's name, `prediction` what it predicts, `guidance` its default scale. The student is asked without
    guidance, unless it is a published one whose authors say otherwise; a network that reads its guidance (FLUX's, a latent
    consistency model's) is told the base model's. Raises UserError for a student that does not fit.
    """
    family = type(pipe).__name__
    known = published.find(source, family)
    path = resolve(source, base)
    _check_prediction(path, prediction, base)
    reads = guidance_is_input(denoiser)
    scale = known.guidance if known else (guidance if reads else 1.0)
    member, file = Member(denoiser, of_number(denoiser, scale)), _lora_in(path)
    if file:
        name = adapters.unused_name(denoiser.network, "student")
        lease = adapters.lease(denoiser.network, name, loras.read(file, family, getattr(denoiser.network, "config", None)))
        return replace(member, active=adapters.Active({name: adapters.Band(known.scale if known else 1.0, lease=lease)}))
    network = _loaded(denoiser.network, base, _network(path))
    own: Any = replace(denoiser, network=network)  # type: ignore[type-var]
    if getattr(network.config, "time_cond_proj_dim", None) and not reads:  # a latent consistency model's
        if not hasattr(own, "embed_guidance"):
            raise UserError(f"the student {path} reads its guidance, which is not supported beside a {family}")
        own = replace(own, embed_guidance=pipe.get_guidance_scale_embedding)
        return Member(own, Embedded(guidance))
    return replace(member, denoiser=own)


def _loaded(base_network: Any, base: str, place: Path) -> Any:
    """A frozen network of the base network's class from its folder, or from a file of weights alone (SDXL-Lightning's)."""
    kind, dtype = type(base_network), weight_type(base_network)
    try:
        if place.is_dir():
            network = kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
        else:
            network = kind.from_config(base_network.config)
            network.load_state_dict(load_file(place))
            network.to(dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the student {place}: {str(error).strip().splitlines()[0]}") from error
    _check_config(dict(network.config), dict(base_network.config), place, base)
    return network.requires_grad_(False).eval().to(next(base_network.parameters()).device)


def _download(name: str) -> Path:
    """A pipeline's network from the hub. Raises UserError when there is no such thing here or there."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        given = "give a folder, a .safetensors file, a published one (chainrule models), or a hub id OWNER/NAME or OWNER/NAME:FILE"
        raise UserError(f"no student at {name!r}: {given}")
    from huggingface_hub import snapshot_download

    wanted = [f"{component}/*.{kind}" for component in COMPONENTS for kind in ("json", "safetensors")]
    try:
        return Path(snapshot_download(name, allow_patterns=[*wanted, "scheduler/*.json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"no student at {name!r} here, and the hub does not give one: {published.refusal(error)}") from error
