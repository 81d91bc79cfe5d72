"""A page of tables: mean ± 95% interval over seeds of what was run, published values beside it, how it was made."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from chainrule.errors import Note
from chainrule.estimate import Estimate
from chainrule.experiments.table import Column, Table
from chainrule.experiments.unit import RESULT, Unit, units, versions
from chainrule.report.tables import markdown
from chainrule.report.words import phrase

ARROWS = {"up": " ↑", "down": " ↓", None: ""}
SHOWN = ("model", "adapter", "method", "reward", "prompts", "gradient", "over", "unit", "seeds", "images")


@dataclass(frozen=True)
class Results:
    """What the folder of results holds of one table: numbers by row and seed."""

    table: Table
    root: Path

    @cached_property
    def runs(self) -> dict[str, list[Unit]]:
        """The runs of every row."""
        found: dict[str, list[Unit]] = {label: [] for label in self.table.rows}
        for unit in units(self.table):
            found[unit.label].append(unit)
        return found

    @cached_property
    def numbers(self) -> dict[str, dict[int | None, dict[str, float]]]:
        """Row -> seed -> numbers by name, of the runs that are done."""
        return {
            label: {unit.seed: numbers(unit, self.root) for unit in row if unit.done(self.root)} for label, row in self.runs.items()
        }

    @property
    def done(self) -> int:
        """How many runs have a result."""
        return sum(map(len, self.numbers.values()))

    @property
    def total(self) -> int:
        """How many runs the table has."""
        return sum(map(len, self.runs.values()))


def numbers(unit: Unit, root: Path) -> dict[str, float]:
    """Everything a column can show of a run that is done.

    What `evaluation.json` holds (of its last row; of a first row "before", as "X before", and X over that as "X ratio"), what the
    table records, and the settings that are numbers.
    """
    rows = json.loads((unit.folder(root) / RESULT).read_text(encoding="utf-8"))["rows"]
    found = {key: float(value) for key, value in unit.config.get("settings", {}).items() if type(value) in (int, float)}
    found |= unit.recorded
    found |= {name: _number(value["mean"]) for name, value in rows[-1]["metrics"].items()}
    if rows[0]["name"] == "before":
        for name, value in rows[0]["metrics"].items():
            found[f"{name} before"] = before = _number(value["mean"])
            if before:
                found[f"{name} ratio"] = found[name] / before
    return found


def _number(written: float | None) -> float:
    """A number out of a file, which has null where there was none."""
    return math.nan if written is None else float(written)


def page(tables: Sequence[Table], root: Path, place: Path | str) -> str:
    """The page of these tables. `place` is where it will lie, which the command to make it again names."""
    single = len(tables) == 1
    command = shlex.join(["chainrule", "experiment", *(_spelled(table) for table in tables)])
    head = "" if single else "# Tables of experiments\n\n"
    made = f"`{command}` runs what is missing, and with `--write {place}` writes this page."
    about = f"± is a 95% interval over seeds; where it is missing, one seed was run. {made}\n"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [section(Results(table, root), "#" if single else "##") for table in tables]
    return f"{head}{'' if single else about + chr(10)}{chr(10).join(parts)}\n{about if single else ''}Results are of {packages}.\n"


def _spelled(table: Table) -> str:
    from chainrule.experiments.table import names

    return table.name if table.name in names() else f"{table.name}.yaml"


def section(results: Results, level: str = "##") -> str:
    """One table with its title, what it is about, and its settings."""
    table = results.table
    published = [column for column in table.columns if column.published]
    columns = [f"{column.title}{ARROWS[column.better]}" for column in table.columns]
    if published:
        columns.append(f"published: {' / '.join(str(column.published) for column in published)}")
    rows = []
    for label, row in table.rows.items():
        given = [str(row.published.get(column.title, "–")) for column in published]
        theirs = [" / ".join(given) if any(text != "–" for text in given) else ""] if published else []
        rows.append((_order(results, label), [_named(results, label), *_cells(results, label), *theirs]))
    if table.sort:
        rows.sort(key=lambda pair: pair[0])
    known = {name for row in results.numbers.values() for found in row.values() for name in found}
    if results.done == results.total and (blank := [column.of for column in table.columns if column.of not in known]):
        said = f"no run of {table.name} has the numbers {', '.join(blank)}; there are {', '.join(sorted(known))}"
        warnings.warn(Note(said), stacklevel=2)
    parts = [
        f"{level} {table.title}",
        table.about.strip(),
        markdown(["", *columns], [cells for _, cells in rows]),
        _settings(table),
    ]
    if table.source:
        parts.insert(3, f"Published values: {table.source}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _named(results: Results, label: str) -> str:
    done, total = len(results.numbers[label]), len(results.runs[label])
    return label if done in (0, total) else f"{label} ({done} of {total} seeds)"


def _cells(results: Results, label: str) -> list[str]:
    columns = results.table.columns
    if not results.numbers[label]:
        return ["not run", *[""] * (len(columns) - 1)]
    return [_cell(results, label, column) for column in columns]


def _cell(results: Results, label: str, column: Column) -> str:
    here = _values(results, label, column.of)
    if not here:
        return ""
    if column.over is None:
        return _shown(here.values(), column.digits)
    over = results.table.rows[label].baseline or column.over
    if label == over:  # a baseline's own value; another row is not compared with itself
        alone = results.runs[label][0].task == "evaluate" and column.show == "mean"
        return _shown(here.values(), column.digits) if alone else ""
    there = _values(results, over, column.of)
    pairs = [(value, there.get(seed, there.get(None))) for seed, value in here.items()]
    both = [(a, b) for a, b in pairs if b is not None]
    if not both:  # either the other row is missing, or the two share no seed
        return "" if there else f"{over} not run"
    if column.show == "share":
        return f"{statistics.fmean(b for _, b in both) / statistics.fmean(a for a, _ in both):.{column.digits}%}"
    if column.show == "wins":
        return f"{sum(a > b for a, b in both)} of {len(both)}"
    return _shown([a - b for a, b in both], column.digits, sign="+")


def points(results: Results) -> dict[str, tuple[float, float]]:
    """Where each row that was run stands by the two columns of the table's plot; the row it is compared with at zero."""
    plot = results.table.plot
    assert plot
    both = [next(column for column in results.table.columns if column.title == title) for title in (plot.x, plot.y)]
    found = {label: [_mean(results, label, column) for column in both] for label, row in results.numbers.items() if row}
    return {label: (x, y) for label, (x, y) in found.items() if x is not None and y is not None}


def _mean(results: Results, label: str, column: Column) -> float | None:
    """The mean of a column, as a difference where the column shows one."""
    over = results.table.rows[label].baseline or column.over
    here = _values(results, label, column.of)
    there = _values(results, over, column.of) if over else {}
    each = [value - there.get(seed, there.get(None, 0.0)) for seed, value in here.items()]
    return statistics.fmean(each) if each else None


def _values(results: Results, label: str, name: str) -> dict[int | None, float]:
    return {seed: found[name] for seed, found in results.numbers[label].items() if name in found}


def _shown(values: Iterable[float], digits: int, sign: str = "") -> str:
    """Mean ± interval; equal values and a single one have no interval worth showing."""
    found = list(values)
    estimate = Estimate.of(found)
    mean = f"{estimate.mean:{sign},.{digits}f}"
    return mean if len(set(found)) < 2 else f"{mean} ± {estimate.interval:,.{digits}f}"


def _order(results: Results, label: str) -> float:
    """The place by the sorting column: best first, what was not run last."""
    table = results.table
    column = next((column for column in table.columns if column.title == table.sort), None)
    values = _values(results, label, column.of) if column else {}
    if not values:
        return float("inf")
    mean = statistics.fmean(values.values())
    if math.isnan(mean):
        return float("inf")
    return mean if column and column.better == "down" else -mean


def _settings(table: Table) -> str:
    """What all rows share, in words."""
    worth = lambda key, value: not isinstance(value, list) or (key in SHOWN and any(value))  # prompts without a word are not
    shared = [f"{key} {phrase(value)}" for key, value in table.settings.items() if worth(key, value)]
    measured = [f"{key} {phrase(value)}" for key, value in table.measure.items()]
    seeds = (
        f"Seeds {phrase(table.seeds)}."
        if any((row.task or table.task) in ("finetune", "steer") for row in table.rows.values())
        else ""
    )
    parts: list[Any] = [
        f"Settings: {', '.join(shared)}." if shared else "",
        f"Measured: {', '.join(measured)}." if measured else "",
        seeds,
    ]
    return " ".join(part for part in parts if part)


def overview(tables: Mapping[str, Table], root: Path) -> str:
    """A line for each table: its name, title, and how much of it is done."""
    width = max(map(len, tables), default=0)
    lines = []
    for name, table in tables.items():
        results = Results(table, root)
        done = sum(unit.done(root) for row in results.runs.values() for unit in row)
        lines.append(f"{name:{width}}  {done:3} of {results.total:3} runs done  {table.title}")
    return "\n".join(lines)
