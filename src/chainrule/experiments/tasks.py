"""What one run of a table does: train and evaluate, evaluate, steer and measure, or time a gradient.

Every task leaves `evaluation.json` in its folder, last: with it there, the run is done.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import cast

import torch
import yaml

from chainrule.baselines import BestOf, Templated
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.evaluate import Renderer, Table, evaluate
from chainrule.experiments import measures
from chainrule.experiments.table import Values
from chainrule.experiments.unit import RESULT, Unit, versions
from chainrule.finetune import finetune
from chainrule.meters import peak_bytes
from chainrule.methods import needs
from chainrule.methods import read as read_method
from chainrule.models import BUNDLED, Model, load
from chainrule.objective import Objective
from chainrule.plan import walk
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import Reward, Symmetry, parse, reward_of
from chainrule.runs import Run
from chainrule.settings import Finetuning, Steering
from chainrule.steer import steer
from chainrule.steer.gradients import gradient_of
from chainrule.steer.problem import Problem

SAVE_EVERY = 5  # updates between checkpoints, so that little is lost where a run is cut


def work(unit: Unit, root: Path) -> bool:
    """Make a unit's result, or go on with it. False when it was interrupted; what is there is kept and taken up next time.

    Raises UserError for what the unit's settings make impossible.
    """
    folder = unit.folder(root)
    if unit.task != "finetune" and folder.is_dir():  # only training can be taken up where it was cut
        shutil.rmtree(folder)
    found = TASKS[unit.task](unit, folder)
    if found is None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    config = {"label": unit.label, "key": unit.key, "versions": versions(), **unit.config}
    run = Run(folder)
    run.write_text("experiment.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    found.save(folder / RESULT)
    return True


def _model(settings: Values) -> tuple[Model, str | None]:
    """The model a row is about, with its adapter on, and the source of rewards that name none."""
    name = str(settings["model"])
    model, source = load(name), "tiny" if name in BUNDLED else None
    return model.using(settings["adapter"]) if settings.get("adapter") else model, source


def _train(unit: Unit, folder: Path) -> Table | None:
    own = unit.settings
    model, source = _model(own)
    _measured(unit, source)  # one that is not there is told before anything is trained
    method = read_method(own["method"])
    settings = Finetuning(**{"sample_every": 0, "save_every": SAVE_EVERY, **own["settings"]})
    if "student" in needs(method, model.grid(settings.sample_steps)).members:
        model = model.with_student(own["student"])
    resume = (folder / "config.yaml").is_file()
    if folder.is_dir() and not resume:
        shutil.rmtree(folder)  # cut before it began
    watch = read_prompts(unit.measure["prompts"])[:1]
    reward = parse(own["reward"], source)
    trained = model.solving(own["solver"]) if own["solver"] else model
    run = finetune(trained, method, reward, own["prompts"], settings, out=folder, resume=resume, watch=watch)
    return None if _interrupted(folder) else _evaluated(unit, model.using(run.folder), source)


def _interrupted(folder: Path) -> bool:
    reason = folder / "stopped.txt"
    return reason.is_file() and reason.read_text().startswith("interrupted")


def _evaluate(unit: Unit, folder: Path) -> Table:
    model, source = _model(unit.settings)
    if unit.of:
        run, how = unit.of.folder(folder.parent), unit.measure
        if not unit.of.done(folder.parent):
            raise UserError(f"its run, {unit.of.title!r}, has no result yet")
        steps = tuple(how["adapter_steps"]) if how["adapter_steps"] else None
        scale = 1.0 if how["scale"] is None else how["scale"]
        model = model.using(run, scale=scale, adapter_steps=steps, steps=how["sample_steps"])
    return _evaluated(unit, model, source)


def _measured(unit: Unit, source: str | None) -> list[Reward]:
    """The measured rewards. One that names a file is called as the table says it, wherever the table lies."""
    found = [measures.scored(name, source) for name in unit.measure["rewards"]]
    pairs = zip(found, unit.measure["rewards"], unit.config["measure"]["rewards"], strict=True)
    return [reward if name == written else reward_of(reward.__call__, written) for reward, name, written in pairs]


def _evaluated(unit: Unit, model: Model, source: str | None) -> Table:
    how, rewards, made = unit.measure, _measured(unit, source), cast(Renderer, model)
    if how["template"]:
        made = Templated(model, how["template"])
    if how["best_of"]:
        made = BestOf(model, rewards[0], how["best_of"])
    return evaluate(
        {unit.label: made}, how["prompts"], rewards, seeds=how["seeds"],
        steps=how["sample_steps"], guidance=how["guidance"],
    )  # fmt: skip


def _steer(unit: Unit, folder: Path) -> Table | None:
    """Every part of a row steered, and measured together."""
    began, own = time.process_time(), unit.settings
    model, source = _model(own)
    pairs = []
    for number, part in enumerate(own["parts"], 1):
        reward, place = _in_units(model, parse(part["reward"], source), own, part), folder
        if len(own["parts"]) > 1:
            place = folder / f"part-{number}"
        found = steer(
            model, part["prompts"], reward, Steering(**own["settings"]), seeds=part["seeds"], images=part.get("images"), out=place
        )
        if _interrupted(place):
            return None
        pair = measures.Pair(measures.tensors(found.before), measures.tensors(found.images), found.prompts)
        with torch.no_grad():
            counts = (
                measures.sees(pair.before, part["counts"]) if part.get("counts") else torch.ones(len(pair.after), dtype=torch.bool)
            )
        pairs.append((pair, part["measure"], counts))
    before, after = measures.measured(pairs, source)
    after |= {"images": float(sum(int(counts.sum()) for *_, counts in pairs)), "processor seconds": time.process_time() - began}
    return _numbers({"before": before, "after": after}, [prompt for pair, *_ in pairs for prompt in pair.prompts])


def _in_units(model: Model, reward: Reward, own: Values, part: Values) -> Reward:
    """The reward as it is, or with `unit: before` divided by its size on the images before steering."""
    if own["unit"] == "one":
        return reward
    how = Steering(**own["settings"])
    plain = measures.tensors(model.sample(part["prompts"], part["seeds"], how.sample_steps, how.guidance))
    with torch.no_grad():
        return (1 / float(reward(plain, part["prompts"]).mean().abs())) * reward


def _cost(unit: Unit, folder: Path) -> Table:
    """Processor seconds and peak bytes of one gradient at the initial noise, in turns with sampling; the first round warms up."""
    own = unit.settings
    model, seeds = load(str(own["model"])), list(range(len(own["prompts"])))
    chain = model.chain(own["prompts"], seeds)
    problem = Problem(chain, model.grid(own["sample_steps"]), model.codec.decode, own["prompts"], Objective.of(Symmetry()))
    x, path = model.noise(seeds), walk(problem.grid)
    ways: dict[str, Callable[[], object]] = {
        "sampling": partial(chain.end, x, path),
        "seconds": partial(gradient_of(own["gradient"], "latent"), problem, x, Random(0)),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(own["rounds"] + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            spent[name].append(time.process_time() - began)
    found = {name: statistics.median(times[1:]) for name, times in spent.items()}
    found |= {"beyond sampling": found["seconds"] - found["sampling"], "MiB": peak_bytes(ways["seconds"]) / 2**20}
    return _numbers({"gradient": found}, own["prompts"])


def _numbers(rows: dict[str, dict[str, float]], prompts: list[str]) -> Table:
    return Table(prompts, {name: {key: Estimate.of([value]) for key, value in row.items()} for name, row in rows.items()}, {})


TASKS: dict[str, Callable[[Unit, Path], Table | None]] = {
    "finetune": _train, "evaluate": _evaluate, "steer": _steer, "cost": _cost,
}  # fmt: skip
