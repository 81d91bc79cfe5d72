"""Commands that show or measure something: `plan`, `analyze`, `doctor`, `methods`, `rewards`, `models`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from chainrule.cli.app import ChainSteps, Guidance, Options, progress
from chainrule.cli.arguments import AllowCode, check_counts, counted, method_of
from chainrule.cli.forecasting import card_size, forecast
from chainrule.cli.opened import Source, source_of
from chainrule.cli.options import NOTHING, Given, with_options
from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.files import make_folder, write_picture, write_text
from chainrule.plan import Grid, Levels
from chainrule.settings import Opening, Sampling


@with_options
def plan(
    method: Annotated[str, typer.Argument(help="One of `chainrule methods`, or path/to/file.py:Class.")] = "draft-lv",
    given: Annotated[Given, FinetuneConfig] = NOTHING,
    sample_steps: ChainSteps = 50,
    stage: Annotated[int | None, typer.Option(help="Stage to draw, counted from 1; default: all of them.")] = None,
    method_option: Options = None,
    seed: Annotated[int, typer.Option(help="Seed of the method's random choices.")] = 0,
    memory_of: Annotated[
        str | None, typer.Option(help="A card, as 24GB: also count what `train` with the same options takes of it.")
    ] = None,
) -> None:
    """Draw what a method backpropagates through, and forecast its cost; with --memory-of, its memory too.

    The memory is counted from the model's configuration, without its weights and without a GPU.
    """
    from chainrule.methods import LikelihoodRatio, needs, stages
    from chainrule.plan import Forecast, leading

    check_counts(sample_steps=sample_steps)
    config = FinetuneConfig.of({**given, "sample_steps": sample_steps})
    card = card_size(memory_of) if memory_of else None
    levels, made = leading(sample_steps), method_of({"name": method}, method_option)
    turns = stages(made)
    plans = [(turn.plan(levels, Random(seed)), needs(turn, levels)) for turn in turns]
    if stage is not None and not 1 <= stage <= len(turns):
        raise UserError(f"stage is {stage}, but {method} has {counted(len(turns), 'stage')}")
    typer.echo(made)
    for drawn, own in plans if stage is None else plans[stage - 1 : stage]:
        typer.echo(drawn)
        for name, spans in own.adapters.items():
            if spans is not None or len(own.adapters) > 1:
                role, where = "trained" if name in own.trained else "frozen ", ", ".join(_calls(levels, spans or ((0, None),)))
                typer.echo(f"  {role}  {name} on at {where}")
        # Likelihoods are pulled along states that were kept, one call at a time whatever the policy.
        for policy in ("recompute",) if isinstance(own.estimator, LikelihoodRatio) else ("recompute", "keep"):
            cost = Forecast.of(drawn, recompute=policy == "recompute")
            times = cost.calls * cost.relative_time / sample_steps
            typer.echo(
                f"{policy:9}  {counted(cost.calls, 'network call')}, {counted(cost.backward, 'backward call')}, about "
                f"{times:.2f}x the time of sampling, memory of {counted(cost.graphs, 'call graph')}"
            )
    typer.echo("- constant call   = its weights   ~ its input   # both   > another member's call   ^ noised again   [ branches | ]")
    if any(mark in str(drawn) for drawn, _ in plans for mark in "+."):
        typer.echo("+ its weights, and a share of its input   . passed over by a leap")
    if card:
        forecast(config, made, card)


def _calls(levels: Grid, spans: Levels) -> list[str]:
    """The calls of a grid that lie in these spans, as levels."""
    found = []
    for low, high in spans:
        inside = [level for level in levels[:-1] if low < level and (high is None or level <= high)]
        found += [f"{inside[0]} to {inside[-1]}" if len(inside) > 1 else str(level) for level in inside[:1]]
    return found


Model = Annotated[str, typer.Argument(help="Bundled model, diffusers folder or hub id.")]
analyses = typer.Typer(no_args_is_help=True, help="Measure what the methods rest on, as the papers do.", rich_markup_mode=None)


@analyses.command("shortcut")
@with_options
def analyze_shortcut(
    model: Annotated[str, typer.Argument(help="Bundled model, diffusers folder or hub id.")] = "tiny-emoji",
    student: Annotated[str | None, typer.Option(help="The model's student; default: the one that ships with it.")] = None,
    student_steps: Annotated[
        int | None, typer.Option(help="Network calls the student makes an image with; default: its own.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set, file or dataset.")] = "animals:test",
    reward: Annotated[
        list[str] | None, typer.Option(help="A reward to compare; default: those bundled with a bundled model. May be repeated.")
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP of the perceptual distance; default: the one bundled with a bundled model.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 2,
    sample_steps: ChainSteps = 50,
    points: Annotated[int, typer.Option(help="Levels to start from.")] = 5,
    guidance: Guidance = None,
    out: Annotated[Path, typer.Option(help="Folder for the table and the picture.")] = Path("runs/shortcut"),
    opening: Opening = Opening(),
) -> None:
    """Measure how far from the model's own image a student's shortcut ends (Figure 3 of ShortFT)."""
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts
    from chainrule.rewards.clip import check_source
    from chainrule.runs import check_folder

    check_counts(seeds=seeds, sample_steps=sample_steps, points=points, student_steps=student_steps)
    count, compared = len(read_prompts(prompts)), [rewards.parse(name, Source(model).reward_source) for name in reward or ()]
    if clip:
        check_source(clip, "clip")
    check_folder(out)
    from chainrule.models.students import facts, resolve

    source = source_of(model, opening)
    student_steps = student_steps or facts(resolve(student, model)).get("steps", 4)
    from chainrule.analyze import save, shortcut

    net = source.load().with_student(student)
    batches = -(-count * seeds // 16)
    with progress("analyzing", batches * (sample_steps + points * (3 * student_steps + 1))) as advance:
        found = shortcut(
            net, prompts, compared, seeds=seeds, steps=sample_steps, student_steps=student_steps, guidance=guidance, points=points,
            clip=clip, on_call=advance,
        )  # fmt: skip
    what = f"distance from the {sample_steps}-step image, mean ± 95% interval over prompts"
    typer.echo(f"{count} prompts x {seeds} seeds; {what}\n{found}")
    typer.echo(f"table and picture: {save(found, out)}")


@analyses.command("picard")
@with_options
def analyze_picard(
    model: Model = "tiny-emoji",
    reward: Annotated[
        str | None, typer.Option(help="The reward; default: the aesthetic score bundled with a bundled model.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set, file or dataset.")] = "animals:test",
    images: Annotated[int, typer.Option(help="Number of images, one for each of the first prompts.")] = 4,
    sampling: Sampling = Sampling(),
    tolerance: Annotated[
        float, typer.Option(help="Distance to the sequential image that counts as converged, as a share of the latent.")
    ] = 1e-2,
    out: Annotated[Path, typer.Option(help="Folder for the table and the picture.")] = Path("runs/picard"),
    opening: Opening = Opening(),
) -> None:
    """Measure how fast Picard iteration converges, and the error of SDO's gradient and its bound."""
    net, shown, scorer = _measured(model, reward, prompts, images, out, opening)
    from chainrule.analyze import picard
    from chainrule.report.plots import plot

    number = len(net.grid(sampling.sample_steps)) - 1
    with progress("analyzing", 0) as advance:
        found = picard(net, shown, scorer, steps=number, guidance=sampling.guidance, tolerance=tolerance, on_call=advance)
    curves = {"moved by": found.change, "from the sequential image": found.error}
    points = {name: [(k + 1.0, e.mean) for k, e in enumerate(curve)] for name, curve in curves.items()}
    _kept(str(found), plot(points, f"Picard iteration over {number} steps", "iteration", log=True), out, "picard")


@analyses.command("gradients")
@with_options
def analyze_gradients(
    model: Model = "tiny-emoji",
    reward: Annotated[
        str | None, typer.Option(help="The reward; default: the aesthetic score bundled with a bundled model.")
    ] = None,
    prompts: Annotated[str, typer.Option(help="Prompt set, file or dataset.")] = "animals:train",
    batches: Annotated[int, typer.Option(help="Batches of four images.")] = 4,
    sample_steps: ChainSteps = 50,
    guidance: Guidance = None,
    out: Annotated[Path, typer.Option(help="Folder for the table and the picture.")] = Path("runs/gradients"),
    opening: Opening = Opening(),
) -> None:
    """Measure the gradient's norm and angle by depth (Figure 11a of SDO, Figures 8 and 25 of DRaFT)."""
    check_counts(batches=batches, sample_steps=sample_steps)
    net, shown, scorer = _measured(model, reward, prompts, 1000, out, opening)
    from chainrule.analyze import gradients

    with progress("analyzing", 0) as advance:
        found = gradients(net, shown, scorer, steps=sample_steps, guidance=guidance, batches=batches, on_call=advance)
    _kept(str(found), found.picture(), out, "gradients")


def _measured(model: str, reward: str | None, prompts: str, images: int, out: Path, opening: Opening) -> tuple[Any, list[str], Any]:
    """The loaded model, prompts and reward of an analysis, all names checked first."""
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts
    from chainrule.runs import check_folder

    check_counts(images=images)
    own = Source(model).reward_source
    if not (reward or own):
        raise UserError("no reward given; pass --reward")
    shown, scorer = read_prompts(prompts)[:images], rewards.parse(reward or "aesthetic", own)
    check_folder(out)
    net = source_of(model, opening).load()
    return net, list(net.defaults.labels[:images]) or shown, scorer  # a model of classes knows no prompts


def _kept(table: str, picture: Any, out: Path, name: str) -> None:
    make_folder(out)
    write_text(out / f"{name}.md", table + "\n")
    write_picture(out / f"{name}.png", picture)
    typer.echo(f"{table}\ntable and picture: {out / name}.md, .png")


@with_options
def doctor(
    model: Annotated[str | None, typer.Option(help="Bundled model, diffusers folder, hub id or run.")] = None,
    reward: Annotated[str | None, typer.Option(help="A reward to load and to differentiate; default: brightness.")] = None,
    sample_steps: ChainSteps = 4,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to try the model on; default: four drawings. May be repeated.")
    ] = None,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Check the installation and, given a model, its samples, gradient and memory."""
    from chainrule import rewards

    check_counts(sample_steps=sample_steps)
    source = source_of(model, opening, allow_code=allow_code) if model is not None else None
    scorer = rewards.parse(reward, source.reward_source if source else None) if reward else None
    from chainrule.doctor import Check, environment, examine
    from chainrule.steer.images import check_image, read_image

    for path in image or ():
        check_image(path)

    def examined() -> Iterator[Check]:
        if source:
            net = source.load()
            yield from examine(net, scorer, steps=sample_steps, pictures=[read_image(path, net.size) for path in image or ()])

    fine = True
    for each in (environment, examined):
        for check in each():
            typer.echo(str(check))
            fine = fine and check.fine is not False
    if not fine:
        raise typer.Exit(1)


def methods() -> None:
    """List the methods."""
    from chainrule import methods as room

    for name in room.REGISTRY:
        typer.echo(f"{name:10} {room.describe(name)}")


def rewards() -> None:
    """List the rewards."""
    from chainrule.rewards import REGISTRY

    for name, entry in REGISTRY.items():
        typer.echo(f"{name:15} {entry.about}")


def models() -> None:
    """List the bundled models and the supported families."""
    from chainrule.models import BUNDLED, FAMILIES, PUBLISHED
    from chainrule.models.published import HUB

    for name, (_, about) in BUNDLED.items():
        typer.echo(f"{name:12} {about}")
    typer.echo(f"any folder or hub id of: {', '.join(FAMILIES)}")
    typer.echo("few-step adapters and students by name:")
    for name, known in PUBLISHED.items():
        typer.echo(f"  {name:14} {known.steps:2} calls  {known.where if name in HUB else 'ships with the package'}")
