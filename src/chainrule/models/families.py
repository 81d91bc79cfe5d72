"""Which pipelines are known, and what can be said of each before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.errors import UserError
from chainrule.models import bundled
from chainrule.models.bundled import BUNDLED


@dataclass(frozen=True, slots=True)
class Family:
    """The module that builds a pipeline's `Model`, the component that denoises, and all components with weights.

    LoRA files begin their keys with `network`.
    """

    module: str
    network: str
    components: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": Family("stable_diffusion", "unet", ("unet", "vae", "text_encoder")),
    "LatentConsistencyModelPipeline": Family("stable_diffusion", "unet", ("unet", "vae", "text_encoder")),
    "StableDiffusionXLPipeline": Family("stable_diffusion_xl", "unet", ("unet", "vae", "text_encoder", "text_encoder_2")),
    "StableDiffusion3Pipeline": Family(
        "stable_diffusion_3", "transformer", ("transformer", "vae", "text_encoder", "text_encoder_2")
    ),
    "FluxPipeline": Family("flux", "transformer", ("transformer", "vae", "text_encoder", "text_encoder_2")),
    "PixArtAlphaPipeline": Family("pixart", "transformer", ("transformer", "vae", "text_encoder")),
    "PixArtSigmaPipeline": Family("pixart", "transformer", ("transformer", "vae", "text_encoder")),
    "DDPMPipeline": Family("pixel", "unet", ("unet",)),
    "DDIMPipeline": Family("pixel", "unet", ("unet",)),
}
# What these networks are told as time: the level is scale * time + offset. All others: timesteps, one below the level.
TIMES: Mapping[str, tuple[float, int]] = {"SD3Transformer2DModel": (1.0, 0), "FluxTransformer2DModel": (1000.0, 0)}


def index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says its components are. Raises UserError for another folder."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a diffusers folder: it has no model_index.json")
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def class_of(folder: Path) -> str:
    """The class of a folder's pipeline."""
    name = index(folder).get("_class_name")
    if not isinstance(name, str):
        if isinstance(name, list):  # the file and the class of a community pipeline
            raise UserError(
                f"{folder} was saved by a pipeline of its own code ({name[-1]}), which is not run; save it by diffusers'"
            )
        raise UserError(f"{folder / 'model_index.json'} is damaged: it has no _class_name")
    return name


def family_of(source: str | Path) -> str | None:
    """The class of a model's pipeline, as far as its files are here to say it."""
    folder = bundled.folder(str(source)) if str(source) in BUNDLED else Path(source)
    return class_of(folder) if (folder / "model_index.json").is_file() else None
