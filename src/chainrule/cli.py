"""The command line: the library's own words. Nothing heavy is imported until a command has checked its input."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Annotated, Any, get_args

import typer
import yaml

from chainrule.errors import UserError, unknown
from chainrule.settings import Settings

app = typer.Typer(
    name="chainrule", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Align and steer diffusion models by backpropagating rewards through the sampling chain.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip

ModelName = Annotated[str, typer.Option(help="Bundled model, diffusers folder or hub id.")]
Steps = Annotated[int | None, typer.Option(help="Network calls per image; default: the model's best.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's best.")]
Options = Annotated[list[str] | None, typer.Option("--method-option", help="An option of the method, as k=5. May be repeated.")]
Prompts = Annotated[list[str], typer.Option(help="A prompt, a prompt set, or a text/JSON file. May be repeated.")]


def _method_options(pairs: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"method option {pair!r} must look like k=5")
        options[key.strip()] = yaml.safe_load(value)
    return options


def _said(sources: list[str]) -> list[str]:
    from chainrule.prompts import SETS, prompts

    found: list[str] = []
    for source in sources:
        name = source.removesuffix(":train").removesuffix(":test")
        is_file = name.endswith((".txt", ".json", ".jsonl")) or Path(name).is_file()
        found += prompts(source) if name in SETS or is_file else [source]
    if not all(prompt.strip() for prompt in found):
        raise UserError("a prompt is empty")
    return found


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every field of `Settings`, so that they are written down once."""
    signature = inspect.signature(function, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if get_args(kind) and str in {type(a) for a in get_args(kind)}:  # a Literal: pydantic checks the value
            help_text, kind = f"{field.description} ({' | '.join(get_args(kind))})", str
        else:
            help_text = str(field.description)
        kind = next((a for a in get_args(kind) if a is not type(None)), kind)
        shown = "" if field.default is None else f" [default: {field.default}]"
        option = typer.Option(help=help_text[0].upper() + help_text[1:] + shown, show_default=False)
        annotation = Annotated[kind | None, option]  # type: ignore[operator, valid-type]
        kept.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return function


TRAIN_KEYS = ("model", "method", "reward", "held_out", "prompts", "out", "dtype")


def _configured(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The YAML file's values, overridden by what was given on the command line."""
    values: dict[str, Any] = {}
    if config:
        if not config.is_file():
            raise UserError(f"the config file {config} does not exist")
        try:
            values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"the config file {config} is not valid YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(values, dict):
            raise UserError(f"the config file {config} must hold keys and values")
    for key in values:
        if key not in (*TRAIN_KEYS, *Settings.model_fields):
            raise unknown(f"key in {config}", str(key), [*TRAIN_KEYS, *Settings.model_fields])
    return values | {key: value for key, value in given.items() if value is not None}


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
    from chainrule import methods, rewards
    from chainrule.prompts import prompts as read_prompts

    given = {"model": model, "method": method, "reward": reward, "held_out": held_out, "prompts": prompts, "out": out,
             "dtype": dtype} | options  # fmt: skip
    values = _configured(config, given)
    named = {key: values.pop(key, None) for key in TRAIN_KEYS}
    if not named["reward"] or not named["out"]:
        raise UserError(f"no {'reward' if not named['reward'] else 'out'} given; pass --{'reward' if not named['reward'] else 'out'}")
    chosen = named["method"] or "draft-lv"
    spec = dict(chosen) if isinstance(chosen, dict) else {"name": chosen}
    made = methods.make(str(spec.pop("name", "draft-lv")), spec | _method_options(method_option))
    said = str(named["prompts"] or "animals:train")
    Settings.make(values)
    read_prompts(said)
    source = str(named["model"] or "tiny-emoji")
    from chainrule.models.load import check, load

    check(source)
    scorer = rewards.parse(named["reward"])
    judge = rewards.parse(named["held_out"]) if named["held_out"] else None
    from chainrule.finetune import finetune

    run = finetune(
        load(source, dtype=named["dtype"] or "float32"), made, scorer, said, out=named["out"], held_out=judge,
        resume=resume, overwrite=overwrite, **values,
    )  # fmt: skip
    typer.echo(f"adapter: {run.adapter}")


def _model(source: str, scale: float = 1.0, base: bool = False) -> Any:
    """A model by name, or the model of a run with the run's adapter on top."""
    from chainrule.models.load import check, load
    from chainrule.runs import Run

    folder = Path(source)
    if not (folder / "config.yaml").is_file():
        check(source)
        return load(source)
    run = Run(folder)
    from chainrule.adapters.files import find

    adapter, name = find(folder), str(run.config["model"])
    check(name)
    model = load(name)
    return model if base else model.using(adapter, scale=scale)


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
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
) -> None:
    """Make images."""
    said = _said(prompts)
    if seeds < 1:
        raise UserError(f"seeds is {seeds}, but must be at least 1")
    model = _model(source, scale)
    model = model.using(adapter, scale=scale) if adapter else model
    every = [(prompt, first_seed + k) for prompt in said for k in range(seeds)]
    with _progress("sampling", len(every) * len(model.grid(steps)[1:]) // 16 + 1) as advance:
        images = model.sample([p for p, _ in every], [s for _, s in every], steps, guidance, on_call=advance)
    from chainrule.report.pictures import grid

    out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(out / f"{i:04d}.png")
    grid(images, min(len(images), 6), [p for p, _ in every]).save(out / "grid.png")
    typer.echo(f"{len(images)} images in {out}, all together in {out / 'grid.png'}")


def _progress(label: str, total: int) -> Any:
    from contextlib import contextmanager

    from rich.progress import Progress

    @contextmanager
    def bar() -> Any:
        with Progress(transient=True) as progress:
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

    said, first = read_prompts(prompts), Run(runs[0]).config
    if seeds < 1:
        raise UserError(f"seeds is {seeds}, but must be at least 1")
    for other in runs[1:]:
        if Run(other).config["model"] != first["model"]:
            raise UserError(f"{other} was trained from {Run(other).config['model']}, not from {first['model']}")
    named = reward or [first[key] for key in ("reward", "held_out") if first.get(key)]
    scorers = [rewards.parse(name) for name in named]
    base = _model(str(runs[0]), base=True)
    from chainrule.adapters.files import find
    from chainrule.evaluate import evaluate

    steps = steps if steps is not None else first.get("sample_steps")
    guidance = guidance if guidance is not None else first.get("guidance")
    after = [folder.name for folder in runs] if len(runs) > 1 else ["after"]
    models = {"before": base} | {name: base.using(find(f), scale=scale) for name, f in zip(after, runs, strict=True)}
    with _progress("evaluating", len(models) * -(-len(said) * seeds // 16) * (len(base.grid(steps)) - 1)) as advance:
        table = evaluate(models, said, scorers, seeds=range(seeds), steps=steps, guidance=guidance, on_call=advance)
    typer.echo(f"{len(said)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{table}")
    if len(runs) == 1:
        table.save(runs[0] / "evaluation.json")


@app.command()
def mix(
    parts: Annotated[list[str], typer.Argument(help="Adapters and weights, as runs/pick=0.6 runs/hps=0.5.")],
    out: Annotated[Path, typer.Option(help="Folder of the mixed adapter.")],
) -> None:
    """Add scaled adapters into one, exactly."""
    weights: dict[Path, float] = {}
    for part in parts:
        name, sign, value = part.rpartition("=")
        try:
            weights[Path(name)] = float(value)
        except ValueError as error:
            raise UserError(f"{part!r} must look like runs/pick=0.6") from error
        if not sign or not name:
            raise UserError(f"{part!r} must look like runs/pick=0.6")
    from chainrule.adapters import mix as mixed

    typer.echo(f"adapter: {mixed(weights).save(out)}")


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
    from chainrule import methods
    from chainrule.plan import Forecast

    if steps < 1:
        raise UserError(f"steps is {steps}, but must be at least 1")
    made = methods.make(method, _method_options(method_option))
    drawn = made.plan(tuple(range(20 * steps, -1, -20)), Random(seed))
    typer.echo(f"{made}\n{drawn}\n  - constant call   = its weights   # weights and input   ^ noised again   [ branches | ]")
    for policy in ("recompute", "keep"):
        cost = Forecast.of(drawn, recompute=policy == "recompute")
        typer.echo(
            f"{policy:9}  {cost.calls} network calls, {cost.backward} backward calls, about {cost.calls * cost.relative_time / steps:.2f}x "
            f"the time of sampling, memory of {cost.graphs} call graph{'s' if cost.graphs > 1 else ''}"
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
    from chainrule.models.load import BUNDLED, FAMILIES

    for name, (_, about) in BUNDLED.items():
        typer.echo(f"{name:12} {about}")
    typer.echo(f"any folder or hub id of: {', '.join(FAMILIES)}")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
