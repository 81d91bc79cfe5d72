"""Commands that use what was trained: `sample`, `eval`, `mix`, `report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainrule.asked import numbers
from chainrule.cli.app import Prompts, progress
from chainrule.cli.arguments import AllowCode, check_counts, check_free, counted, finite, prompts_of
from chainrule.cli.opened import Source, check_adapter, source_of, source_of_run
from chainrule.cli.options import with_options
from chainrule.config import AnyConfig
from chainrule.errors import UserError
from chainrule.files import make_folder, write_picture, write_text
from chainrule.named import refuse_code
from chainrule.runs import Run
from chainrule.settings import Opening, Sampling

if TYPE_CHECKING:
    from PIL.Image import Image

    from chainrule.evaluate import Renderer
    from chainrule.models import Model
    from chainrule.processes import Processes
    from chainrule.rewards import Reward

BestOfOption = Annotated[int, typer.Option("--best-of", help="Images tried for each one; the best by the reward is taken.")]
CHOSEN = "chosen.jsonl"  # the seed and reward of each best image
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]


@with_options
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a model.")],
    prompts: Prompts,
    seeds: Annotated[int, typer.Option(help="Images per prompt, with seeds 0, 1, ...")] = 1,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    sampling: Sampling = Sampling(),
    scale: Annotated[float, typer.Option(help="Strength of the run's adapter.")] = 1.0,
    adapter: Annotated[str | None, typer.Option(help="An adapter file or folder to put on top of a model.")] = None,
    adapter_steps: Annotated[
        tuple[int, int] | None, typer.Option(help="The sampling steps with adapters on: the first, and the one after the last.")
    ] = None,
    best_of: BestOfOption = 1,
    reward: Annotated[str | None, typer.Option(help="The reward by which the best of several images is chosen.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    overwrite: Overwrite = False,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Make images, or with --best-of the best of several for every prompt and seed."""
    check_counts(seeds=seeds, best_of=best_of)
    if (best_of > 1) != (reward is not None):
        raise UserError("--best-of and --reward go together: the number of images, and what chooses among them")
    finite(scale=scale)
    numbers([first_seed, first_seed + seeds - 1])
    every = [(prompt, first_seed + k) for prompt in prompts_of(prompts) for k in range(seeds)]
    from chainrule import rewards
    from chainrule.models.published import PUBLISHED
    from chainrule.runs import check_folder

    check_folder(out)
    files = [out / f"{i:04d}.png" for i in range(len(every))]
    check_free([*files, out / "grid.png", *([out / CHOSEN] if reward else [])], overwrite)
    base = source_of(source, opening, sampling, allow_code=allow_code)
    chooser = rewards.parse(reward, base.reward_source) if reward else None
    places = [place for place in (base.run, adapter) if place]
    for place in places:
        check_adapter(place, base.model, opening.solver)
    # A run is sampled as it was trained, unless asked otherwise or with a few-step adapter, which says itself how.
    chosen = sampling if str(adapter) in PUBLISHED else base.sampling
    steps, guidance = chosen.sample_steps, chosen.guidance
    model = base.load()
    for place in places:
        model = model.using(place, scale=scale, adapter_steps=adapter_steps, steps=steps)
    from chainrule.processes import Processes

    processes = Processes.here(model.device)
    images, told = _images(model, every, steps, guidance, processes, chooser, best_of)
    if processes.main:
        _write(out, files, [prompt for prompt, _ in every], images, told)


def _write(out: Path, files: list[Path], prompts: list[str], images: list[Image], told: list[dict[str, Any]]) -> None:
    from chainrule.report.pictures import grid

    make_folder(out)
    for file, image in zip(files, images, strict=True):
        write_picture(file, image)
    write_picture(out / "grid.png", grid(images, min(len(images), 6), prompts))
    if told:
        lines = [{"file": file.name, **each} for file, each in zip(files, told, strict=True)]
        write_text(out / CHOSEN, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    typer.echo(f"{counted(len(images), 'image')} in {out}, all together in {out / 'grid.png'}")


def _images(
    model: Model, every: list[tuple[str, int]], steps: int | None, guidance: Any, processes: Processes,
    chooser: Reward | None, n: int,
) -> tuple[list[Image], list[dict[str, Any]]]:  # fmt: skip
    """The images, with a progress bar; and where the best of several were chosen, which seed each has, and its reward."""
    from chainrule.baselines import BestOf

    prompts, seeds = [prompt for prompt, _ in every], [seed for _, seed in every]
    mine = len(processes.share(every))
    batches = mine * -(-n // 16) if chooser else -(-mine // 16)
    with progress("sampling", batches * len(model.grid(steps)[1:]), processes.main) as advance:
        if not chooser:
            return model.sample(prompts, seeds, steps, guidance, on_call=advance, processes=processes), []
        found = BestOf(model, chooser, n).best(prompts, seeds, steps, guidance, on_call=advance, processes=processes)
    told = [{"prompt": prompt, "seed": each.seed, "reward": each.reward} for prompt, each in zip(prompts, found, strict=True)]
    return [each.picture for each in found], told


@with_options
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one base model.")],
    prompts: Annotated[str, typer.Option(help="Prompts that were not trained on: a set, file or dataset.")] = "animals:test",
    reward: Annotated[list[str] | None, typer.Option(help="A reward to measure; default: the run's own. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    sampling: Sampling = Sampling(),
    scale: Annotated[float, typer.Option(help="Strength of the adapters.")] = 1.0,
    best_of: BestOfOption = 1,
    group: Annotated[
        str | None, typer.Option(help="A column of the prompt file to also average by: Category; style for HPDv2's folder.")
    ] = None,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Compare runs with their base model by rewards, with 95% intervals, and diversity."""
    from chainrule.adapters.files import adapter_files
    from chainrule.prompts import groups as prompt_groups
    from chainrule.prompts import prompts as read_prompts

    check_counts(seeds=seeds, best_of=best_of)
    finite(scale=scale)
    shown, first = read_prompts(prompts), _of_one_model(runs)
    groups = prompt_groups(prompts, group) if group else []
    source = source_of(runs[0], opening, sampling, allow_code=allow_code)
    scorers = _scorers(reward or [], runs[0], first, source, allow_code)
    for folder in runs:
        adapter_files(folder)
    labels = _labels(runs)
    from chainrule.evaluate import evaluate as measure
    from chainrule.processes import Processes

    base, steps = source.load(), source.sampling.sample_steps
    models = _compared(base, dict(zip(labels, runs, strict=True)), scale, scorers[0], best_of)
    processes = Processes.here(base.device)
    count = len(processes.share(range(len(shown) * seeds)))
    batches = (1 + len(runs)) * -(-count // 16) + (count * -(-best_of // 16) if best_of > 1 else 0)
    with progress("evaluating", batches * (len(base.grid(steps)) - 1), processes.main) as advance:
        table = measure(
            models, shown, scorers, seeds=range(seeds), steps=steps, guidance=source.sampling.guidance, on_call=advance,
            processes=processes,
        )  # fmt: skip
    if not processes.main:
        return
    typer.echo(f"{len(shown)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{table}")
    if groups:
        typer.echo(f"\nby {group}\n{table.grouped(groups)}")
    typer.echo(_told_apart(first, [scorer.name for scorer in scorers]))
    if len(runs) == 1:
        table.save(runs[0] / "evaluation.json", groups)


def _scorers(given: list[str], run: Path, config: AnyConfig, source: Source, allow_code: bool) -> list[Reward]:
    """The rewards that are measured: those given, else the run's own."""
    from chainrule import rewards

    if not given:
        refuse_code({"reward": config.rewards}, run, allow_code)
    found = [rewards.parse(name, source.reward_source) for name in given or config.rewards]
    if not found:
        raise UserError(f"{run} does not say its reward; pass --reward")
    return found


def _compared(base: Model, runs: dict[str, Path], scale: float, reward: Reward, best_of: int) -> dict[str, Renderer]:
    """The rows of an evaluation: the model before, the best of its images where that is asked for, and the runs."""
    from chainrule.baselines import BestOf

    models: dict[str, Renderer] = {"before": base}
    if best_of > 1:
        models[f"best of {best_of}"] = BestOf(base, reward, best_of)
    return models | {name: base.using(folder, scale=scale) for name, folder in runs.items()}


def _told_apart(config: AnyConfig, columns: list[str]) -> str:
    """Which columns the first run was trained on, and which it was not."""
    terms = _trained_on(config)
    trained, other = ([name for name in columns if (name in terms) is wanted] for wanted in (True, False))
    return f"trained on: {', '.join(trained) or 'none of these'}; not trained on: {', '.join([*other, 'diversity'])}"


def _trained_on(config: AnyConfig) -> set[str]:
    """The names of the rewards that a run was trained on: the whole, and its terms."""
    from chainrule import rewards

    named = getattr(config, "reward", None)
    if not named:
        return set()
    try:
        refuse_code({"reward": named}, "", False)
        return {named, *(term.name for _, term in rewards.parse(named).weighted())}
    except UserError:  # code that was not asked for, or a file that is gone
        return {named}


def _of_one_model(runs: list[Path]) -> AnyConfig:
    """The config of the first of these runs. Raises UserError unless all were made from one model, opened in one way."""
    configs = [Run(folder).config for folder in runs]
    first, one = configs[0], source_of_run(configs[0])
    for other, config in zip(runs, configs, strict=True):
        source = source_of_run(config)
        if source.model != one.model:
            raise UserError(f"{other} was trained from {source.model}, not from {one.model} as {runs[0]}")
        if source.adapters != one.adapters:
            raise UserError(f"{other} was trained on top of other adapters than {runs[0]}")
        for key in ("size", "solver"):
            if getattr(source.opening, key) != getattr(one.opening, key):
                how = f"{key} {getattr(source.opening, key)}, {runs[0]} with {getattr(one.opening, key)}"
                raise UserError(f"{other} was trained with {how}")
    return first


def _labels(runs: list[Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two folders have the same name."""
    if len(runs) == 1:
        return ["after"]
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError(f"a run is given twice: {', '.join(map(str, runs))}")
    names = [folder.resolve().name for folder in runs]
    return names if len({"before", *names}) > len(names) else list(map(str, runs))


def report(runs: Annotated[list[Path], typer.Argument(help="A run folder, or several to put side by side.")]) -> None:
    """Write one self-contained HTML page about a run; of several, one that compares them, into the first one's folder."""
    from chainrule.report import report as write

    typer.echo(str(write(*runs)))
