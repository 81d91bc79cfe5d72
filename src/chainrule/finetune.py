"""Fine-tuning an adapter by reward gradients: the input checked, a task started, the loop run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from chainrule import card
from chainrule.adapters import whole
from chainrule.balance import in_words
from chainrule.chain import check_leaps, check_members
from chainrule.config import FinetuneConfig
from chainrule.errors import Note, UserError
from chainrule.footprint import POLICIES, fitted
from chainrule.grids import SampleGrids
from chainrule.guidance import value_among
from chainrule.loop import Listener, Row, complete, open_run, told
from chainrule.methods import Estimator, Method, Pathwise, as_method, needs, spelled
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.processes import Processes
from chainrule.prompts import other_half
from chainrule.prompts import prompts as read_prompts
from chainrule.report import report
from chainrule.rewards import AnyReward, Reward, as_reward, probe
from chainrule.runs import Run
from chainrule.settings import Finetuning, Opening, chosen
from chainrule.trackers import tracker
from chainrule.training import FinetuneTask, Stages, group_of

WATCHED = 8  # prompts of a sample grid


def finetune(
    model: Model, method: str | Method, reward: AnyReward, prompts: str | Sequence[str],
    settings: Finetuning | None = None, *, out: str | Path, held_out: AnyReward | None = None,
    watch: str | Sequence[str] | None = None, resume: bool = False, overwrite: bool = False,
    on_update: Callable[[Row], None] | None = None, **options: Any,
) -> Run:  # fmt: skip
    """Fine-tune an adapter so that its images score higher, and return the run it left behind.

    Methods and rewards may be given by name: "sdo", "10*pickscore+symmetry".

    `settings`, or `options` instead of it, are a `chainrule.settings.Finetuning`: updates (or steps), batch, lr, rank, seed,
    sample_steps, guidance, ...
    `held_out` is a reward that is only watched (and stops the run early with `patience`). `watch` are the prompts of the
    sample grids, eight of those that are trained on by default.
    The folder `out` must be new or empty, unless `resume` (continues, bit for bit) or `overwrite`.
    Ctrl-C, SIGTERM and SIGHUP save what is there and return. Raises UserError for bad input before anything is written.
    """
    guidance, options = value_among(options)
    settings, texts = chosen(Finetuning, settings, options), read_prompts(prompts)
    shown = tuple(read_prompts(watch)) if watch else ()
    model = model.guided(guidance or settings.guidance)
    method = as_method(method)
    scorer, watched = as_reward(reward), as_reward(held_out) if held_out else None
    if settings.patience and not watched and settings.best == "held_out":
        raise UserError("patience needs a held-out reward to watch; pass held_out, or let best name something else")
    order = _order(model, method, scorer, settings)
    processes = Processes.here(model.device, settings.timeout)
    processes.check_batch(settings.batch, settings.accumulate)
    together = min(settings.batch // (processes.count * settings.accumulate), settings.micro_batch or model.micro_batch)
    estimator = needs(method, model.grid(settings.sample_steps)).estimator
    probe(scorer.to(model.device), model.size, count=together, gradient=isinstance(estimator, Pathwise))
    if watched:
        probe(watched.to(model.device), model.size, gradient=False)
    settings = _fitted(model, order, scorer, settings, processes)
    config = FinetuneConfig(
        model=model.name, opening=Opening(**model.opening), adapter=whole(model.base_adapters), student=model.student_name,
        method=spelled(method), reward=scorer.name, held_out=watched.name if watched else None,
        prompts=prompts if isinstance(prompts, str) else tuple(texts), watch=shown,
        settings=settings.model_copy(update={"stage_steps": order.recorded, "guidance": model.guidance_spec}),
    )  # fmt: skip
    sent = [tracker(settings.tracker, config.values(), out, model.device)] if settings.tracker != "none" else []
    task = FinetuneTask.start(model, method, scorer, texts, settings, processes)
    try:
        with open_run(out, config, processes, resume=resume, overwrite=overwrite) as run:
            looking = _shown(run, task, watched, shown, other_half(prompts))
            listeners = [*looking, *sent, *told(on_update)]
            complete(task, run, listeners=listeners, save_every=settings.save_every, resume=resume, processes=processes)
    finally:
        task.remove()
    return run


def _fitted(model: Model, order: Stages, reward: Reward, settings: Finetuning, processes: Processes) -> Finetuning:
    """Settings with a memory policy that fits every process: the smallest that any of them chose, so that all call alike."""
    share = settings.batch // (processes.count * settings.accumulate)
    chosen = processes.gather([fitted(model, order.methods, reward, settings, share).memory])
    return settings.model_copy(update={"memory": max(chosen, key=POLICIES.index)})


def _order(model: Model, method: Method, reward: Reward, settings: Finetuning) -> Stages:
    """The method's stages. Raises UserError for one that needs what the model or reward does not have, or does not fit the grid."""
    order, grid = Stages.of(method, settings), model.grid(settings.sample_steps)
    for stage in order.methods:
        check_members(needs(stage, grid).members, model.cast())
        check_leaps(model.solver, stage.plan(grid, Random(0)))
        if settings.flat and not isinstance(needs(stage, grid).estimator, Pathwise):
            raise UserError(f"flat goes with the reward's gradient along the chain, which {stage} does not take; leave flat out")
        if settings.batch % (group := group_of(stage, grid)):
            raise UserError(f"batch is {settings.batch}, but must be divisible by the method's groups of {group} images")
    _check_balance(reward, [needs(stage, grid).estimator for stage in order.methods], settings)
    return order


def _check_balance(reward: Reward, estimators: Sequence[Estimator], settings: Finetuning) -> None:
    """Raises UserError where terms are to be balanced and there is but one, or what they are measured by is not there."""
    if settings.balance == "none":
        return
    if len(reward.weighted()) == 1:
        raise UserError(f"balance is for a sum of rewards, and {reward.name} is one; leave balance out")
    if settings.balance == "gradient" and not all(isinstance(kind, Pathwise) for kind in estimators):
        raise UserError("balance is gradient, but the method takes no gradient of the reward; take deviation")
    if settings.batch == min(settings.balance_batches, settings.updates) == 1:
        raise UserError("balance measures one image, which has no deviation; raise balance_batches")


def _shown(
    run: Run, task: FinetuneTask, held_out: Reward | None, watch: Sequence[str], unseen: Sequence[str]
) -> list[Listener]:  # fmt: skip
    """What the folder shows: the plans, grids while the run trains, a report and a card at the end."""
    settings, main = task.settings, task.processes.main
    plans = [stage.plan(task.grid, Random(derive(settings.seed, "plan", i))) for stage in task.stages.methods for i in range(3)]
    prompts = list(watch) if watch else _spread(task.prompts)
    grids = SampleGrids(run, task, prompts, held_out, _spread([prompt for prompt in unseen if prompt not in prompts]))

    def balance() -> None:
        task.weigh()
        if main and task.sizes:
            run.note({"weights": in_words({term.name: weight for weight, term in task.raised.weighted()})})
            warnings.warn(Note(f"balance: {settings.balance}; weights are {run.environment['weights']}"), stacklevel=2)

    def write_plans() -> None:
        run.note({"device": _machine(task.model.device, task.processes.count)})
        run.write_text("plan.txt", "\n".join(dict.fromkeys(map(str, plans))) + "\n")

    def write_pages(reason: str) -> None:
        card.write(run, card.Base.of(task.model, settings.sample_steps))
        report(run.folder)  # which shows how the card says to use the adapter

    return [Listener(started=balance), grids.listener, *([Listener(started=write_plans, finished=write_pages)] if main else [])]


def _machine(device: torch.device, count: int) -> str:
    """What the updates are made on, for the report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"{os.cpu_count()} CPU cores" if device.type == "cpu" else name
    return name if count == 1 else f"{count} processes, each on {name}"


def _spread(prompts: Sequence[str]) -> list[str]:
    """Some of the prompts, from the whole list."""
    return list(prompts[:: max(1, len(prompts) // WATCHED)][:WATCHED])
