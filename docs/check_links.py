"""Check the links between the Markdown pages: every file is there, and every heading. No network. python docs/check_links.py"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
SKIPPED = {"site", "build", "dist", "runs", "node_modules"}


def pages(root: Path) -> list[Path]:
    """The Markdown files of the repository, without what is made or installed in it."""
    found = sorted(root.rglob("*.md"))
    return [path for path in found if not any(part in SKIPPED or part.startswith(".v") for part in path.relative_to(root).parts)]


def tokens(path: Path) -> list[Token]:
    """The parts of a page."""
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def links(path: Path) -> Iterator[tuple[int, str]]:
    """The lines and targets of a page's links and pictures. Code has none."""
    for block in tokens(path):
        for each in block.children or ():
            target = each.attrGet("href" if each.type == "link_open" else "src")
            if each.type in ("link_open", "image") and isinstance(target, str):
                yield (block.map or [0])[0] + 1, target


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as code hosts and the site make them."""
    found: set[str] = set()
    every = tokens(path)
    for heading, inline in itertools.pairwise(every):
        if heading.type == "heading_open":
            words = "".join(each.content for each in inline.children or () if each.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            number = next(n for n in range(len(every)) if (f"{name}-{n}" if n else name) not in found)
            found.add(f"{name}-{number}" if number else name)
    return found


def broken(root: Path) -> list[str]:
    """A line for every link to a file or a heading that is not there."""
    told = []
    for page in pages(root):
        for line, target in links(page):
            place, _, heading = unquote(target).partition("#")
            if re.match(r"[a-z]+:", place):  # another host's
                continue
            there = (page.parent / place).resolve() if place else page
            where = f"{page.relative_to(root)}:{line}"
            if not there.exists() or root.resolve() not in there.parents:
                told.append(f"{where}: {target}: no such file")
            elif heading and there.suffix == ".md" and heading not in anchors(there):
                told.append(f"{where}: {target}: no such heading")
    return told


if __name__ == "__main__":
    found = broken(ROOT)
    print("\n".join(found) or f"links of {len(pages(ROOT))} pages: every file and heading is there")
    sys.exit(bool(found))
