"""What a table file says: rows to run, the numbers that are shown of them, and published values beside them.

The package's own tables are YAML files in `tables/`; one's own is a file of the same form, see docs/tables.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chainrule import yaml_text
from chainrule.errors import UserError, unknown

TASKS = ("finetune", "evaluate", "steer", "cost")
Values = dict[str, Any]  # settings as YAML has them


class Column(BaseModel):
    """One shown number. `of` names it: a measured one, a recorded one, or one of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    of: str
    over: str | None = None  # the row it is compared with, seed by seed
    show: Literal["mean", "share", "wins"] = "mean"  # share: that row's mean over this one's; wins: the seeds above it
    better: Literal["up", "down"] | None = None
    digits: int = Field(3, ge=0, le=8)
    published: str | None = None  # what the paper calls its value


class Row(BaseModel):
    """One line of the table. `settings` are laid over the table's, those of `by_seed` over both for one seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["finetune", "evaluate", "steer", "cost"] | None = None
    seeds: list[int] | None = None
    baseline: str | None = None  # the row it is compared with in the place of the columns'; itself for a baseline
    settings: Values = {}
    measure: Values = {}
    by_seed: dict[int, Values] = {}
    published: dict[str, str | float] = {}
    recorded: dict[str, float] = {}


class Plot(BaseModel):
    """The table as a picture: a point for each row, by the titles of two columns."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: str
    y: str


class Table(BaseModel):
    """An experiment. `place` is the folder that the paths in it are relative to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    place: Path
    title: str
    about: str = ""
    source: str = ""  # of the published values
    task: Literal["finetune", "evaluate", "steer", "cost"] = "finetune"
    seeds: list[int] = [0, 1, 2]
    settings: Values = {}
    measure: Values = {}
    by_seed: dict[int, Values] = {}
    rows: dict[str, Row]
    columns: list[Column] = Field(min_length=1)
    sort: str | None = None  # the title of a column: best first
    plot: Plot | None = None


def names() -> list[str]:
    """The package's own tables, by name."""
    return sorted(place.name.removesuffix(".yaml") for place in _own().iterdir() if place.name.endswith(".yaml"))


def read(name: str | Path) -> Table:
    """A table of the package by name, or one's own by the path of its file.

    Raises UserError for an unknown name, a file that is not there or no YAML, and a key or value that no table has.
    """
    if str(name) in names():
        place = _own() / f"{name}.yaml"
    elif Path(name).suffix in (".yaml", ".yml"):
        place = Path(name)
    else:
        raise unknown("table", str(name), names())
    try:
        values = yaml_text.read(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the table {place} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"cannot read the table {place}: {error.strerror}") from error
    if not isinstance(values, dict):
        raise UserError(f"the table {place} must hold keys and values")
    return _checked(place, values)


def _own() -> Path:
    return Path(str(files("chainrule"))) / "experiments" / "tables"


def _checked(place: Path, values: Values) -> Table:
    if isinstance(values.get("rows"), dict):
        values = values | {"rows": {str(label): _row(row) for label, row in values["rows"].items()}}
    try:
        table = Table(name=place.stem, place=place.resolve().parent, **values)
    except (ValidationError, TypeError) as error:
        raise UserError(f"the table {place}: {_first(error)}") from error
    titles = [column.title for column in table.columns]
    for column in table.columns:
        if column.over is not None and column.over not in table.rows:
            raise unknown(f"row that the column {column.title!r} of {place} compares with", column.over, table.rows)
        if column.over is None and column.show != "mean":
            raise UserError(f"the column {column.title!r} of {place} shows {column.show}, but says not over which row; add over")
    if table.sort is not None and table.sort not in titles:
        raise unknown(f"column to sort {place} by", table.sort, titles)
    for title in (table.plot.x, table.plot.y) if table.plot else ():
        if title not in titles:
            raise unknown(f"column to plot {place} by", title, titles)
    for label, row in table.rows.items():
        if row.baseline is not None and row.baseline not in table.rows:
            raise unknown(f"row that {label!r} of {place} is compared with", row.baseline, table.rows)
        for title in row.published:
            if title not in titles:
                raise unknown(f"column of {place} that {label!r} has a published value for", title, titles)
    return table


def _row(values: Any) -> Any:
    """A row as it is written: keys that are not a row's own are settings."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        return values
    own = {key: value for key, value in values.items() if key in Row.model_fields}
    rest = {str(key): value for key, value in values.items() if key not in own}
    return own | {"settings": {**own.get("settings", {}), **rest}}


def _first(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    first = error.errors()[0]
    reason = first["msg"].replace("Input should be", "must be")
    where = ".".join(map(str, first["loc"]))
    return f"{where} is missing" if first["type"] == "missing" else f"{where} is {first['input']!r}, but {reason}"
