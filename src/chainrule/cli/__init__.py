"""The command line: the library's own words."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import typer

from chainrule.cli import (
    experimenting,
    looking,
    mixing,
    sampling,
    searching,
    sharing,
    steering,
    studio,
    training,
    using,
    voting,
)
from chainrule.cli.app import app
from chainrule.errors import Note, UserError

__all__ = ["app", "main"]

for name, command in {
    "train": training.train, "steer": steering.steer, "sample": sampling.sample, "eval": using.evaluate,
    "distill": training.distill, "mix": mixing.mix,
    "report": using.report, "plan": looking.plan, "methods": looking.methods, "rewards": looking.rewards,
    "models": looking.models, "search": searching.search,
    "vote": voting.vote, "votes": voting.votes, "doctor": looking.doctor, "experiment": experimenting.experiment,
    "push": sharing.push, "ui": studio.ui,
}.items():  # fmt: skip
    app.command(name)(command)  # type: ignore[type-var]
app.add_typer(looking.analyses, name="analyze")


def _shown(otherwise: Callable[..., None], message: Warning | str, *where: Any) -> None:
    """A note as one line; any other warning as Python shows it."""
    if isinstance(message, Note):
        typer.echo(f"note: {message}", err=True)
    else:
        otherwise(message, *where)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_shown, warnings.showwarning)
            app(prog_name="chainrule")
    except UserError as error:
        if _tells():
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


def _tells() -> bool:
    """Whether this process prints the error. Of several processes with one mistake one does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from chainrule.processes import first_to_tell

    return first_to_tell()
