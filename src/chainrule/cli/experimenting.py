"""The command `experiment`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainrule.cli.arguments import AllowCode, check_counts, counted
from chainrule.errors import UserError
from chainrule.files import make_folder, write_picture, write_text
from chainrule.named import refuse_code

if TYPE_CHECKING:
    from chainrule.experiments.page import Results
    from chainrule.experiments.runner import Outcome
    from chainrule.experiments.table import Table


def results_folder() -> Path:
    """Where results lie unless said otherwise: the same folder from everywhere."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "chainrule" / "experiments"


def experiment(
    table: Annotated[
        list[str] | None, typer.Argument(help="Tables of the package by name, or .yaml files of your own; default: list them.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Number of runs at a time, each in a process with one thread.")] = 1,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the results. [default: ~/.local/share/chainrule/experiments]", show_default=False)
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write a markdown page of the results to this file; run nothing.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a table that has a plot into this PNG file; run nothing.", show_default=False)
    ] = None,
    list_runs: Annotated[
        bool, typer.Option("--list", help="List the tables' runs and where their results are; run nothing.")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run the rows of a table that have no result yet, and show the table.

    A result is a run folder. Its name has a hash of all that decides its numbers and of the packages' versions, so a changed
    setting is another folder. What is done is not run again. After Ctrl-C, the same command goes on.
    """
    from chainrule.experiments import page
    from chainrule.experiments import table as tables

    check_counts(jobs=jobs)
    place = (root or results_folder()).expanduser().absolute()
    if not table:
        typer.echo(page.overview({name: tables.read(name) for name in tables.names()}, place))
        typer.echo(f"results: {place}")
        return
    chosen = [_read(name, allow_code) for name in table]
    shown = [page.Results(each, place) for each in chosen]
    if list_runs:
        for unit in (unit for results in shown for row in results.runs.values() for unit in row):
            typer.echo(f"{'done   ' if unit.done(place) else 'not run'}  {unit.table}: {unit.title}  {unit.folder(place)}")
        return
    if write or plot:
        _write(write, page.page(chosen, place, write or "PAGE"), plot, shown)
        return
    from chainrule.experiments.runner import run

    outcome = run(chosen, place, jobs)
    _tell(outcome, chosen, place)


def _tell(outcome: Outcome, chosen: list[Table], place: Path) -> None:
    from chainrule.experiments import page

    for each in chosen:
        typer.echo(page.section(page.Results(each, place)))
    if outcome.interrupted:
        typer.echo(f"stopped; {counted(len(outcome.made), 'run')} done, the same command goes on. Results: {place}", err=True)
        raise typer.Exit(130)
    if outcome.failed:
        for title, reason in outcome.failed.items():
            typer.echo(f"{title}: {' '.join(reason.split())}", err=True)
        raise UserError(f"{counted(len(outcome.failed), 'run')} failed")
    typer.echo(f"results: {place}")


def _read(name: str, allow_code: bool) -> Table:
    from chainrule.experiments.table import read

    found = read(name)
    refuse_code(found.model_dump(include={"settings", "measure", "rows", "by_seed"}), found.name, allow_code)
    return found


def _draw(place: Path, shown: list[Results]) -> None:
    from chainrule.experiments import page
    from chainrule.report.plots import scatter

    if len(shown) != 1 or not (axes := shown[0].table.plot):
        raise UserError("plot draws one table, which must say what it plots: plot: {x: TITLE, y: TITLE}")
    points = page.points(shown[0])
    if not points:
        raise UserError(f"nothing of the table {shown[0].table.name} was run yet")
    make_folder(place.parent)
    write_picture(place, scatter(points, shown[0].table.title, axes.x, axes.y))
    typer.echo(f"picture: {place}")


def _write(page: Path | None, text: str, plot: Path | None, shown: list[Results]) -> None:
    if page:
        make_folder(page.parent)
        write_text(page, text)
        typer.echo(f"page: {page}")
    if plot:
        _draw(plot, shown)
