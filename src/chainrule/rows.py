"""A file of rows, one JSON object a line. A last line torn by a kill is left out, and healed by the next. No torch here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainrule.config import plain
from chainrule.errors import UserError
from chainrule.files import append_text, write_text

DIGITS = 6  # significant digits of a float


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, oldest first; none where there is no file. Raises UserError for a line that is not a JSON object."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if index == len(lines) - 1:
                break
            raise UserError(f"{path}: line {index + 1} is not a JSON object; delete that line") from error
    return rows


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row, flushed to disk: floats keep 6 significant digits, NaN and infinities become null.

    Raises UserError where it cannot be written.
    """
    if _ends_in_a_torn_line(path):
        write(path, read(path))
    append_text(path, _line(row))


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put these rows in the place of those in the file, in one move."""
    write_text(path, "".join(map(_line, rows)))


def keep_to(path: Path, step: int) -> None:
    """Drop the rows of later steps, if there is a file."""
    if path.is_file():
        write(path, [row for row in read(path) if row.get("step", 0) <= step])


def rounded(value: Any) -> Any:
    """A value as a row holds it: floats to 6 significant digits, null for NaN and infinities."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(rounded(plain(row, "metrics")), allow_nan=False) + "\n"


def _ends_in_a_torn_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
