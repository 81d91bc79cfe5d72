"""What a notebook shows of a value: tables and pictures as HTML that needs nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape


def table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells; the first row is the heading, and the first cell of each row its name."""
    head, *rows = ([escape(cell) for cell in line] for line in lines)
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes, about: str) -> str:
    """A PNG within the page; `about` is what is said where it cannot be seen."""
    return f'<img alt="{escape(about)}" style="max-width: 100%" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
