"""Distilling a few-step student that keeps to the base model's trajectories, as a LoRA with guidance baked in.

The levels are cut into as many segments as the student has steps. From any state of a trajectory of the guided base model
the student learns the one jump to the end of the state's segment, so its chain of jumps follows the trajectory; it is the
trajectory-segmented consistency of Hyper-SD (arXiv:2404.13686) with the teacher's own end state as the target, where that
paper bootstraps from the student. No data are needed but prompts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from chainrule import half
from chainrule.adapters import Active, Band, inject
from chainrule.adapters.lora import every_layer, gradients
from chainrule.analyze import save, shortcut
from chainrule.config import DistillConfig
from chainrule.denoise import Member
from chainrule.errors import UserError
from chainrule.learner import Learner
from chainrule.models import Model
from chainrule.models.students import boundaries
from chainrule.noise import derive
from chainrule.plan import Grid, walk
from chainrule.prompts import prompts as read_prompts
from chainrule.runs import Run
from chainrule.session import BAD_IN_A_ROW, interrupts, load_checkpoint, progress_bar, save_checkpoint
from chainrule.settings import Distillation, Opening, chosen


@dataclass(slots=True)
class Distiller:
    """Everything an update needs. Its whole state is the learner's."""

    model: Model
    learner: Learner
    student: Member
    prompts: list[str]
    settings: Distillation

    def grid(self, rng: Random) -> Grid:
        """Levels of a teacher's trajectory: evenly spaced with a random offset, and the ends of the segments."""
        top = self.model.solver.process.schedule.top
        stride = top / self.settings.teacher_steps
        offset = rng.random() * stride
        even = {top - round(offset + stride * i) for i in range(self.settings.teacher_steps)}
        return sorted({*boundaries(top, self.settings.student_steps), *(level for level in even if level > 0)}, reverse=True)

    def starts(self, grid: Grid, rng: Random) -> list[tuple[int, int]]:
        """Which states are learned from: their place in the grid, and that of the end of their segment. All segments."""
        ends = boundaries(self.model.solver.process.schedule.top, self.settings.student_steps)
        pairs = [(i, grid.index(next(end for end in ends if end < level))) for i, level in enumerate(grid[:-1])]
        rng.shuffle(pairs)
        by_segment = sorted(range(len(pairs)), key=lambda n: sum(p[1] == pairs[n][1] for p in pairs[:n]))
        return [pairs[n] for n in by_segment[: self.settings.starts]]

    def update(self) -> dict[str, Any]:
        s, step, began = self.settings, self.learner.progress.step, time.perf_counter()
        rng = Random(derive(s.seed, "distill", step))
        grid = self.grid(rng)
        prompts, seeds = [rng.choice(self.prompts) for _ in range(s.batch)], [rng.getrandbits(63) for _ in range(s.batch)]
        guidance = self.model.defaults.guidance if s.guidance is None else s.guidance
        chain = self.model.chain(prompts, seeds, guidance)
        states = [self.model.noise(seeds), *chain.states(self.model.noise(seeds), walk(grid))]
        picked, losses = self.starts(grid, rng), []
        for i, end in picked:
            a, b = self.model.solver.process.coefficients(grid[i], grid[end], finish=grid[end] == 0)
            answer = self.student(states[i], grid[i], chain.condition)
            missed = (a * states[i] + b * answer - states[end]) / self._reach(grid[i], grid[end])
            half.backward(answer, torch.autograd.grad(missed.square().mean() / len(picked), answer)[0])
            losses.append(float(missed.detach().square().mean()))
        weights = self.learner.train_only(self.learner.adapters)
        flat, rate = gradients(weights), s.lr * (1 - step / s.updates)
        norm, loss = float(flat.norm()), sum(losses) / len(losses)
        if math.isfinite(norm):
            self.learner.step(weights, flat, lr=rate, clip=s.clip, ema=s.ema)
        else:
            self.learner.progress.skipped += 1
        self.learner.optimizer.zero_grad(set_to_none=True)
        self.learner.progress.step += 1
        seconds, skipped = time.perf_counter() - began, self.learner.progress.skipped
        return {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": rate, "seconds": seconds, "skipped": skipped}

    def _reach(self, start: float, stop: float) -> float:
        """alpha sigma' - alpha' sigma: what a jump multiplies an error of the velocity by, so that all jumps count alike."""
        (alpha, sigma), (alpha2, sigma2) = self.model.solver.process.schedule(start), self.model.solver.process.schedule(stop)
        return abs(alpha * sigma2 - alpha2 * sigma)

    def save(self, folder: Path) -> None:
        """The student in half precision, and what it is written beside it."""
        next(iter(self.learner.adapters.values())).weights().half().save(folder)
        said = {
            "base": self.model.name,
            "steps": self.settings.student_steps,
            "prediction": self.model.solver.process.prediction.value,
        }
        (folder / "student.json").write_text(json.dumps(said) + "\n")


def distill(
    model: Model,
    settings: Distillation | None = None,
    *,
    out: str | Path,
    prompts: str | Sequence[str] = "emoji",
    resume: bool = False,
    overwrite: bool = False,
    on_update: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Distill a few-step student of `model` and return the run it left behind: `model.with_student(run.folder)`.

    `settings`, or `options` instead of it, are a `chainrule.settings.Distillation`: student_steps (or steps; 4), updates, batch,
    rank, lr, guidance, seed, ... The folder `out` must be new or empty, unless `resume` (continues, bit for bit) or `overwrite`.
    Ctrl-C saves what is there and returns. The run says how faithful the student is: `shortcut.md`, `shortcut.png`
    (see `chainrule.analyze`). Raises UserError for bad input before anything is written.
    """
    settings, said = chosen(Distillation, settings, options), read_prompts(prompts)
    if getattr(model.network, "peft_config", None):
        raise UserError("distill needs the model without adapters; load it again")
    if model.solver.stochastic:
        name = model.sampler.name
        raise UserError(f"a student follows its model's trajectories, and {name} draws noise on the way; take the solver ddim")
    source = prompts if isinstance(prompts, str) else tuple(said)
    config = DistillConfig(model=model.name, opening=Opening(**model.opening), prompts=source, settings=settings)
    run, name = Run.create(out, config, resume=resume, overwrite=overwrite), "student"
    adapter = inject(
        model.network, name, rank=settings.rank, seed=settings.seed, targets=every_layer(model.network), part=model.part
    )
    try:
        learner = Learner.of({name: adapter}, settings.lr, 0.0)
        made = Distiller(model, learner, Member(model.denoiser, 1.0, Active({name: Band()})), said, settings)
        if resume:
            load_checkpoint(run, learner)
            run.truncate(learner.progress.step)
        finished = _run(made, run, on_update)
        with learner.averaged():
            made.save(run.adapter)
            if not finished:
                return run
            shown = said[:: max(1, len(said) // 6)][:6]
            taught = replace(model, student=made.student)
            save(shortcut(taught, shown, student_steps=settings.student_steps, guidance=settings.guidance), run.folder)
    finally:
        adapter.remove()
    return run


def _run(made: Distiller, run: Run, on_update: Callable[[dict[str, Any]], None] | None) -> bool:
    """Update to the end, or until Ctrl-C; whether it was the end."""
    s, progress, smooth, bad = made.settings, made.learner.progress, None, 0
    with interrupts() as asked, progress_bar("loss") as bar:
        task = bar.add_task("distill", total=s.updates, completed=progress.step, value="-", speed="-")
        while made.learner.progress.step < s.updates and not asked():
            row = made.update()
            smooth = row["loss"] if smooth is None else 0.95 * smooth + 0.05 * row["loss"]
            run.log(row)
            if s.save_every and row["step"] % s.save_every == 0:
                save_checkpoint(run, made.learner)
            bad = 0 if math.isfinite(row["grad_norm"]) else bad + 1
            if bad >= BAD_IN_A_ROW:
                raise UserError(f"{bad} updates in a row had a NaN or Inf gradient; lower lr, or resume from the last checkpoint")
            bar.update(task, completed=row["step"], value=f"{smooth:.4g}", speed=f"{s.batch / row['seconds']:.1f}")
            if on_update:
                on_update(row)
    save_checkpoint(run, made.learner)
    return made.learner.progress.step >= s.updates
