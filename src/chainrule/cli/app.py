"""The application, and what its commands share. Nothing heavy is imported until a command has checked its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from chainrule.cli.options import as_in_a_file
from chainrule.settings import GUIDANCE

app = typer.Typer(
    name="chainrule", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"chainrule {version('chainrule')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Align and steer diffusion models by backpropagating rewards through the sampling chain."""


ChainSteps = Annotated[int, typer.Option("--sample-steps", "--steps", help="Network calls of the sampling chain.")]
Guidance = Annotated[
    str | None, typer.Option(help=f"{GUIDANCE[0].upper()}{GUIDANCE[1:]}; default: the model's own.", parser=as_in_a_file)
]
Options = Annotated[list[str] | None, typer.Option("--method-option", help="An option of the method, as k=5. May be repeated.")]
Prompts = Annotated[list[str], typer.Option(help="A prompt, a prompt set or a prompt file. May be repeated.")]


@contextmanager
def progress(label: str, total: int, shown: bool = True) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr. Calling what it yields moves it on by one. A total of 0 means that the total is not known."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True, quiet=not shown)) as bar:
        task = bar.add_task(label, total=total or None)
        yield lambda: bar.advance(task)
