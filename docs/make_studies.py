"""Draw the pictures of studies.md from the results of its tables: python docs/make_studies.py [--root EXPERIMENTS]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import chainrule as cr
from chainrule.cli.experimenting import results_folder
from chainrule.experiments import page
from chainrule.experiments.table import read
from chainrule.experiments.unit import units
from chainrule.files import make_folder, write_picture
from chainrule.report import grid
from chainrule.report.plots import plot, scatter

PLACE = Path(__file__).with_name("studies")
SEED = 7


def main() -> None:
    """Draw what was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=results_folder(), help="Folder of the results.")
    root = parser.parse_args().root
    make_folder(PLACE)
    for name in ("sampler", "policy", "generalization", "tradeoff", "clipping"):  # as `chainrule experiment NAME --plot`
        table = read(name)
        points = page.points(page.Results(table, root))
        if table.plot and points:
            write_picture(PLACE / f"{name}.png", scatter(points, table.title, table.plot.x, table.plot.y))
    guidance(root)
    rewards(root)
    few_steps(root)


def guidance(root: Path) -> None:
    """The guidance scales that `sampler` learned, a curve for each seed."""
    curves = {}
    for unit in units(read("sampler")):
        if unit.label == "DRaFT, guidance weights" and unit.done(root):
            told = json.loads((unit.folder(root) / "adapter/learned/guidance/guidance.json").read_text(encoding="utf-8"))
            curves[f"seed {unit.seed}"] = [(i, scale) for i, (_, scale) in enumerate(told["schedule"], 1)]
    if curves:
        picture = plot(curves, "The learned guidance scale", "sampling step, from the noisiest to the last")
        write_picture(PLACE / "guidance.png", picture)


def rewards(root: Path) -> None:
    """Images of every run of `rewards` with its first seed, a row each, under those of the base model."""
    models = {"base": cr.load("tiny-emoji")}
    for unit in units(read("rewards")):
        if unit.seed == 0 and unit.done(root):
            models[unit.label] = models["base"].using(unit.folder(root))
    _sheet("rewards", models, 20)


def few_steps(root: Path) -> None:
    """Images of the few-step student, and of what the runs of `few-steps` with their first seed made of it."""
    student = cr.load("tiny-emoji").using("tiny-emoji-4")
    models = {"student": student}
    for unit in units(read("few-steps")):
        if (
            unit.seed == 0
            and unit.label in ("KL 0.01", "rate 0.002", "last call only", "trained with guidance 5")
            and unit.done(root)
        ):
            models[unit.label] = student.using(unit.folder(root))
            if unit.label == "KL 0.01":
                models["KL 0.01, half scale"] = student.using(unit.folder(root), scale=0.5)
    _sheet("few-steps", models, 4)


def _sheet(name: str, models: dict[str, cr.Model], steps: int) -> None:
    """A row of images for each model, of the same prompts and seed."""
    prompts = cr.prompts("animals:test")[:5]
    if len(models) > 1:
        images = [image for model in models.values() for image in model.sample(prompts, [SEED] * len(prompts), steps)]
        captions = [f"{name}: {prompt.removeprefix('a painting of ')}" for name in models for prompt in prompts]
        write_picture(PLACE / f"{name}.png", grid(images, len(prompts), captions))


if __name__ == "__main__":
    main()
