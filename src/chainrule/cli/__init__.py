"""The command line: the library's own words."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer

from chainrule.cli import experimenting, looking, steering, training, using
from chainrule.cli.app import app
from chainrule.errors import UserError

__all__ = ["app", "main"]

for name, command in {
    "train": training.train, "steer": steering.steer, "sample": using.sample, "eval": using.evaluate,
    "distill": training.distill, "mix": using.mix,
    "report": using.report, "plan": looking.plan, "methods": looking.methods, "rewards": looking.rewards,
    "models": looking.models, "doctor": looking.doctor, "experiment": experimenting.experiment,
}.items():  # fmt: skip
    app.command(name)(command)  # type: ignore[type-var]
app.add_typer(looking.analyses, name="analyze")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        app(prog_name="chainrule")
    except UserError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
