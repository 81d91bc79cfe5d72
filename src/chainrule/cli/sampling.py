"""The command `sample`: images of prompts, written as they are made."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainrule.album import Album
from chainrule.asked import numbers
from chainrule.cli.app import Prompts, progress
from chainrule.cli.arguments import (
    AllowCode,
    BestOfOption,
    Overwrite,
    Strength,
    check_counts,
    check_once,
    counted,
    prompts_of,
    scale_of,
)
from chainrule.cli.opened import Source, adapter_facts, check_adapters, source_of
from chainrule.cli.options import with_options
from chainrule.errors import UserError
from chainrule.files import make_folder
from chainrule.runs import Run, check_folder
from chainrule.settings import Opening, Sampling

if TYPE_CHECKING:
    from chainrule.models import Model
    from chainrule.rewards import Reward

Scored = Annotated[
    list[str] | None, typer.Option(help="A reward to score images by; the first one chooses with --best-of. May be repeated.")
]


@with_options
def sample(
    source: Annotated[str, typer.Argument(help="A run folder, or a model.")],
    prompts: Prompts,
    seeds: Annotated[int, typer.Option(help="Images per prompt, with seeds 0, 1, ...")] = 1,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    sampling: Sampling = Sampling(),
    scale: Strength = "1",
    adapter: Annotated[str | None, typer.Option(help="An adapter file or folder to put on top of a model.")] = None,
    adapter_steps: Annotated[
        tuple[int, int] | None, typer.Option(help="The sampling steps with adapters on: the first, and the one after the last.")
    ] = None,
    best_of: BestOfOption = 1,
    reward: Scored = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    overwrite: Overwrite = False,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Make images, or with --best-of the best of several for every prompt and seed.

    Each image is written when it is made, with what made it in the PNG and in images.jsonl. The same command again makes what is
    missing.
    """
    check_counts(seeds=seeds, best_of=best_of)
    if best_of > 1 and not reward:
        raise UserError("--best-of needs a --reward that chooses among the images")
    strength = scale_of(scale)
    numbers([first_seed, first_seed + seeds - 1])
    album = Album(out, [(prompt, first_seed + k) for prompt in prompts_of(prompts) for k in range(seeds)])
    check_folder(out)
    from chainrule import rewards
    from chainrule.models.students import few_steps

    base = source_of(source, opening, sampling, allow_code=allow_code)
    chosen = [rewards.parse(name, base.reward_source) for name in reward or []]
    check_once([each.name for each in chosen])
    places = _adapters(base, adapter, opening, asked=strength != 1 or bool(adapter_steps))
    # A run is sampled as it was trained, unless asked otherwise or with a few-step adapter, which says itself how.
    how = sampling if adapter and few_steps(adapter) else base.sampling
    steps, guidance = how.sample_steps, how.guidance
    adapters = [*map(adapter_facts, base.adapters), *(adapter_facts(place, strength) for place in places)]
    common: dict[str, Any] = {"model": base.model, "adapters": adapters or None}
    common |= {"adapter_steps": adapter_steps and list(adapter_steps)}
    common |= {"best_of": best_of if best_of > 1 else None, "rewards": [each.name for each in chosen] or None}
    album.check(common | _known(base.opening, steps, guidance), overwrite)
    model = base.load()
    for place in sorted(places, key=lambda place: not few_steps(place)):  # whose steps are counted
        model = model.using(place, scale=strength, adapter_steps=adapter_steps, steps=steps)
    _fill(album, model, common, chosen, steps, guidance, best_of, overwrite)


def _adapters(base: Source, adapter: str | None, opening: Opening, *, asked: bool) -> list[str]:
    """The run that was named and the adapter on top. Raises UserError for none where something was `asked` of one."""
    places = [place for place in (base.run, adapter) if place]
    if asked and not places:
        raise UserError("--scale and --adapter-steps are of an adapter, and there is none; name a run, or pass --adapter")
    check_adapters(places, base.model, opening.solver, base.adapters)
    return places


def _fill(
    album: Album, model: Model, common: dict[str, Any], chosen: list[Reward], steps: int | None, guidance: Any,
    best_of: int, overwrite: bool,
) -> None:  # fmt: skip
    """Make what is missing in an album, with a progress bar."""
    from chainrule.baselines import BestOf
    from chainrule.processes import Processes
    from chainrule.sampling import facts_of_model, fill, rounds

    common = facts_of_model(model, steps, guidance) | common
    album.check(common, overwrite)
    processes = Processes.here(model.device)
    maker = BestOf(model, chosen[0], best_of) if best_of > 1 else model
    done: dict[int, Any] = {}

    def begin() -> None:
        make_folder(album.folder)
        held.enter_context(Run(album.folder).locked())
        done.update(album.begin(overwrite))

    with ExitStack() as held:
        processes.main_does(begin)
        done = processes.of_main(done)
        calls = rounds(album, maker, processes, done) * (len(model.grid(steps)) - 1)
        with progress("sampling", calls, processes.main) as advance:
            fill(album, maker, common, chosen, steps=steps, guidance=guidance, on_call=advance, processes=processes, done=done)
    if processes.main:
        before, sheets = f" ({len(done)} there before)" if done else "", list(album.sheets)
        pages = f"all together in {sheets[0]}" if len(sheets) == 1 else f"on {len(sheets)} pages, {sheets[0]} to {sheets[-1].name}"
        typer.echo(f"{counted(len(album.pairs), 'image')} in {album.folder}{before}, {pages}")


def _known(opening: Opening, steps: int | None, guidance: Any) -> dict[str, Any]:
    """What is known of the images before the model is loaded. A guidance by name may leave out options, which are filled in."""
    asked = {"steps": steps, "guidance": guidance if isinstance(guidance, float) else None}
    asked |= opening.model_dump(include={"size", "solver", "dtype", "quantize"})
    return {key: value for key, value in asked.items() if value is not None}
