"""Commands that train: `train`, `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chainrule import methods, presets
from chainrule.cli.app import Options
from chainrule.cli.arguments import AllowCode, check_code, is_config, method_of, place_of, prompts_of
from chainrule.cli.opened import Source, check_adapters, check_guidance, is_run, source_of
from chainrule.cli.options import NOTHING, Given, with_options
from chainrule.config import DistillConfig, FinetuneConfig
from chainrule.errors import UserError
from chainrule.plan import leading
from chainrule.settings import check_tracker


@with_options
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A .yaml file with any of the options below, such as a run's config.yaml.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A named starting point, which the file and the options go before; list shows them.")
    ] = None,
    given: Annotated[Given, FinetuneConfig] = NOTHING,
    method_option: Options = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Fine-tune an adapter so that its images score higher.

    With a bundled model, rewards that name no source are the scorers bundled with it.
    """
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts

    if preset == "list":
        typer.echo(presets.listed())
        return
    under = presets.preset(preset).options if preset else {}
    read = FinetuneConfig.read(config, given, under) if config else FinetuneConfig.layered(under, given)
    check_code(read, given, config, allow_code)
    if not read.reward:
        raise UserError("no reward given; pass --reward")
    if read.settings.patience and not read.held_out and read.settings.best == "held_out":
        raise UserError("patience needs a held-out reward to watch; pass --held-out, or let --best name something else")
    check_tracker(read.settings.tracker)
    method = method_of(read.method, method_option)
    read_prompts(read.prompts)
    watch = prompts_of(read.watch)
    if is_run(read.model):
        raise UserError(f"{read.model} is a run; give its model, and the run as --adapter to train on top of it")
    out = place_of(read, resume=resume, overwrite=overwrite)
    source = source_of(read.model, read.opening)
    check_guidance(read.settings.guidance)
    reward = rewards.parse(read.reward, source.reward_source)
    held_out = rewards.parse(read.held_out, source.reward_source) if read.held_out else None
    student = _student(read, method)
    from chainrule.finetune import finetune

    model = Source(read.model, source.opening, read.adapter).load(read.settings.timeout)
    run = finetune(
        model.with_student(read.student) if student else model, method, reward, read.prompts, read.settings, out=out,
        held_out=held_out, watch=watch, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    typer.echo(f"adapter: {run.adapter}")


def _student(config: FinetuneConfig, method: methods.Method) -> bool:
    """Whether the method jumps by a student. Raises UserError for a chain it does not fit, or a missing student or adapter."""
    from chainrule.models.bundled import best_steps

    grid = leading(config.settings.sample_steps or best_steps(config.model))
    student = "student" in methods.needs(method, grid).members
    if student:
        from chainrule.models.students import resolve

        resolve(config.student, config.model)
    elif config.student:
        raise UserError(f"{method} does not jump by a student; leave student out, or choose the method shortft")
    check_adapters(config.adapter, config.model, config.opening.solver)
    return student


@with_options
def distill(
    model: Annotated[
        str, typer.Argument(help="Bundled model, diffusers folder or hub id; or a .yaml file with any of the options below.")
    ],
    given: Annotated[Given, DistillConfig] = NOTHING,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Distill a few-step student that follows the model's trajectories, for shortft."""
    from chainrule.prompts import prompts as read_prompts

    config = DistillConfig.read(Path(model), given) if is_config(model) else DistillConfig.of({"model": model, **given})
    check_code(config, given, model if is_config(model) else None, allow_code)
    read_prompts(config.prompts)
    out = place_of(config, resume=resume, overwrite=overwrite)
    source = source_of(config.model, config.opening)
    check_guidance(config.settings.guidance)
    from chainrule.distill import distill as distilled

    run = distilled(
        source.load(config.settings.timeout), config.settings, out=out, prompts=config.prompts, resume=resume, overwrite=overwrite
    )
    typer.echo(f"student: {run.adapter}\nhow faithful it is: {run.folder / 'shortcut.md'}, {run.folder / 'shortcut.png'}")
