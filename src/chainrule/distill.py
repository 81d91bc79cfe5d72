"""Distilling a few-step student that keeps to the base model's trajectories, as a LoRA with guidance baked in.

The levels are cut into as many segments as the student has steps. From any state of a trajectory of the guided base model
the student learns the one jump to the end of the state's segment, so its chain of jumps follows the trajectory; it is the
trajectory-segmented consistency of Hyper-SD (arXiv:2404.13686) with the teacher's own end state as the target, where that
paper bootstraps from the student. No data are needed but prompts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from torch import Tensor

from chainrule import card, half
from chainrule.adapters import Active, Adapter, Band, inject
from chainrule.adapters.lora import every_layer
from chainrule.analyze import save, shortcut
from chainrule.cast import Member
from chainrule.config import DistillConfig
from chainrule.errors import UserError
from chainrule.files import write_text
from chainrule.guidance import of_number, value_among
from chainrule.learner import Learner, gradients
from chainrule.loop import Row, complete, open_run, told
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.objective import Call, Objective, SegmentError
from chainrule.plan import Grad, Grid, Jump, segment_ends, walk
from chainrule.processes import ALONE, Processes
from chainrule.prompts import prompts as read_prompts
from chainrule.runs import Run
from chainrule.settings import Distillation, Opening, chosen
from chainrule.shards import is_sharded


@dataclass(slots=True)
class DistillTask:
    """Everything an update needs. Its whole state is the learner's."""

    model: Model
    learner: Learner
    adapter: Adapter
    student: Member
    prompts: Sequence[str]
    settings: Distillation
    processes: Processes = ALONE
    label: ClassVar[str] = "distill"
    watched: ClassVar[str] = "loss"

    @classmethod
    def start(cls, model: Model, prompts: Sequence[str], settings: Distillation, processes: Processes = ALONE) -> DistillTask:
        """Put a fresh student into the model's network; `remove` takes it out again."""
        model, network = model.guided(settings.guidance), model.network
        adapter = inject(
            network, "student", rank=settings.rank, seed=settings.seed, targets=every_layer(network), component=model.component
        )
        learner = Learner.of({adapter.name: adapter}, weight_decay=0.0)
        student = Member(model.denoiser, of_number(model.denoiser, 1.0), Active({adapter.name: Band()}))
        return cls(model, learner, adapter, student, prompts, settings, processes)

    @property
    def batch(self) -> int:
        """Images per update."""
        return self.settings.batch

    @property
    def seed(self) -> int:
        """What draws of no seed of their own depend on."""
        return self.settings.seed

    @property
    def total(self) -> int:
        """Updates until it is done."""
        return self.settings.updates

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.learner.step

    def grid(self, rng: Random) -> Grid:
        """Levels of a teacher's trajectory: evenly spaced with a random offset, and the ends of the segments."""
        top = self.model.solver.process.schedule.top
        stride = top / self.settings.teacher_steps
        offset = rng.random() * stride
        even = {top - round(offset + stride * i) for i in range(self.settings.teacher_steps)}
        return sorted({*segment_ends(top, self.settings.student_steps), *(level for level in even if level > 0)}, reverse=True)

    def starts(self, grid: Grid, rng: Random) -> list[tuple[int, int]]:
        """Which states are learned from: their place in the grid, and that of the end of their segment. All segments."""
        ends = segment_ends(self.model.solver.process.schedule.top, self.settings.student_steps)
        pairs = [(i, grid.index(next(end for end in ends if end < level))) for i, level in enumerate(grid[:-1])]
        rng.shuffle(pairs)
        by_segment = sorted(range(len(pairs)), key=lambda n: sum(p[1] == pairs[n][1] for p in pairs[:n]))
        return [pairs[n] for n in by_segment[: self.settings.starts]]

    def update(self) -> Row:
        """Make one update and return its row of the log."""
        s, step, began = self.settings, self.step, time.perf_counter()
        rng = Random(derive(s.seed, "distill", step))
        grid = self.grid(rng)
        prompts, seeds = [rng.choice(self.prompts) for _ in range(s.batch)], [rng.getrandbits(63) for _ in range(s.batch)]
        picked = self.starts(grid, rng)
        weights = self.learner.train_only(self.learner.parts)
        loss = self.processes.mean_of(self._backward(grid, picked, self.processes.share(prompts), self.processes.share(seeds)))
        flat, rate = self.processes.mean(gradients(weights)), s.lr * (1 - step / s.updates)
        norm, _ = self.learner.update(weights, flat, loss, lr=rate, clip=s.clip, ema=s.ema)
        row = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": rate, "terms": {"segment error": loss}}
        return row | {"seconds": time.perf_counter() - began, "skipped": self.learner.skipped}

    def _backward(self, grid: Grid, picked: list[tuple[int, int]], prompts: list[str], seeds: list[int]) -> float:
        """Add the gradient of the mean loss over the picked states of these trajectories; returns that loss."""
        chain = self.model.chain(prompts, seeds)
        states = [self.model.noise(seeds), *chain.states(self.model.noise(seeds), walk(grid))]
        losses = []
        for i, end in picked:
            a, b = self.model.solver.process.coefficients(grid[i], grid[end], finish=grid[end] == 0)
            answer = self.student(states[i], grid[i], chain.condition)
            error = SegmentError(states[end], (a, b), self._reach(grid[i], grid[end]))
            call = Call(answer, states[i], Jump(grid[i], grid[end], "student", Grad.WEIGHTS), chain.condition)
            upstream, values = Objective((error,)).of_call(call)
            assert upstream is not None
            half.backward(answer, upstream / (len(picked) * len(prompts)))
            losses.append(float(values[error.name].mean()))
        return sum(losses) / len(losses)

    def _reach(self, start: float, stop: float) -> float:
        """alpha sigma' - alpha' sigma: what a jump multiplies an error of the velocity by, so that all jumps count alike."""
        (alpha, sigma), (alpha2, sigma2) = self.model.solver.process.schedule(start), self.model.solver.process.schedule(stop)
        return abs(alpha * sigma2 - alpha2 * sigma)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a checkpoint needs: tensors, and values for JSON."""
        return self.learner.tensors(), self.learner.state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a saved state. Raises KeyError, TypeError or RuntimeError when it is of another task."""
        self.learner.restore(tensors, state)

    def save(self, folder: Path) -> None:
        """The averaged student in half precision, and what it is written beside it."""
        with self.learner.averaged():
            self.adapter.weights().half().save(folder / "adapter")
        said = {
            "base": self.model.name,
            "steps": self.settings.student_steps,
            "prediction": self.model.solver.process.prediction.value,
        }
        write_text(folder / "adapter" / "student.json", json.dumps(said) + "\n")

    def remove(self) -> None:
        """Give the model back without the student."""
        self.adapter.remove()


def distill(
    model: Model,
    settings: Distillation | None = None,
    *,
    out: str | Path,
    prompts: str | Sequence[str] = "emoji",
    resume: bool = False,
    overwrite: bool = False,
    on_update: Callable[[Row], None] | None = None,
    **options: Any,
) -> Run:
    """Distill a few-step student of `model` and return the run it left behind: `model.with_student(run.folder)`.

    `settings`, or `options` instead of it, are a `chainrule.settings.Distillation`: student_steps (or steps; 4), updates, batch,
    rank, lr, guidance, seed, ... The folder `out` must be new or empty, unless `resume` (continues, bit for bit) or `overwrite`.
    Ctrl-C, SIGTERM and SIGHUP save what is there and return. The run says how faithful the student is: `shortcut.md`,
    `shortcut.png` (see `chainrule.analyze`). Raises UserError for bad input before anything is written.
    """
    guidance, options = value_among(options)
    settings, said = chosen(Distillation, settings, options), read_prompts(prompts)
    model = model.guided(guidance or settings.guidance)
    recorded = settings.model_copy(update={"guidance": model.guidance_spec})
    if getattr(model.network, "peft_config", None):
        raise UserError("distill needs the model without adapters; load it again")
    if model.solver.stochastic:
        name = model.sampler.name
        raise UserError(f"a student follows its model's trajectories, and {name} draws noise on the way; take the solver ddim")
    source = prompts if isinstance(prompts, str) else tuple(said)
    config = DistillConfig(model=model.name, opening=Opening(**model.opening), prompts=source, settings=recorded)
    processes = Processes.here(model.device, settings.timeout)
    processes.check_batch(settings.batch)
    with open_run(out, config, processes, resume=resume, overwrite=overwrite) as run:
        known = model.embedded(said) if len(said) <= settings.updates * settings.batch else model
        task = DistillTask.start(known, said, settings, processes)
        try:
            reason = complete(
                task, run, listeners=told(on_update), save_every=settings.save_every, resume=resume, processes=processes
            )
            if processes.main:
                card.write(run, card.Base.of(model))
            if reason == "finished" and (processes.main or is_sharded(model.network)):
                shown = said[:: max(1, len(said) // 6)][:6]
                taught = model.with_member("student", task.student)
                with task.learner.averaged():
                    found = shortcut(taught, shown, student_steps=settings.student_steps)
                if processes.main:
                    save(found, run.folder)
        finally:
            task.remove()
    return run
