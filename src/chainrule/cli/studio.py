"""The command `ui`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainrule.cli.arguments import AllowCode
from chainrule.cli.opened import is_run, source_of
from chainrule.cli.options import with_options
from chainrule.errors import UserError
from chainrule.settings import Opening

if TYPE_CHECKING:
    from chainrule.studio import Opened


@with_options
def ui(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Models, runs and adapters to choose from, besides the folder's and bundled ones."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of runs, adapters and studies; what is made goes there too.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any that is free.")] = 7860,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Open the studio: adapters at any scale, steering, reports and votes on one page of a browser.

    Needs the extra `ui`. The page runs no code, and opens nothing but what it lists.
    """
    if find_spec("gradio") is None:
        raise UserError("the studio needs gradio; pip install 'chainrule[ui]'")
    if opening.network == "shard":
        raise UserError("network is 'shard', but the studio is one process; take network device or cpu")
    from chainrule.runs import check_folder

    check_folder(folder)
    from chainrule.adapters.files import adapter_files

    for source in sources or ():
        if is_run(source) or not Path(source).exists() or (Path(source) / "model_index.json").is_file():
            source_of(source, opening, allow_code=allow_code)
        else:
            adapter_files(source)
    from chainrule.studio import Desk, Shelf
    from chainrule.studio.served import HOME, started, until_stopped

    desk = Desk(Shelf(folder, tuple(sources or ())), lambda name: _opened(name, opening, allow_code))
    with started(desk, host, port) as address:
        typer.echo(f"the studio is at {address}; Ctrl-C ends it")
        if host not in HOME:
            typer.echo("note: whoever reaches this address can use it; there is no password", err=True)
        until_stopped()
    typer.echo("the studio is closed")


def _opened(name: str, opening: Opening, allow_code: bool) -> Opened:
    from chainrule.studio import Opened

    source = source_of(name, opening, allow_code=allow_code)
    model = source.load()
    return Opened(model, source.sampling.sample_steps or model.defaults.steps, source.reward_source)
