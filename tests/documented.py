"""What README.md and docs/*.md show: their code blocks and command lines, found by the pages' text alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "log.md"  # what was tried on a day; its commands were those of that day
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(set((ROOT / "docs").glob("*.md")) - {NOTEBOOK})]
SHELL = ("", "bash", "sh", "console")  # languages of blocks that hold command lines; a block without one is such a block
LAUNCHED = re.compile(r"(?:^|.* -m |^docker run .*? )chainrule(?: (?P<words>[a-z].*))?$")
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Piece:
    """A block of code, or a command line, and where it stands. The language of a line within a sentence is "inline"."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def command(self) -> list[str]:
        """The words after `chainrule` of a command line, started in whatever way; [] of any other line."""
        found = LAUNCHED.match(self.text)
        return shlex.split(found["words"] or "") if found else []


def pieces(page: Path) -> Iterator[Piece]:
    """A page's blocks, its blocks' command lines, its indented ones, and the code within its sentences."""
    name, prose, block, language = page.relative_to(ROOT).as_posix(), [], [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```(\w*)", line)
        prose.append("" if fence or language is not None else line)
        if fence and language is None:
            block, language = [], fence[1]
        elif fence:
            yield from _of_block(name, number - len(block), str(language), block)
            language = None
        elif language is not None:
            block.append(line)
        elif re.match(r"(\t| {4,})chainrule ", line):
            yield from _of_block(name, number, "", [line])
    assert language is None, f"{page}: a block has no end"
    text = "\n".join(prose)
    for found in CODE.finditer(text):
        yield Piece(name, text[: found.start()].count("\n") + 1, "inline", " ".join(found[1].split()))


def _of_block(page: str, first: int, language: str, lines: list[str]) -> Iterator[Piece]:
    if language not in SHELL:
        yield Piece(page, first, language, "\n".join(lines) + "\n")
        return
    number = first
    while number < first + len(lines):
        line, at = lines[number - first], number
        while line.endswith("\\"):  # goes on in the next one
            number += 1
            line = line[:-1] + lines[number - first]
        number += 1
        if words := shlex.split(line, comments=True):
            yield Piece(page, at, "line", shlex.join(words[1:] if words[0] == "$" else words))


ALL = [piece for page in PAGES for piece in pieces(page)]
BLOCKS = [piece for piece in ALL if piece.language not in ("inline", "line")]
LINES = [piece for piece in ALL if piece.language == "line"]
INLINE = [piece for piece in ALL if piece.language == "inline"]
