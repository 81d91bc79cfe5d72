"""What a notebook shows of a value: tables and pictures as HTML that needs nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
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


def line(kind: str, facts: Mapping[str, str]) -> str:
    """What a value prints in one line: its kind, and what is known of it. A fact's name is left out, and so is one of no words."""
    return f"{kind}({', '.join(fact for fact in facts.values() if fact)})"


def listed(facts: Mapping[str, str]) -> str:
    """What is known of a value, a fact a row; one of no words is left out."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(fact)}</td></tr>" for name, fact in facts.items() if fact)
    return f"<table><tbody>{rows}</tbody></table>"


def amount(number: int) -> str:
    """A number of things in three digits: 812, 81.2 thousand, 860 million, 11.9 billion."""
    for size, word in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{word}"
    return str(number)
