"""The command `search`: which template makes a model's images best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chainrule.cli.app import progress
from chainrule.cli.arguments import AllowCode, check_counts
from chainrule.cli.opened import check_adapter, source_of
from chainrule.cli.options import with_options
from chainrule.errors import UserError
from chainrule.settings import Opening, Sampling


@with_options
def search(
    source: Annotated[str, typer.Argument(help="A model, or a run folder.")],
    reward: Annotated[str, typer.Option(help="The reward that templates are tried for.")],
    prompts: Annotated[str, typer.Option(help="Prompts that templates are tried on.")] = "animals:train",
    test_prompts: Annotated[str, typer.Option(help="Prompts that the best template is measured on.")] = "animals:test",
    template: Annotated[
        list[str] | None, typer.Option(help="A template with {} for the prompt. May be repeated; default: some of ours.")
    ] = None,
    templates: Annotated[Path | None, typer.Option(help="A text file with a template in each line.")] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    sampling: Sampling = Sampling(),
    out: Annotated[Path | None, typer.Option(help="Also write what was found to this JSON file.")] = None,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Try templates on some prompts and measure the best one on others, by a reward."""
    from chainrule import rewards
    from chainrule.prompts import prompts as read_prompts

    check_counts(seeds=seeds)
    if out and out.suffix != ".json":
        raise UserError(f"out is {str(out)!r}, but must end in .json")
    many = _templates(template or [], templates)
    tried, tested = read_prompts(prompts), read_prompts(test_prompts)
    base = source_of(source, opening, sampling, allow_code=allow_code)
    chosen = rewards.parse(reward, base.reward_source)
    if base.run:
        check_adapter(base.run, base.model, opening.solver)
    from chainrule.baselines import search as searched
    from chainrule.evaluate import shares
    from chainrule.processes import Processes

    model = base.load()
    if base.run:
        model = model.using(base.run)
    steps, processes = base.sampling.sample_steps, Processes.here(model.device)
    batches = [sum(-(-n // 16) for n in shares(len(some), seeds, processes=processes)) for some in (tried, tested)]
    calls = (len(many) * batches[0] + 2 * batches[1]) * (len(model.grid(steps)) - 1)
    with progress("searching", calls, processes.main) as advance:
        found = searched(
            model, chosen, tried, tested, templates=many, seeds=range(seeds), steps=steps, guidance=base.sampling.guidance,
            on_call=advance, processes=processes,
        )  # fmt: skip
    if not processes.main:
        return
    typer.echo(f"{len(tried)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{found.tried}")
    typer.echo(f"\nthe best, {found.best!r}, on {len(tested)} test prompts\n{found.tested}")
    if out:
        found.save(out)


def _templates(given: list[str], file: Path | None) -> list[str]:
    """Those given, and those of the file; ours where there are none. Raises UserError for one without {}."""
    from chainrule.prompts import TEMPLATES
    from chainrule.prompts import prompts as read_prompts

    found = [*given, *(read_prompts(str(file)) if file else ())] or list(TEMPLATES)
    for one in found:
        if "{}" not in one:
            raise UserError(f"the template {one!r} must say where the prompt goes, as in a photo of {{}}")
    return found
