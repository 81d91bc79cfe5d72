"""Writes markdown tables, and file names made of words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table, without a line break at the end. A `|` inside a cell is escaped.

    Raises ValueError for a row whose cells are not as many as the columns.
    """
    lines: list[list[str]] = [list(map(_cell, line)) for line in (columns, ["---"] * len(columns), *rows)]
    if odd := next((line for line in lines if len(line) != len(columns)), None):
        raise ValueError(f"a table of {len(columns)} columns got a row of {len(odd)} cells: {odd}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|")


def slug(*words: object) -> str:
    """Words as a file name: "DRaFT-1, lr x 3" is draft-1-lr-x-3."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, words)).lower()).strip("-")
