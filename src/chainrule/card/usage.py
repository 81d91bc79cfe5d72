"""How an adapter is used: snippets for plain diffusers, where it can load it, and for chainrule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from chainrule.adapters.files import BANDS, LEARNED
from chainrule.card.base import CLASSES, TAGS, Base, shown
from chainrule.config import AnyConfig, DistillConfig
from chainrule.models import BUNDLED
from chainrule.report.snippets import FETCH, HERE, fetched

PROMPT = '"a painting of a fox"'


def usage(config: AnyConfig, base: Base, folder: Path) -> list[str]:
    """Paragraphs and snippets, the plainest first."""
    ours = [f"model = cr.load({_opened(config, base)})"]
    if isinstance(config, DistillConfig):
        sampled = f"image = model.using(adapter).sample([{_told(config, base)}], seeds=[0])[0]  # in its own few steps"
        student = "model = model.with_student(adapter)  # for the method shortft"
        return ["With chainrule:", _code(["import chainrule as cr"], [*ours, sampled, student])]
    under = getattr(config, "adapter", ())
    ours += [f'model = model.using("{shown(place)}")' for place in under]
    ours += [f"image = model.using(adapter).sample([{_told(config, base)}], seeds=[0]{_how(base, 'steps', 'guidance')})[0]"]
    blocks = ["With chainrule:", _code(["import chainrule as cr"], ours)]
    if base.family in CLASSES:
        return blocks
    if under:
        names = ", ".join(f"`{shown(place)}`" for place in under)
        return [f"It was trained on top of {names}, which has to be on as well.", *blocks]
    alone = (base.family is None or base.family in TAGS) and not levels(folder)
    plain = "diffusers alone" if alone and base.name not in BUNDLED else "its diffusers pipeline"
    return [f"With {plain}:", _code(*_pipeline(config, base, alone)), *blocks]


def levels(folder: Path) -> bool:
    """Whether the folder has adapters by level or a learned sampler, which `load_lora_weights` knows nothing of."""
    return (folder / BANDS).is_file() or (folder / LEARNED).is_dir()


def _pipeline(config: AnyConfig, base: Base, alone: bool) -> tuple[list[str], list[str]]:
    """Imports and statements that use the adapter in the base model's own pipeline, by the scheduler of the training."""
    bundled, kinds = base.name in BUNDLED, [base.scheduler] if base.scheduler else []
    half = config.opening.dtype != "float32"
    imports = ["import torch"] if half and not bundled else []
    imports += ["import chainrule"] if bundled or not alone else []
    kinds += [] if bundled else ["DiffusionPipeline"]
    imports += [f"from diffusers import {', '.join(sorted(kinds))}"] if kinds else []
    dtype = f", torch_dtype=torch.{config.opening.dtype}" if half else ""
    opened = f'DiffusionPipeline.from_pretrained("{base.place}"{dtype})'
    body = [
        "pipe = " + (f'chainrule.load("{base.name}").pipe' if bundled else opened),
        *([f"pipe.scheduler = {base.scheduler}.from_config(pipe.scheduler.config)"] if base.scheduler else []),
        "pipe.load_lora_weights(adapter)" if alone else "chainrule.attach(pipe, adapter)",
    ]
    size = f", height={base.size[0]}, width={base.size[1]}" if base.size else ""
    return imports, [*body, f"image = pipe({PROMPT}{_how(base, 'num_inference_steps', 'guidance_scale')}{size}).images[0]"]


def _opened(config: AnyConfig, base: Base) -> str:
    """The arguments of `chainrule.load`."""
    told = {key: value for key, value in config.opening.model_dump().items() if value is not None and key != "device"}
    if base.name in BUNDLED or told.get("dtype") == "float32":
        told.pop("dtype", None)
    if base.scheduler is None:
        told.pop("solver", None)
    if base.name in BUNDLED:
        told.pop("size", None)
    return ", ".join([f'"{base.place}"', *(f"{key}={value!r}".replace("'", '"') for key, value in told.items())])


def _how(base: Base, steps: str, guidance: str) -> str:
    """How the run sampled, as further arguments of a call."""
    scale = base.guidance.get("scale") if isinstance(base.guidance, Mapping) else base.guidance
    told = {steps: base.steps, guidance: scale if isinstance(scale, int | float) and base.family not in CLASSES else None}
    return "".join(f", {key}={value:g}" for key, value in told.items() if value is not None)


def _told(config: AnyConfig, base: Base) -> str:
    """What a picture is asked for: a text, or where the model knows classes alone, or nothing, one that the run was given."""
    if base.family not in CLASSES:
        return PROMPT
    return f'"{config.prompts[0]}"' if config.prompts and not isinstance(config.prompts, str) else '""'


def _code(imports: list[str], body: list[str]) -> str:
    plain = sorted([line for line in imports if line.startswith("import")])
    rest = sorted([*(line for line in imports if not line.startswith("import")), FETCH])
    return "\n".join(["```python", *plain, *rest, "", fetched(HERE), *body, "```"])
