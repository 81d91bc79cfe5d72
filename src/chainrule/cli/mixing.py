"""Commands about an adapter's strength: `mix`, and `analyze steps`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from chainrule.asked import numbers
from chainrule.cli.app import Prompts, progress
from chainrule.cli.arguments import AllowCode, check_counts, check_free, prompts_of, weights
from chainrule.cli.looking import analyses
from chainrule.cli.opened import Source, is_run, source_of
from chainrule.cli.options import with_options
from chainrule.errors import UserError
from chainrule.files import make_folder, write_picture
from chainrule.settings import Opening, Sampling

GRID = "grid.png"
Seed = Annotated[int, typer.Option(help="Seed of the noise, the same in every cell.")]


@with_options
def mix(
    parts: Annotated[list[str], typer.Argument(help="Adapters and weights, as runs/pick=0.6 runs/hps=0.5.")],
    out: Annotated[Path, typer.Option(help="Folder of the mixed adapter.")],
    kohya: Annotated[
        Path | None, typer.Option(help="Also write it to this file as ComfyUI reads it; of UNets and FLUX in kohya's spelling.")
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="Also draw grid.png: each of one or two adapters from 0 to its weight in so many steps.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="A prompt of the grid, a prompt set or file. May be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="The model of the grid; default: that of the first run.")] = None,
    seed: Seed = 0,
    sampling: Sampling = Sampling(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Add scaled adapters into one, without approximation; with --grid also a picture of their scales."""
    given = weights(parts)
    if kohya and kohya.suffix != ".safetensors":
        raise UserError(f"kohya is {str(kohya)!r}, but must end in .safetensors")
    if (grid is None) != (not prompts):
        raise UserError("--grid and --prompts go together: how many steps, and of what")
    from chainrule.adapters.files import FILE
    from chainrule.runs import check_folder

    check_folder(out)
    if (out / "config.yaml").exists():
        raise UserError(f"{out} is a run with an adapter of its own; choose another out")
    check_free([out / FILE, *([kohya] if kohya else []), *([out / GRID] if grid else [])], overwrite)
    shown = prompts_of(prompts or [])
    under = _under(model, given, shown, grid, seed, sampling, allow_code) if grid is not None else None
    from chainrule.adapters import mix as mixed

    made = mixed(given)
    if kohya:
        from chainrule.models.kohya import save_kohya

        save_kohya(made, kohya)
    typer.echo(f"adapter: {made.save(out)}" + (f", {kohya}" if kohya else ""))
    if under and grid:
        _draw_scales(under, {str(path): weight for path, weight in given.items()}, shown, grid, seed, out)


def _under(
    model: str | None, given: Mapping[Path, float], prompts: list[str], cells: int, seed: int, sampling: Sampling, allow_code: bool
) -> Source:  # fmt: skip
    """The model of a grid, under its adapters. Raises UserError for a grid that cannot be drawn."""
    check_counts(grid=cells)
    numbers([seed])
    if len(given) > 2:
        raise UserError(f"a grid shows one adapter or two, not {len(given)}; leave out --grid, or some of them")
    if len(given) == 2 and len(prompts) != 1:
        raise UserError(f"a grid of two adapters shows one prompt, not {len(prompts)}")
    named = model or next((source for source in given if is_run(source)), None)
    if named is None:
        raise UserError("none of the adapters is a run that says its model; pass --model")
    return source_of(named, Opening(), sampling, allow_code=allow_code)


def _draw_scales(
    under: Source, adapters: Mapping[str, float], prompts: list[str], cells: int, seed: int, out: Path
) -> None:  # fmt: skip
    from chainrule.analyze import scale_grid

    model, how = under.load(), under.sampling
    rows = len(prompts) if len(adapters) == 1 else cells + 1
    with progress("drawing", rows * (cells + 1) * (len(model.grid(how.sample_steps)) - 1)) as advance:
        sheet = scale_grid(
            model, adapters, prompts, cells=cells, seed=seed, steps=how.sample_steps, guidance=how.guidance, on_call=advance,
        )  # fmt: skip
    make_folder(out)
    write_picture(out / GRID, sheet)
    typer.echo(f"picture: {out / GRID}")


@analyses.command("steps")
@with_options
def analyze_steps(
    run: Annotated[str, typer.Argument(help="A run with one adapter.")],
    prompts: Prompts,
    cells: Annotated[int, typer.Option(help="Parts that the sampling steps are divided into.")] = 5,
    seed: Seed = 0,
    sampling: Sampling = Sampling(),
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("runs/steps"),
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Draw a run's images with its adapter on until step M, and from step M on (Figures 26 and 27 of DRaFT)."""
    from chainrule.adapters.files import find
    from chainrule.runs import check_folder

    check_counts(cells=cells)
    numbers([seed])
    shown = prompts_of(prompts)
    check_folder(out)
    if not is_run(run):
        raise UserError(f"{run} is no run; give the folder of one")
    find(run)
    source = source_of(run, opening, sampling, allow_code=allow_code)
    from chainrule.analyze import step_grid

    model, steps = source.load(), source.sampling.sample_steps
    with progress("drawing", len(shown) * 2 * (cells + 1) * (len(model.grid(steps)) - 1)) as advance:
        sheet = step_grid(
            model, run, shown, cells=cells, seed=seed, steps=steps, guidance=source.sampling.guidance, on_call=advance
        )  # fmt: skip
    make_folder(out)
    write_picture(out / "steps.png", sheet)
    typer.echo(f"picture: {out / 'steps.png'}")
