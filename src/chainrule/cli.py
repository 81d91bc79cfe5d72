"""The command line: the library's own words. Nothing heavy is imported until a command has checked its input."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from chainrule.arguments import TRAIN_KEYS, at_least_one, configured, counted, method_of, said, weights, with_settings
from chainrule.errors import UserError
from chainrule.settings import Settings

app = typer.Typer(
    name="chainrule", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Align and steer diffusion models by backpropagating rewards through the sampling chain.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip

Steps = Annotated[int | None, typer.Option(help="Network calls per image; default: the model's best.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's best.")]
Options = Annotated[list[str] | None, typer.Option("--method-option", help="An option of the method, as k=5. May be repeated.")]
Prompts = Annotated[list[str], typer.Option(help="A prompt, a prompt set, or a text/JSON file. May be repeated.")]


@app.command()
@with_settings
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with any of the options below.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundled model, diffusers folder or hub id. [default: tiny-emoji]")] = None,
    method: Annotated[str | None, typer.Option(help="See `chainrule methods`. [default: draft-lv]")] = None,
    method_option: Options = None,
    reward: Annotated[str | None, typer.Option(help='For example "10*pickscore + 2*hpsv2"; see `chainrule rewards`.')] = None,
    held_out: Annotated[str | None, typer.Option(help="A reward that is watched, not trained.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt set or file. [default: animals:train]")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the base weights. [default: float32]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    **options: Any,
) -> None:
    """Fine-tune an adapter so that its images score higher."""
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts
    from chainrule.runs import Run

    given = {"model": model, "method": method, "reward": reward, "held_out": held_out, "prompts": prompts, "out": out,
             "dtype": dtype} | options  # fmt: skip
    values = configured(config, given)
    named = {key: values.pop(key, None) for key in TRAIN_KEYS}
    for key in ("reward", "out"):
        if not named[key]:
            raise UserError(f"no {key} given; pass --{key}")
    settings = Settings.make(values)
    if settings.patience and not named["held_out"]:
        raise UserError("patience needs a held-out reward to watch; pass --held-out")
    made = method_of(named["method"] or "draft-lv", method_option, settings.sample_steps)
    source, shown = named["model"] or "tiny-emoji", named["prompts"] or "animals:train"
    read_prompts(shown)
    Run(named["out"]).check_place(resume=resume, overwrite=overwrite)
    scorer = rewards.parse(named["reward"])
    judge = rewards.parse(named["held_out"]) if named["held_out"] else None
    from chainrule.models.loading import check, load

    check(source)
    from chainrule.finetune import finetune

    run = finetune(
        load(source, dtype=named["dtype"] or "float32"), made, scorer, shown, out=named["out"], held_out=judge,
        resume=resume, overwrite=overwrite, **values,
    )  # fmt: skip
    typer.echo(f"adapter: {run.adapter}")


def _run(source: str | Path) -> Path | None:
    """The run folder this is, or None when it names a model."""
    return Path(source) if (Path(source) / "config.yaml").is_file() else None


def _base(source: str | Path) -> str:
    """The name, checked, of a model or of the model of a run."""
    from chainrule.models.loading import check
    from chainrule.runs import Run

    folder = _run(source)
    name = str(Run(folder).config.get("model")) if folder else str(source)
    check(name)
    return name


@app.command()
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a model.")],
    prompts: Prompts,
    seeds: Annotated[int, typer.Option(help="Images per prompt, with seeds 0, 1, ...")] = 1,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    scale: Annotated[float, typer.Option(help="Strength of the run's adapter.")] = 1.0,
    adapter: Annotated[str | None, typer.Option(help="An adapter file or folder to put on top of a model.")] = None,
    adapter_steps: Annotated[
        tuple[int, int] | None, typer.Option(help="The sampling steps adapters are on for: first, and the one after the last.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Make images."""
    at_least_one(seeds=seeds, steps=steps)
    every = [(prompt, first_seed + k) for prompt in said(prompts) for k in range(seeds)]
    from chainrule.adapters.files import find
    from chainrule.runs import check_folder

    check_folder(out)
    name, files = _base(source), [find(place) for place in (_run(source), adapter) if place]
    from chainrule.models.loading import load

    model = load(name)
    for file in files:
        model = model.using(file, scale=scale, adapter_steps=adapter_steps, steps=steps)
    with _progress("sampling", -(-len(every) // 16) * len(model.grid(steps)[1:])) as advance:
        images = model.sample([p for p, _ in every], [s for _, s in every], steps, guidance, on_call=advance)
    from chainrule.report.pictures import grid

    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(out / f"{i:04d}.png")
    grid(images, min(len(images), 6), [p for p, _ in every]).save(out / "grid.png")
    typer.echo(f"{len(images)} images in {out}, all together in {out / 'grid.png'}")


def _progress(label: str, total: int) -> Any:
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(transient=True, console=Console(stderr=True)) as progress:
            task = progress.add_task(label, total=total)
            yield lambda: progress.advance(task)

    return bar()


@app.command("eval")
def evaluate_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one base model.")],
    prompts: Annotated[str, typer.Option(help="Prompt set or file; not the ones trained on.")] = "animals:test",
    reward: Annotated[list[str] | None, typer.Option(help="Rewards to measure; default: the run's own. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    steps: Steps = None,
    guidance: Guidance = None,
    scale: Annotated[float, typer.Option(help="Strength of the adapters.")] = 1.0,
) -> None:
    """Compare runs with their base model: rewards with 95% intervals, and diversity."""
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts
    from chainrule.runs import Run

    at_least_one(seeds=seeds, steps=steps)
    shown, configs = read_prompts(prompts), [Run(folder).config for folder in runs]
    first = configs[0]
    for other, config in zip(runs, configs, strict=True):
        if config.get("model") != first.get("model"):
            raise UserError(f"{other} was trained from {config.get('model')}, not from {first.get('model')} as {runs[0]}")
    scorers = [rewards.parse(name) for name in reward or filter(None, map(first.get, ("reward", "held_out")))]
    if not scorers:
        raise UserError(f"{runs[0]} does not say its reward; pass --reward")
    from chainrule.adapters.files import find

    adapters, labels = [find(folder) for folder in runs], _labels(runs)
    name = _base(runs[0])
    from chainrule.evaluate import evaluate
    from chainrule.models.loading import load

    base = load(name)

    steps = steps if steps is not None else first.get("sample_steps")
    guidance = guidance if guidance is not None else first.get("guidance")
    models = {"before": base} | {name: base.using(adapter, scale=scale) for name, adapter in zip(labels, adapters, strict=True)}
    with _progress("evaluating", len(models) * -(-len(shown) * seeds // 16) * (len(base.grid(steps)) - 1)) as advance:
        table = evaluate(models, shown, scorers, seeds=range(seeds), steps=steps, guidance=guidance, on_call=advance)
    typer.echo(f"{len(shown)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{table}")
    if len(runs) == 1:
        table.save(runs[0] / "evaluation.json")


def _labels(runs: list[Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two folders have the same name."""
    if len(runs) == 1:
        return ["after"]
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError(f"a run is given twice: {', '.join(map(str, runs))}")
    names = [folder.resolve().name for folder in runs]
    return names if len({"before", *names}) > len(names) else list(map(str, runs))


@app.command()
def mix(
    parts: Annotated[list[str], typer.Argument(help="Adapters and weights, as runs/pick=0.6 runs/hps=0.5.")],
    out: Annotated[Path, typer.Option(help="Folder of the mixed adapter.")],
) -> None:
    """Add scaled adapters into one, exactly."""
    given = weights(parts)
    from chainrule.runs import check_folder

    check_folder(out)
    if (out / "config.yaml").exists():
        raise UserError(f"{out} is a run with an adapter of its own; choose another out")
    from chainrule.adapters import mix as mixed

    typer.echo(f"adapter: {mixed(given).save(out)}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write one self-contained HTML page about a run."""
    from chainrule.report import report as write

    typer.echo(str(write(run)))


@app.command()
def plan(
    method: Annotated[str, typer.Argument(help="See `chainrule methods`.")],
    steps: Annotated[int, typer.Option(help="Network calls of the sampling chain.")] = 50,
    method_option: Options = None,
    seed: Annotated[int, typer.Option(help="Of the method's random choices.")] = 0,
) -> None:
    """Draw what a method backpropagates through, and forecast its cost."""
    from chainrule.plan import Forecast

    at_least_one(steps=steps)
    made = method_of(method, method_option, steps)
    drawn = made.plan(tuple(range(20 * steps, -1, -20)), Random(seed))
    typer.echo(f"{made}\n{drawn}\n  - constant call   = its weights   # weights and input   ^ noised again   [ branches | ]")
    for policy in ("recompute", "keep"):
        cost = Forecast.of(drawn, recompute=policy == "recompute")
        typer.echo(
            f"{policy:9}  {counted(cost.calls, 'network call')}, {counted(cost.backward, 'backward call')}, about "
            f"{cost.calls * cost.relative_time / steps:.2f}x the time of sampling, memory of {counted(cost.graphs, 'call graph')}"
        )


@app.command()
def methods() -> None:
    """List the methods."""
    from chainrule import methods as room

    for name in room.REGISTRY:
        typer.echo(f"{name:10} {room.describe(name)}")


@app.command()
def rewards() -> None:
    """List the rewards."""
    from chainrule.rewards import REGISTRY

    for name, entry in REGISTRY.items():
        typer.echo(f"{name:15} {entry.about}")


@app.command()
def models() -> None:
    """List the bundled models and the supported families."""
    from chainrule.models.loading import BUNDLED, FAMILIES

    for name, (_, about) in BUNDLED.items():
        typer.echo(f"{name:12} {about}")
    typer.echo(f"any folder or hub id of: {', '.join(FAMILIES)}")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        app(prog_name="chainrule")
    except UserError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
