"""Few-step LoRAs by name, and how their authors say they are sampled. Only the bundled model's own ships with the package."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chainrule.errors import UserError
from chainrule.models import bundled

SD, SDXL, SD3, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
TRAILING = {"timestep_spacing": "trailing"}


@dataclass(frozen=True, slots=True)
class Published:
    """A LoRA for a pipeline, as OWNER/NAME:FILE on the hub or a folder; guidance 1 is none. `settings` are the scheduler's.

    With `segments`, it jumps to the ends of its segments of levels (`chainrule.distill`), and not over the scheduler's timesteps.
    """

    where: str
    pipeline: str
    steps: int
    guidance: float = 1.0
    scale: float = 1.0
    solver: str | None = None  # None: the pipeline's own
    settings: Mapping[str, object] = field(default_factory=dict)
    segments: bool = False


def _hyper(file: str, pipeline: str, steps: int, guidance: float = 1.0, scale: float = 1.0) -> Published:
    """Hyper-SD (arXiv:2404.13686): DDIM over trailing timesteps without guidance; CFG kept for SD 3, distilled for FLUX."""
    flow = pipeline in (SD3, FLUX)
    where = f"ByteDance/Hyper-SD:{file}.safetensors"
    return Published(where, pipeline, steps, guidance, scale, None if flow else "ddim", {} if flow else TRAILING)


def distilled(place: str | Path, pipeline: str, steps: int) -> Published:
    """A student that `distill` made: deterministic jumps without guidance, which it has learned."""
    return Published(str(place), pipeline, steps, solver="euler", segments=True)


PUBLISHED: Mapping[str, Published] = {
    **{f"hyper-sd15-{n}": _hyper(f"Hyper-SD15-{n}steps-lora", SD, n) for n in (2, 4, 8)},
    **{f"hyper-sdxl-{n}": _hyper(f"Hyper-SDXL-{n}steps-lora", SDXL, n) for n in (2, 4, 8)},
    **{f"hyper-sd3-{n}": _hyper(f"Hyper-SD3-{n}steps-CFG-lora", SD3, n, g, 0.125) for n, g in ((4, 3.0), (8, 5.0), (16, 7.0))},
    **{f"hyper-flux-{n}": _hyper(f"Hyper-FLUX.1-dev-{n}steps-lora", FLUX, n, 3.5, 0.125) for n in (8, 16)},
    # LCM-LoRA (arXiv:2311.05556): consistency sampling, guidance off or up to 2.
    "lcm-sd15": Published("latent-consistency/lcm-lora-sdv1-5:pytorch_lora_weights.safetensors", SD, 4, solver="lcm"),
    "lcm-sdxl": Published("latent-consistency/lcm-lora-sdxl:pytorch_lora_weights.safetensors", SDXL, 4, solver="lcm"),
    # TCD (arXiv:2402.19159), gamma 0.3.
    "tcd-sd15": Published("h1t/TCD-SD15-LoRA:pytorch_lora_weights.safetensors", SD, 4, solver="tcd"),
    "tcd-sdxl": Published("h1t/TCD-SDXL-LoRA:pytorch_lora_weights.safetensors", SDXL, 4, solver="tcd"),
    # SDXL-Lightning (arXiv:2402.13929): Euler over trailing timesteps.
    **{
        f"lightning-{n}": Published(
            f"ByteDance/SDXL-Lightning:sdxl_lightning_{n}step_lora.safetensors", SDXL, n, solver="euler", settings=TRAILING
        )
        for n in (2, 4, 8)
    },
    **{f"{base}-4": distilled(bundled.student(base), SD, 4) for base in bundled.STUDENTS},
}


HUB = [name for name, known in PUBLISHED.items() if ":" in known.where]  # those that are downloaded


def find(source: object, pipeline: str) -> Published | None:
    """What is published under a name, for this pipeline; None for any other source. Raises UserError for another pipeline's."""
    known = PUBLISHED.get(str(source))
    if known and known.pipeline != pipeline:
        raise UserError(f"{source} is for {known.pipeline}, and the model is a {pipeline}")
    return known


def local(source: str | Path) -> Path:
    """Where a LoRA or network lies on this disk: a path, or a published name or OWNER/NAME:FILE, downloaded. May be missing."""
    known = PUBLISHED.get(str(source))
    where = known.where if known else str(source)
    repository, colon, file = where.partition(":")
    if Path(where).exists() or not colon or repository.count("/") != 1 or where.startswith((".", "/", "~")):
        return Path(where)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:
        raise UserError(f"no {str(source)!r} here, and the hub does not give it: {refusal(error)}") from error


def refusal(error: Exception) -> str:
    """Why the hub gave nothing, in one line that says what to do."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space, or let HF_HOME name a folder on another disk"
    return str(error).strip().splitlines()[0]
