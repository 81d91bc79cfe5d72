"""Write cli.md, the command line's help texts. Run after changing an option: python docs/make_cli.py"""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from chainrule.cli import app

PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100
INTRODUCTION = """# The command line

What `--help` says, for every command. This page is written by `python docs/make_cli.py`; a test holds it to the program.
"""


def block(*words: str) -> str:
    """A heading and the help text of one command, as it stands in a terminal of 102 columns."""
    text = CliRunner().invoke(app, [*words, "--help"], terminal_width=WIDTH).output.rstrip()
    return f"## {' '.join(('chainrule', *words))}\n\n```text\n{text}\n```\n"


def page() -> str:
    blocks = [block()]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        blocks += [block(name), *(block(name, word) for word in getattr(command, "commands", ()))]
    return "\n".join([INTRODUCTION, *blocks])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
