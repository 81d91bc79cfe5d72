"""The frame of a page: its head, sections and tables. Every text from outside is escaped, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from chainrule.report.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def document(title: str, body: str) -> str:
    """A whole page that fetches nothing."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def header(over: str, name: str, under: str) -> str:
    """The title, with a small line over it and one under it."""
    below = f"<p>{escape(under)}</p>" if under else ""
    return f'<header><p class="over">{escape(over)}</p><h1>{escape(name)}</h1>{below}</header>'


def section(name: str, body: str) -> str:
    """A part of the page with its name at the side; "" without a body."""
    return f"<section><h2>{escape(name)}</h2><div>{body}</div></section>\n" if body else ""


def table(rows: Mapping[str, str]) -> str:
    """Names and what they are."""
    if not rows:
        return ""
    body = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in rows.items())
    return f"<table>{body}</table>"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of numbers: the first cell of a row is its name. It scrolls sideways where it is too wide."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return f'<div class="wide"><table class="numbers"><thead><tr>{top}</tr></thead>{body}</table></div>'


def titled(name: str, chart: str) -> str:
    """A chart of several beside each other, with its name above; "" without a chart."""
    return f"<div><h3>{escape(name)}</h3>{chart}</div>" if chart else ""


def beside(charts: Sequence[str]) -> str:
    """Charts in as many columns as there is room for; "" if there is none."""
    return f'<div class="small">{"".join(charts)}</div>' if any(charts) else ""


def warning(said: str, more: str) -> str:
    """A line that must not be missed."""
    return f'<p class="alarm" role="alert"><strong>{escape(said)}</strong> {escape(more)}</p>'
