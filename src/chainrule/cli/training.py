"""Commands that train: `train`, `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from chainrule import methods
from chainrule.arguments import TRAIN_KEYS, configured, method_of, with_settings
from chainrule.cli.app import Options
from chainrule.cli.opened import base_of, check_adapter, given, run_of, scorers_of
from chainrule.errors import UserError
from chainrule.plan import leading
from chainrule.settings import Distillation, Opening, Settings


@with_settings(Opening)
@with_settings(Settings)
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with any of the options below.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundled model, diffusers folder or hub id. [default: tiny-emoji]")] = None,
    student: Annotated[
        str | None, typer.Option(help="Few-step student that shortft jumps with. [default: the model's own]")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A run or adapter that stays on, frozen, under the new one.")] = None,
    method: Annotated[
        str | None, typer.Option(help="One of `chainrule methods`, or path/to/file.py:Class. [default: draft-lv]")
    ] = None,
    method_option: Options = None,
    reward: Annotated[str | None, typer.Option(help='For example "10*pickscore + 2*hpsv2"; see `chainrule rewards`.')] = None,
    held_out: Annotated[str | None, typer.Option(help="A reward that is watched, not trained.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt set or file. [default: animals:train]")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    **options: Any,
) -> None:
    """Fine-tune an adapter so that its images score higher.

    Rewards that name no source are a bundled model's own where the model is bundled.
    """
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts
    from chainrule.runs import Run

    said = {"model": model, "student": student, "adapter": adapter, "method": method, "reward": reward,
             "held_out": held_out, "prompts": prompts, "out": out} | options  # fmt: skip
    values = configured(config, said)
    named = {key: values.pop(key, None) for key in TRAIN_KEYS}
    opening, values = given(values)
    for key in ("reward", "out"):
        if not named[key]:
            raise UserError(f"no {key} given; pass --{key}")
    settings = Settings.make(values)
    if settings.patience and not named["held_out"]:
        raise UserError("patience needs a held-out reward to watch; pass --held-out")
    made = method_of(named["method"] or "draft-lv", method_option)
    source, shown = named["model"] or "tiny-emoji", named["prompts"] or "animals:train"
    read_prompts(shown)
    if run_of(source):
        raise UserError(f"{source} is a run; give its model, and the run as --adapter to train on top of it")
    Run(named["out"]).check_place(resume=resume, overwrite=overwrite)
    scorer = rewards.parse(named["reward"], scorers_of(source))
    judge = rewards.parse(named["held_out"], scorers_of(source)) if named["held_out"] else None
    base = base_of(source, opening)
    from chainrule.models.bundled import best_steps

    jumps = "student" in methods.needs(made, leading(settings.sample_steps or best_steps(source))).members
    if jumps:
        from chainrule.models.students import resolve

        resolve(named["student"], source)
    elif named["student"]:
        raise UserError(f"{made} does not jump by a student; leave student out, or choose the method shortft")
    if named["adapter"]:
        check_adapter(named["adapter"], source, opening.get("solver"))
    from chainrule.finetune import finetune

    loaded = base.load()
    loaded = loaded.using(named["adapter"]) if named["adapter"] else loaded
    run = finetune(
        loaded.with_student(named["student"]) if jumps else loaded, made, scorer, shown, out=named["out"], held_out=judge,
        resume=resume, overwrite=overwrite, **values,
    )  # fmt: skip
    typer.echo(f"adapter: {run.adapter}")


@with_settings(Opening)
@with_settings(Distillation)
def distill(
    model: Annotated[str, typer.Argument(help="Bundled model, diffusers folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Run folder.")],
    prompts: Annotated[str, typer.Option(help="Prompt set or file.")] = "emoji",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    **options: Any,
) -> None:
    """Distill a few-step student that keeps to the model's trajectories, for shortft."""
    from chainrule.prompts import prompts as read_prompts
    from chainrule.runs import Run

    opening, values = given(options)
    Distillation.make(values)
    read_prompts(prompts)
    Run(out).check_place(resume=resume, overwrite=overwrite)
    base = base_of(model, opening)
    from chainrule.distill import distill as distilled

    run = distilled(base.load(), out=out, prompts=prompts, resume=resume, overwrite=overwrite, **values)
    typer.echo(f"student: {run.adapter}\nhow faithful it is: {run.folder / 'shortcut.md'}, {run.folder / 'shortcut.png'}")
