"""Commands of a blind preference study: `vote` makes its page, `votes` counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chainrule.asked import numbers
from chainrule.cli.app import Prompts, progress
from chainrule.cli.arguments import AllowCode, check_counts, check_free, counted, prompts_of
from chainrule.cli.opened import Source, check_adapter, source_of
from chainrule.cli.options import with_options
from chainrule.errors import UserError
from chainrule.settings import Opening, Sampling
from chainrule.vote import KEY, PAGE, QUESTION, count, study

if TYPE_CHECKING:
    from PIL.Image import Image


@with_options
def vote(
    sources: Annotated[list[str], typer.Argument(help="Two or more runs or models to compare.")],
    prompts: Prompts,
    seeds: Annotated[int, typer.Option(help="Pairs per prompt and two contestants, with seeds 0, 1, ...")] = 1,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    question: Annotated[str, typer.Option(help="What people are asked.")] = QUESTION,
    sampling: Sampling = Sampling(),
    out: Annotated[Path, typer.Option(help="Folder for the page and its key.")] = Path("vote"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Make one page on which people choose between pictures of the same prompt and seed, without knowing whose they are."""
    from chainrule.runs import check_folder

    check_counts(seeds=seeds)
    numbers([first_seed, first_seed + seeds - 1])
    if len(sources) < 2:
        raise UserError("a study needs at least two runs or models to compare")
    names = _names(sources)
    every = [(prompt, first_seed + k) for prompt in prompts_of(prompts) for k in range(seeds)]
    check_folder(out)
    check_free([out / PAGE, out / KEY], overwrite)
    opened = dict(zip(names, (source_of(s, opening, sampling, allow_code=allow_code) for s in sources), strict=True))
    for source in opened.values():
        if source.run:
            check_adapter(source.run, source.model, opening.solver)
    pictures = {name: _pictures(source, name, every) for name, source in opened.items()}
    page = study(pictures, [prompt for prompt, _ in every], out, question=question)
    pairs = len(every) * len(sources) * (len(sources) - 1) // 2
    typer.echo(f"{counted(pairs, 'pair')} in {page}; keep {out / KEY}, which says whose pictures they are, to yourself")
    typer.echo(f"people save their votes as files; count them with: chainrule votes {out} FILES")


def _pictures(source: Source, name: str, every: list[tuple[str, int]]) -> list[Image]:
    model = source.load()
    if source.run:
        model = model.using(source.run)
    steps = source.sampling.sample_steps
    with progress(f"sampling {name}", -(-len(every) // 16) * (len(model.grid(steps)) - 1)) as advance:
        prompts, seeds = [prompt for prompt, _ in every], [seed for _, seed in every]
        return model.sample(prompts, seeds, steps, source.sampling.guidance, on_call=advance)


def _names(sources: list[str]) -> list[str]:
    """A name for each: its last part, or the whole where two are alike."""
    if len({str(Path(source).resolve()) for source in sources}) < len(sources):
        raise UserError(f"a contestant is given twice: {', '.join(sources)}")
    short = [Path(source).name for source in sources]
    return short if len(set(short)) == len(short) else sources


def votes(
    folder: Annotated[Path, typer.Argument(help="The folder of the study, with its key.")],
    files: Annotated[list[Path], typer.Argument(help="The files that people saved.")],
) -> None:
    """Count the votes of a study: how often each contestant was preferred, with 95% intervals."""
    for outcome in count(folder, files):
        typer.echo(str(outcome))
