"""Commands that look at what was trained: `eval`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chainrule.cli.app import progress
from chainrule.cli.arguments import AllowCode, BestOfOption, Strength, check_counts, scale_of
from chainrule.cli.opened import Source, adapter_facts, source_of, source_of_run
from chainrule.cli.options import with_options
from chainrule.config import AnyConfig
from chainrule.errors import UserError
from chainrule.named import refuse_code
from chainrule.runs import Run, check_folder
from chainrule.scores import Scores
from chainrule.settings import Opening, Sampling

if TYPE_CHECKING:
    from chainrule.adapters import Scale
    from chainrule.baselines import BestOf
    from chainrule.evaluate import Table
    from chainrule.models import Model
    from chainrule.rewards import Reward


@with_options
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one base model.")],
    prompts: Annotated[str, typer.Option(help="Prompts that were not trained on: a set, file or dataset.")] = "animals:test",
    reward: Annotated[list[str] | None, typer.Option(help="A reward to measure; default: the run's own. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    sampling: Sampling = Sampling(),
    scale: Strength = "1",
    best_of: BestOfOption = 1,
    group: Annotated[
        str | None, typer.Option(help="A column of the prompt file to also average by: Category; style for HPDv2's folder.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and every image's scores; default: the run's, of several: evaluation.")
    ] = None,
    opening: Opening = Opening(),
    allow_code: AllowCode = False,
) -> None:
    """Compare runs with their base model by rewards, with 95% intervals, and diversity.

    The table goes into evaluation.json, every image's scores into scores.csv and scores.jsonl. The same command again makes only
    images that have no scores there.
    """
    from chainrule.adapters.files import adapter_files
    from chainrule.evaluate import columns_of
    from chainrule.prompts import groups as prompt_groups
    from chainrule.prompts import prompts as read_prompts

    check_counts(seeds=seeds, best_of=best_of)
    strength = scale_of(scale)
    shown, first = read_prompts(prompts), _of_one_model(runs)
    groups = prompt_groups(prompts, group) if group else []
    source = source_of(runs[0], opening, sampling, allow_code=allow_code)
    scorers, weights = _scorers(reward or [], runs[0], first, source, allow_code)
    for folder in runs:
        adapter_files(folder)
    place = out or (runs[0] if len(runs) == 1 else Path("evaluation"))
    check_folder(place)
    labels = dict(zip(_labels(runs), runs, strict=True))
    base = source.load()
    models = _compared(base, labels, strength, scorers[0], best_of)
    scores = Scores(place, _made(models, source, labels, strength, weights))
    if (table := _measured(base, models, shown, seeds, scorers, source, scores)) is None:
        return
    typer.echo(f"{len(shown)} prompts x {seeds} seeds; mean ± 95% interval over prompts\n{table}")
    if groups:
        typer.echo(f"\nby {group}\n{table.grouped(groups)}")
    typer.echo(_told_apart(first, list(columns_of(scorers, seeds)), weights))
    typer.echo(f"the table: {table.save(place / 'evaluation.json', groups, scores.made)}; every image: {place / 'scores.csv'}")
    if [place] == runs:
        _carded(Run(place))


def _carded(run: Run) -> None:
    """The card of a run's adapter says what was measured."""
    from chainrule.card import refresh

    if run.adapter.is_dir():
        refresh(run)


def _measured(
    base: Model, models: dict[str, Model | BestOf], prompts: list[str], seeds: int, rewards: list[Reward], source: Source,
    scores: Scores,
) -> Table | None:  # fmt: skip
    """The table, with a progress bar over what is not there yet; None where another process has it."""
    from chainrule.baselines import BestOf
    from chainrule.evaluate import columns_of, shares
    from chainrule.evaluate import evaluate as measure
    from chainrule.processes import Processes

    steps, columns, calls = source.sampling.sample_steps, columns_of(rewards, seeds), 0
    processes = Processes.here(base.device)
    for name, model in models.items():
        done = processes.of_main(scores.there(name, prompts, range(seeds), columns))
        made = shares(len(prompts), seeds, processes=processes, done=done)
        batches = sum(made) * -(-model.n // 16) if isinstance(model, BestOf) else sum(-(-count // 16) for count in made)
        calls += batches * (len(base.grid(steps)) - 1)
    with progress("evaluating", calls, processes.main) as advance:
        table = measure(
            models, prompts, rewards, seeds=range(seeds), steps=steps, guidance=source.sampling.guidance, on_call=advance,
            processes=processes, scores=scores,
        )  # fmt: skip
    return table if processes.main else None


def _made(
    models: dict[str, Model | BestOf], source: Source, runs: dict[str, Path], scale: Scale, weights: dict[str, float]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """How the images of each row are made, and by which weights of its rewards, if a run found some, they are measured."""
    from chainrule.baselines import BestOf
    from chainrule.sampling import facts_of_model

    found = {}
    for name, model in models.items():
        maker = model.model if isinstance(model, BestOf) else model
        adapters = [adapter_facts(place) for place in source.adapters]
        adapters += [adapter_facts(runs[name], scale)] if name in runs else []
        facts = facts_of_model(maker, source.sampling.sample_steps, source.sampling.guidance)
        found[name] = {**facts, "model": source.model, "adapters": adapters}
        if isinstance(model, BestOf):
            found[name] |= {"best_of": model.n, "chosen by": model.reward.name}
        found[name] |= {"weights": weights} if weights else {}
    return found


def _scorers(
    given: list[str], run: Path, config: AnyConfig, source: Source, allow_code: bool
) -> tuple[list[Reward], dict[str, float]]:  # fmt: skip
    """The rewards that are measured, those given, else the run's own, and the weights that the run found for its own."""
    from chainrule import rewards
    from chainrule.balance import reweighted

    if not given:
        refuse_code({"reward": config.rewards}, run, allow_code)
    found = [rewards.parse(name, source.reward_source) for name in given or config.rewards]
    weights = {} if given else _weights(run)
    if weights:
        found[0] = reweighted(found[0], weights)
    if not found:
        raise UserError(f"{run} does not say its reward; pass --reward")
    return found, weights


def _weights(run: Path) -> dict[str, float]:
    """The weights that a run balanced its rewards to, by name; none where it did not."""
    return next((row["weights"] for row in reversed(Run(run).metrics()) if row.get("weights")), {})


def _compared(base: Model, runs: dict[str, Path], scale: Scale, reward: Reward, best_of: int) -> dict[str, Model | BestOf]:
    """The rows of an evaluation: the model before, the best of its images where that is asked for, and the runs."""
    from chainrule.baselines import BestOf

    models: dict[str, Model | BestOf] = {"before": base}
    if best_of > 1:
        models[f"best of {best_of}"] = BestOf(base, reward, best_of)
    return models | {name: base.using(folder, scale=scale) for name, folder in runs.items()}


def _told_apart(config: AnyConfig, columns: list[str], weights: dict[str, float]) -> str:
    """Which columns the first run was trained on, and which it was not, and the weights that it found for its rewards."""
    from chainrule.balance import in_words

    terms = _trained_on(config)
    trained, other = ([name for name in columns if (name in terms) is wanted] for wanted in (True, False))
    said = f"trained on: {', '.join(trained) or 'none of these'}; not trained on: {', '.join(other) or 'none of these'}"
    return f"{said}\n{columns[0]} is measured as it was balanced: {in_words(weights)}" if weights else said


def _trained_on(config: AnyConfig) -> set[str]:
    """The names of the rewards that a run was trained on: the whole, and its terms."""
    from chainrule import rewards

    named = getattr(config, "reward", None)
    if not named:
        return set()
    try:
        refuse_code({"reward": named}, "", False)
        return {named, *(term.name for _, term in rewards.parse(named).weighted())}
    except UserError:  # code that was not asked for, or a file that is gone
        return {named}


def _of_one_model(runs: list[Path]) -> AnyConfig:
    """The config of the first of these runs. Raises UserError unless all were made from one model, opened in one way."""
    configs = [Run(folder).config for folder in runs]
    first, one = configs[0], source_of_run(configs[0])
    for other, config in zip(runs, configs, strict=True):
        source = source_of_run(config)
        if source.model != one.model:
            raise UserError(f"{other} was trained from {source.model}, not from {one.model} as {runs[0]}")
        if source.adapters != one.adapters:
            raise UserError(f"{other} was trained on top of other adapters than {runs[0]}")
        for key in ("size", "solver"):
            if getattr(source.opening, key) != getattr(one.opening, key):
                how = f"{key} {getattr(source.opening, key)}, {runs[0]} with {getattr(one.opening, key)}"
                raise UserError(f"{other} was trained with {how}")
    return first


def _labels(runs: list[Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two folders have the same name."""
    if len(runs) == 1:
        return ["after"]
    if len({folder.resolve() for folder in runs}) < len(runs):
        raise UserError(f"a run is given twice: {', '.join(map(str, runs))}")
    names = [folder.resolve().name for folder in runs]
    return names if len({"before", *names}) > len(names) else list(map(str, runs))


def report(runs: Annotated[list[Path], typer.Argument(help="A run folder, or several to put side by side.")]) -> None:
    """Write one self-contained HTML page about a run; of several, one that compares them, into the first one's folder."""
    from chainrule.report import report as write

    typer.echo(str(write(*runs)))
