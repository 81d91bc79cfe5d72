"""Commands that give away what was trained: `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    repository: Annotated[str, typer.Argument(help="The repository on the hub, as OWNER/NAME; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the card and say what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Upload a run's adapter with its model card, adapter/README.md, to the Hugging Face hub.

    Without a token nothing is sent: `hf auth login`, or the variable HF_TOKEN, gives one.
    """
    from huggingface_hub import get_token

    from chainrule.push import Parcel

    parcel = Parcel.of(run, repository)
    if dry_run or not get_token():
        typer.echo(f"would send {parcel}")
        typer.echo("nothing was sent: " + ("a dry run" if dry_run else "no token; log in by `hf auth login`, or set HF_TOKEN"))
        return
    typer.echo(f"sending {parcel}")
    typer.echo(f"sent: {parcel.send(private=private)}")
