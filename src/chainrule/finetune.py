"""Fine-tuning an adapter by reward gradients: the input checked, a trainer built, a session run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from chainrule.chain import Score
from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.methods import Method, needs, spelled, stages
from chainrule.models import Model
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import probe, reward_of
from chainrule.runs import Run
from chainrule.session import Session, Watch
from chainrule.settings import Finetuning, Opening, chosen
from chainrule.trainer import build, check_cast, processes, stage_lengths


def finetune(
    model: Model,
    method: Method,
    reward: Score,
    prompts: str | Sequence[str],
    settings: Finetuning | None = None,
    *,
    out: str | Path,
    held_out: Score | None = None,
    watch: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_update: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Fine-tune an adapter so that its images score higher, and return the run it left behind.

    `settings`, or `options` instead of it, are a `chainrule.settings.Finetuning`: updates (or steps), batch, lr, rank, seed,
    sample_steps, guidance, ...
    `held_out` is a reward that is only watched (and stops the run early with `patience`). `watch` are the prompts of the
    sample grids. The folder `out` must be new or empty, unless `resume` (continues, bit for bit) or `overwrite`.
    Ctrl-C saves what is there and returns. Raises UserError for bad input before anything is written.
    """
    settings, said = chosen(Finetuning, settings, options), read_prompts(prompts)
    scorer, judge = reward_of(reward), reward_of(held_out) if held_out else None
    if settings.patience and not judge:
        raise UserError("patience needs a held-out reward to watch; pass held_out")
    turns, grid = stages(method), model.grid(settings.sample_steps)
    for stage in turns:
        check_cast(model, needs(stage, grid).members)
        stage.plan(grid, Random(0))  # a method that does not fit this grid says so before anything is written
    lengths = stage_lengths(settings, len(turns))
    for each in filter(None, (scorer, judge)):
        probe(each.to(model.device), model.size)
    config = FinetuneConfig(
        model=model.name, opening=Opening(**model.opening), adapter=model.under, student=model.student_name,
        method=spelled(method), reward=scorer.name, held_out=judge.name if judge else None,
        prompts=prompts if isinstance(prompts, str) else tuple(said),
        settings=settings.model_copy(update={"stage_steps": lengths if len(turns) > 1 else None}),
    )  # fmt: skip
    accelerator = processes(settings, model.device, out)
    with accelerator.main_process_first():  # the others find the folder made
        main = accelerator.is_main_process
        run = Run.create(out, config, resume=resume, overwrite=overwrite) if main else Run(Path(out))
    trainer = build(model, method, scorer, said, settings, accelerator)
    shown = list(watch) if watch else said[:: max(1, len(said) // 8)][:8]
    try:
        return Session(run).train(trainer, Watch(shown, list(range(len(shown))), judge), resume, on_update)
    finally:
        trainer.remove()
