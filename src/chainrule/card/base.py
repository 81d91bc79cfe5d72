"""The model under an adapter, as far as a card has to know it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.config import AnyConfig
from chainrule.models import BUNDLED, FAMILIES, Model
from chainrule.models.families import family_of

TAGS: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "LatentConsistencyModelPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "StableDiffusion3Pipeline": ("sd3", "sd3-diffusers"),
    "FluxPipeline": ("flux", "flux-diffusers"),
}
"""The tags of the families whose pipelines have `load_lora_weights`. The others load adapters by `chainrule.attach`."""
CLASSES = ("DDPMPipeline", "DDIMPipeline")  # pipelines that are told no text


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model under an adapter, and how the run sampled it. None is not known."""

    name: str
    family: str | None = None
    scheduler: str | None = None  # diffusers' class, where it is not the pipeline's own
    steps: int | None = None
    guidance: Any = None
    size: tuple[int, int] | None = None  # height and width in pixels

    @classmethod
    def of(cls, model: Model, steps: int | None = None) -> Base:
        """A model that is loaded, sampled with this many calls; None: with its own number."""
        own, used = getattr(model.pipe, "scheduler", None), model.sampler.scheduler
        other = type(used).__name__ if own is not None and used is not None and type(own) is not type(used) else None
        asked = model.guidance_spec
        return cls(
            name=model.name, family=model.family, scheduler=other, steps=len(model.grid(steps)) - 1,
            guidance=model.defaults.guidance if asked is None else asked, size=model.size,
        )  # fmt: skip

    @classmethod
    def named(cls, config: AnyConfig) -> Base:
        """What a run's config and the files on this disk say of it."""
        family = config.model if config.model in FAMILIES else family_of(config.model)
        return cls(name=config.model, family=family, guidance=config.settings.guidance)

    @property
    def hub(self) -> bool:
        """Whether it is on a hub, as far as its name says."""
        return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", self.name)) and not Path(self.name).exists()

    @property
    def shown(self) -> str:
        """Its name for strangers: of a folder on somebody's disk the last part only."""
        if self.name in FAMILIES:
            return f"a {self.name}"
        return self.name if self.hub or self.name in BUNDLED else Path(self.name).name

    @property
    def place(self) -> str:
        """What a stranger writes to open it."""
        return self.name if self.hub or self.name in BUNDLED else "path/to/base-model"


def shown(place: str) -> str:
    """An adapter's name for strangers, as that of `Base`."""
    return Path(place).name if Path(place).exists() else place


def public(text: str) -> str:
    """A text without the folders of files on somebody's disk: of "/home/me/rewards.py:bright" the file's name and on."""
    return re.sub(r"(?:~|[A-Za-z]:)?[\w.\\/-]*[\\/]([\w.-]+\.(?:py|txt|csv|tsv|jsonl?|parquet)\b)", r"\1", text)
