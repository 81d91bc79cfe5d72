"""Commands that use what was trained: `sample`, `eval`, `mix`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chainrule.asked import numbers
from chainrule.cli.app import Prompts, progress
from chainrule.cli.arguments import AllowCode, check_counts, check_free, counted, finite, prompts_of, weights
from chainrule.cli.opened import check_adapter, source_of, source_of_run
from chainrule.cli.options import with_options
from chainrule.config import AnyConfig
from chainrule.errors import UserError
from chainrule.files import make_folder, write_picture
from chainrule.named import refuse_code
from chainrule.runs import Run
from chainrule.settings import Opening, Sampling

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
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    overwrite: Overwrite = False,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Make images."""
    check_counts(seeds=seeds)
    finite(scale=scale)
    numbers([first_seed, first_seed + seeds - 1])
    every = [(prompt, first_seed + k) for prompt in prompts_of(prompts) for k in range(seeds)]
    from chainrule.models.published import PUBLISHED
    from chainrule.runs import check_folder

    check_folder(out)
    files = [out / f"{i:04d}.png" for i in range(len(every))]
    check_free([*files, out / "grid.png"], overwrite)
    base = source_of(source, opening, sampling, allow_code=allow_code)
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
    from chainrule.report.pictures import grid

    processes = Processes.here(model.device)
    with progress("sampling", -(-len(processes.share(every)) // 16) * len(model.grid(steps)[1:]), processes.main) as advance:
        images = model.sample([p for p, _ in every], [s for _, s in every], steps, guidance, on_call=advance, processes=processes)
    if not processes.main:
        return
    make_folder(out)
    for file, image in zip(files, images, strict=True):
        write_picture(file, image)
    write_picture(out / "grid.png", grid(images, min(len(images), 6), [p for p, _ in every]))
    typer.echo(f"{counted(len(images), 'image')} in {out}, all together in {out / 'grid.png'}")


@with_options
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one base model.")],
    prompts: Annotated[str, typer.Option(help="Prompts that were not trained on: a set, file or dataset.")] = "animals:test",
    reward: Annotated[list[str] | None, typer.Option(help="A reward to measure; default: the run's own. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    sampling: Sampling = Sampling(),
    scale: Annotated[float, typer.Option(help="Strength of the adapters.")] = 1.0,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Compare runs with their base model by rewards, with 95% intervals, and diversity."""
    from chainrule import rewards
    from chainrule.adapters.files import adapter_files
    from chainrule.prompts import prompts as read_prompts

    check_counts(seeds=seeds)
    finite(scale=scale)
    shown, first = read_prompts(prompts), _of_one_model(runs)
    source = source_of(runs[0], opening, sampling, allow_code=allow_code)
    if not reward:
        refuse_code({"reward": first.rewards}, runs[0], allow_code)
    scorers = [rewards.parse(name, source.reward_source) for name in reward or first.rewards]
    if not scorers:
        raise UserError(f"{runs[0]} does not say its reward; pass --reward")
    for folder in runs:
        adapter_files(folder)
    labels = _labels(runs)
    from chainrule.evaluate import evaluate as measure
    from chainrule.processes import Processes

    base, steps = source.load(), source.sampling.sample_steps
    models = {"before": base} | {name: base.using(folder, scale=scale) for name, folder in zip(labels, runs, strict=True)}
    processes = Processes.here(base.device)
    count = len(processes.share(range(len(shown) * seeds)))
    with progress("evaluating", len(models) * -(-count // 16) * (len(base.grid(steps)) - 1), processes.main) as advance:
        table = measure(
            models, shown, scorers, seeds=range(seeds), steps=steps, guidance=source.sampling.guidance, on_call=advance,
            processes=processes,
        )  # fmt: skip
    if not processes.main:
        return
    typer.echo(f"{len(shown)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{table}")
    if len(runs) == 1:
        table.save(runs[0] / "evaluation.json")


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


def mix(
    parts: Annotated[list[str], typer.Argument(help="Adapters and weights, as runs/pick=0.6 runs/hps=0.5.")],
    out: Annotated[Path, typer.Option(help="Folder of the mixed adapter.")],
    kohya: Annotated[
        Path | None, typer.Option(help="Also write a UNet's adapter to this file, as ComfyUI and kohya's scripts read it.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add scaled adapters into one, without approximation."""
    given = weights(parts)
    if kohya and kohya.suffix != ".safetensors":
        raise UserError(f"kohya is {str(kohya)!r}, but must end in .safetensors")
    from chainrule.adapters.files import FILE
    from chainrule.runs import check_folder

    check_folder(out)
    if (out / "config.yaml").exists():
        raise UserError(f"{out} is a run with an adapter of its own; choose another out")
    check_free([out / FILE, *([kohya] if kohya else [])], overwrite)
    from chainrule.adapters import mix as mixed

    made = mixed(given)
    if kohya:
        from chainrule.models.loras import save_kohya

        save_kohya(made, kohya)
    typer.echo(f"adapter: {made.save(out)}" + (f", {kohya}" if kohya else ""))


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write one self-contained HTML page about a run."""
    from chainrule.report import report as write

    typer.echo(str(write(run)))
