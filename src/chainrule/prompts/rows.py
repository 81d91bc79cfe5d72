"""Finds the column of a table that holds the prompts, and reads them as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from chainrule.errors import UserError

COLUMNS = ("prompt", "prompts", "caption", "text")
"""What a column of prompts is called, in upper or lower case: DrawBench's is Prompts, PartiPrompts' is Prompt."""


def column_of(names: Iterable[Any], wanted: str, where: str, form: str) -> str:
    """The column that holds the prompts: the wanted one, or else "prompt", or else the only one with a name of COLUMNS.

    `where` names the table and `form` is the source without a column; both are for errors.
    Raises UserError naming the columns if the wanted one is missing, or if none or several could hold prompts.
    """
    there = [str(name) for name in names]
    listed = ", ".join(map(repr, there)) or "none"
    if wanted and wanted not in there:
        raise UserError(f"{where} has no column {wanted!r} (columns: {listed})")
    found = [name for name in there if name.strip().lower() in COLUMNS]
    chosen = wanted or ("prompt" if "prompt" in found else "")
    if not chosen and len(found) > 1:
        raise UserError(f"{where} has several columns that may hold prompts: {', '.join(map(repr, found))}; pass {form}:{found[0]}")
    if not chosen and not found:
        how = f"; pass {form}:{there[0]} for the first" if there else ""
        raise UserError(f"{where} has no column {', '.join(COLUMNS)} (columns: {listed}){how}")
    return chosen or found[0]


def text_of(row: Any, wanted: str, where: str, form: str) -> str:
    """The prompt of one JSON row: a text, or an object with a column of prompts. Raises UserError for anything else."""
    value = row[column_of(row, wanted, where, form)] if isinstance(row, dict) else row
    return _text(value, where, "neither text nor an object with a 'prompt'")


def texts_of(column: Iterable[Any], where: str, name: str) -> list[str]:
    """The prompts of a dataset's column. Raises UserError for a row that is not text."""
    return [_text(value, f"row {row} of {where}", f"not text in its column {name!r}") for row, value in enumerate(column, 1)]


def _text(value: Any, where: str, otherwise: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} is {otherwise}")
    return value.strip()
