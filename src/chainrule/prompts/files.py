"""Prompt files: plain text, JSON, JSONL, CSV and TSV; and a benchmark's folder of JSON files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

from chainrule.errors import UserError
from chainrule.prompts.rows import column_of, text_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
WITH_COLUMNS = (".json", ".jsonl", *DELIMITERS, ".parquet")
SUFFIXES = (".txt", *WITH_COLUMNS)
COMMENT = "# "
"""What a line of a plain text file begins with that is not a prompt."""
STYLES = ("anime", "concept-art", "paintings", "photo")
"""The styles of HPDv2's benchmark (arXiv:2306.09341), 800 prompts each; each is a file, STYLE.json."""


def read(path: Path, column: str = "") -> list[str]:
    """The prompts of a file, in order and with duplicates. Its suffix is its format; blank prompts are left out.

    `column` names the column of a file that has columns. Raises UserError for a file that cannot be read or holds no prompts.
    """
    text, kind = _text(path), path.suffix.lower()
    try:
        if kind == ".json":
            found = _json(text, column, path)
        elif kind == ".jsonl":
            found = _lines(text, column, path)
        elif kind in DELIMITERS:
            found = _table(text, column, path, DELIMITERS[kind])
        elif column:
            raise UserError(f"the prompt file {path} is plain text and has no column {column!r}")
        else:
            found = [line.strip() for line in text.splitlines() if not line.startswith(COMMENT)]
    except RecursionError as error:
        raise UserError(f"the prompt file {path} is not valid {kind[1:].upper()}: nested too deeply") from error
    found = [prompt for prompt in found if prompt]
    if not found:
        raise UserError(f"the prompt file {path} holds no prompts")
    return found


def is_benchmark(folder: Path) -> bool:
    """Whether the folder holds at least one style of HPDv2's benchmark."""
    return any((folder / f"{style}.json").is_file() for style in STYLES)


def read_benchmark(folder: Path) -> list[str]:
    """The prompts of all four styles of HPDv2's benchmark, in the order of STYLES. Raises UserError for a missing style."""
    missing = [f"{style}.json" for style in STYLES if not (folder / f"{style}.json").is_file()]
    if missing:
        raise UserError(f"the prompt folder {folder} lacks {', '.join(missing)}; pass one style by itself, or add the file")
    return [prompt for style in STYLES for prompt in read(folder / f"{style}.json")]


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not text (UTF-8)") from error
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    if "\x00" in text:
        raise UserError(f"the prompt file {path} is not text")
    return text


def _json(text: str, column: str, path: Path) -> list[str]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"the prompt file {path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"the prompt file {path} must hold a list of prompts")
    return [text_of(row, column, f"row {number} of the prompt file {path}", str(path)) for number, row in enumerate(rows, 1)]


def _lines(text: str, column: str, path: Path) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # and not at U+2028, which may stand inside a JSON string
        if line.strip():
            where = f"line {number} of the prompt file {path}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON: {error}") from error
            found.append(text_of(row, column, where, str(path)))
    return found


def _table(text: str, column: str, path: Path, delimiter: str) -> list[str]:
    """Strict, so that an open quote or an unquoted comma in a prompt is an error instead of half a prompt.

    Tab-separated files are written with quotes and without (PartiPrompts): what cannot be read with them is read without.
    """
    way = partial(csv.reader, delimiter=delimiter)
    if delimiter == "\t":
        with contextlib.suppress(UserError):
            return _rows(way(io.StringIO(text, newline=""), strict=True), column, path, delimiter)
        return _rows(way(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONE), column, path, delimiter)
    return _rows(way(io.StringIO(text, newline=""), strict=True), column, path, delimiter)


def _rows(rows: Any, column: str, path: Path, delimiter: str) -> list[str]:
    found, name = [], ""
    try:
        header: list[str] = next((row for row in rows if row), [])
        if header:
            name = column_of(header, column, f"the prompt file {path}", str(path))
        for row in rows:
            if row and len(row) != len(header):
                where = f"line {rows.line_num} of the prompt file {path}"
                how = f"; put a field that holds {delimiter!r} in quotes"
                raise UserError(f"the number of fields in {where} is {len(row)}, but the header's is {len(header)}{how}")
            found += [row[header.index(name)].strip()] if row else []
    except csv.Error as error:
        kind = path.suffix[1:].upper()
        raise UserError(f"line {rows.line_num} of the prompt file {path} is not valid {kind}: {error}") from error
    return found
