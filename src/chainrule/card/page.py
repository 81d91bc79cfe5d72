"""Writes a card. `write` makes it when a run ends; `refresh` puts a later evaluation into it and leaves the rest as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from chainrule.card.base import CLASSES, TAGS, Base, public
from chainrule.card.usage import usage
from chainrule.config import AnyConfig, DistillConfig, FinetuneConfig, SteerConfig
from chainrule.errors import UserError
from chainrule.files import whole, write_text
from chainrule.methods import REGISTRY, describe
from chainrule.models import BUNDLED
from chainrule.report.material import Material, edges, gather, series
from chainrule.report.tables import markdown
from chainrule.report.words import flat, measured, phrase
from chainrule.runs import Run

CARD, PICTURE = "README.md", "before_after.png"
BEGIN, END = "<!-- what was measured -->", "<!-- end of what was measured -->"
MOST_PROMPTS = 8
ELSEWHERE = ("kind", "prompts", "model", "adapter", "watch")  # said in sentences or not at all, not in the table of settings


def write(run: Run, base: Base) -> None:
    """Write the card, and the picture it shows, into every adapter folder that the run has. Raises UserError if it cannot."""
    for folder in (run.adapter, run.folder / "best"):
        if not folder.is_dir():
            continue
        if (run.samples / PICTURE).is_file():
            with (run.samples / PICTURE).open("rb") as source, whole(folder / PICTURE) as target:
                shutil.copyfileobj(source, target)
        write_text(folder / CARD, text(gather(run), base, folder))


def refresh(run: Run) -> None:
    """Put the run's latest evaluation into its adapter's card; write a whole card where there is none yet.

    A card without the two marks is somebody's own, and stays as it is. Raises UserError for a run without an adapter.
    """
    if not run.adapter.is_dir():
        raise UserError(f"{run.folder} has no adapter folder")
    place = run.adapter / CARD
    if not place.is_file():
        write(run, Base.named(run.config))
        return
    before, mark, rest = place.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if mark and end:
        write_text(place, f"{before}{measurements(gather(run))}{after}")


def text(material: Material, base: Base, folder: Path) -> str:
    """The whole card: what hubs read as YAML, then Markdown."""
    config = material.config
    if config is None:
        raise UserError(f"{material.folder} is not a run folder: it has no config.yaml")
    title, sentence = _goal(config)
    where = f"[`{base.name}`](https://huggingface.co/{base.name})" if base.hub else f"`{base.shown}`"
    parts = [
        f"# {base.shown}, {title}",
        f"{sentence} Its base model is {where}. It was made by chainrule.",
        f"![The same seeds before and after training]({PICTURE})" if (folder / PICTURE).is_file() else "",
        "" if isinstance(config, DistillConfig) else measurements(material),
        "## How to use it",
        *usage(config, base, folder),
        "## How it was made",
        *_made(material, config),
        "## Licence",
        _licence(base, config),
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data(config, base).to_yaml()}\n---\n\n{body}\n").content


def data(config: AnyConfig, base: Base) -> ModelCardData:
    """What hubs read: the base model only if it is on a hub, the licence only where it is known."""
    task = "unconditional-image-generation" if base.family in CLASSES else "text-to-image"
    return ModelCardData(
        base_model=base.name if base.hub else None, library_name="diffusers", pipeline_tag=task,
        tags=["lora", "diffusers", task, *TAGS.get(base.family or "", ()), "chainrule"],
        license="apache-2.0" if base.name in BUNDLED else None,
    )  # fmt: skip


def measurements(material: Material) -> str:
    """The gains with their intervals, between marks; the reward in training where nothing was evaluated."""
    columns = list(dict.fromkeys(name for _, values in material.measures for name in values))
    if columns:
        rows = [[name, *(measured(*values[c]) if c in values else "" for c in columns)] for name, values in material.measures]
        if material.gains:
            rows += [["gain", *(measured(*material.gains[c], signed=True) if c in material.gains else "" for c in columns)]]
        how = f" Images were made with {public(material.how)}." if material.how else ""
        said = f"Means over {len(material.prompts)} prompts with 95% intervals; gains are paired by prompt.{how}\n\n"
        said += markdown(["model", *columns], rows)
    elif ends := edges(series(material.rows, "reward")):
        first, last, count = ends
        ends_are = "first and last update" if count == 1 else f"means of the first and the last {count} updates"
        said = f"The reward in training went from {measured(*first)} to {measured(*last)} ({ends_are} of {len(material.rows)}). "
        said += "Nothing was measured on other prompts."
    else:
        said = "Nothing."
    return f"{BEGIN}\n\n## What was measured\n\n{said}\n\n{END}"


def _goal(config: AnyConfig) -> tuple[str, str]:
    """What the adapter is, as the end of a title and as a sentence."""
    match config:
        case FinetuneConfig():
            method, reward = public(phrase(config.method)), public(str(config.reward))
            told = f"A LoRA whose images score higher under `{reward}`, trained by `{method}`."
            return f"fine-tuned for {reward}", told
        case SteerConfig():
            reward = public(str(config.reward))
            return f"steered for {reward}", f"A LoRA that was optimized for `{reward}` on a few prompts and seeds alone."
        case DistillConfig(settings=settings):
            told = f"A LoRA that follows the base model's trajectories in {settings.student_steps} network calls, without guidance."
            return f"in {settings.student_steps} steps", told


def _made(material: Material, config: AnyConfig) -> list[str]:
    """The method, the prompts, the settings and the versions."""
    name = str(config.method["name"]) if isinstance(config, FinetuneConfig) else ""
    plan = material.plan.splitlines()[0] if material.plan else ""
    given = {key: value for key, value in config.values().items() if value is not None and key not in ELSEWHERE}
    settings, made = flat(given), material.environment
    versions = [f"{key} {made[key]}" for key in ("chainrule", "torch", "diffusers") if made.get(key)]
    return [
        f"`{name}`: {describe(name)}" if name in REGISTRY else "",
        f"```text\n{plan}\n```" if plan else "",
        _prompts(config.prompts),
        markdown(["setting", "value"], [[f"`{key}`", public(value)] for key, value in settings.items()]),
        f"Versions: {', '.join(versions)}." if versions else "",
    ]


def _prompts(prompts: str | tuple[str, ...]) -> str:
    if isinstance(prompts, str):
        return f"Prompts: `{public(prompts)}`."
    shown = "; ".join(f"`{prompt}`" for prompt in prompts[:MOST_PROMPTS])
    return f"Prompts: {shown}{f'; {len(prompts)} in all' if len(prompts) > MOST_PROMPTS else ''}."


def _licence(base: Base, config: AnyConfig) -> str:
    if base.name in BUNDLED:
        return "The base model's weights are Apache-2.0; the drawings they learned from are Noto Color Emoji, OFL-1.1."
    also = ", and those of the rewards it was made with" if config.rewards else ""
    return f"The licence of the base model applies: see its card{also}."
