"""A training session around the trainer: the run folder, checkpoints, sample grids, the progress bar, stopping."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chainrule.errors import UserError
from chainrule.learner import Learner
from chainrule.models.model import pictures
from chainrule.noise import derive
from chainrule.report import before_after, grid, report
from chainrule.rewards import Reward
from chainrule.runs import Run
from chainrule.trainer import Trainer

BAD_IN_A_ROW = 8  # updates that may be skipped for NaN or Inf in a row before a session gives up
KEPT = 2  # checkpoints


def save_checkpoint(run: Run, learner: Learner) -> None:
    """Write `checkpoints/step-000123`; `state.json` comes last, so a folder that has it is complete."""
    folder = run.checkpoint(learner.progress.step)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in learner.tensors().items()}, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(learner.state))
    for old in run.checkpoints()[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(run: Run, learner: Learner) -> None:
    """Continue from the last complete checkpoint. UserError when it is damaged or of another adapter."""
    found = run.checkpoints()
    if not found:
        return
    try:
        tensors = load_file(found[-1] / "state.safetensors")
        learner.restore(tensors, json.loads((found[-1] / "state.json").read_text()))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"the checkpoint {found[-1]} is damaged ({error}); delete that folder to resume from the one before"
        ) from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the checkpoint {found[-1]} belongs to another adapter or version; start a new run") from error


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the update under way; a second one stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: Ctrl-C is somebody else's business
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar(what: str, quiet: bool = False) -> Progress:
    """A bar on stderr with the updates, a value (the reward, the loss), speed, elapsed and remaining time."""
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
        TextColumn(what + " [bold]{task.fields[value]}"), TextColumn("{task.fields[speed]} images/s"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=Console(stderr=True, quiet=quiet),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run shows while it trains: a grid of the same images, and the held-out reward on them."""

    prompts: list[str]
    seeds: list[int]
    held_out: Reward | None = None
    seen: list[float] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """Looks since the best held-out reward."""
        return len(self.seen) - 1 - self.seen.index(max(self.seen)) if self.seen else 0

    def look(self, trainer: Trainer) -> tuple[Tensor, float | None]:
        s = trainer.settings
        images = trainer.model.render(self.prompts, self.seeds, s.sample_steps, s.guidance, s.micro_batch or 8)
        if not self.held_out:
            return images, None
        with torch.no_grad():
            return images, float(self.held_out(images.to(trainer.model.device), self.prompts).mean())


@dataclass(slots=True)
class Session:
    """One call of `finetune`, over a run folder."""

    run: Run
    stop_reason: str = "finished"

    def train(self, trainer: Trainer, watch: Watch, resume: bool, on_update: Callable[[dict[str, Any]], None] | None) -> Run:
        """Update until `steps`, Ctrl-C, the held-out reward stops rising, or too many bad updates."""
        run, s, main = self.run, trainer.settings, trainer.accelerator.is_main_process
        if resume:
            load_checkpoint(run, trainer.learner)
            run.truncate(trainer.step)
        if s.tracker != "none":
            trainer.accelerator.init_trackers("chainrule", {k: str(v) for k, v in run.config.values().items()})
        if main and not (run.samples / "before.png").exists():
            self._sample(trainer, watch, "before")
            chain = trainer.model.grid(s.sample_steps)
            plans = [stage.plan(chain, Random(derive(s.seed, "plan", i))) for stage in trainer.stages for i in range(3)]
            run.write_text("plan.txt", "\n".join(dict.fromkeys(map(str, plans))) + "\n")
        smooth: float | None = None
        with interrupts() as asked, progress_bar("reward", quiet=not main) as bar:
            task = bar.add_task("update", total=s.updates, completed=trainer.step, value="-", speed="-")
            while trainer.step < s.updates:
                row = trainer.update()
                smooth = row["reward"] if smooth is None else 0.9 * smooth + 0.1 * row["reward"]
                if main:
                    held = self._periodic(trainer, watch)
                    run.log(row | ({"held_out": held} if held is not None else {}))
                trainer.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=trainer.step)
                label = f"stage {row['stage']} of {len(trainer.stages)}" if "stage" in row else "update"
                speed = f"{s.batch / row['seconds']:.1f}"
                bar.update(task, completed=trainer.step, description=label, value=f"{smooth:.4g}", speed=speed)
                if on_update:
                    on_update(row)
                if trainer.bad >= BAD_IN_A_ROW:
                    self.stop_reason = "bad updates"
                elif asked():
                    self.stop_reason = "interrupted"
                elif s.patience and watch.stale >= s.patience:
                    self.stop_reason = "held-out reward stopped rising"
                else:
                    continue
                break
        if main:
            self._finish(trainer, watch)
        trainer.accelerator.end_training()
        if self.stop_reason == "bad updates":
            raise UserError(
                f"{trainer.bad} updates in a row had a NaN or Inf reward or gradient; the last good adapter is in {run.adapter}; "
                "lower lr, or look at the reward"
            )
        return run

    def _periodic(self, trainer: Trainer, watch: Watch) -> float | None:
        s, held = trainer.settings, None
        if s.sample_every and trainer.step % s.sample_every == 0 and trainer.step < s.updates:
            held = self._sample(trainer, watch, f"step-{trainer.step:06d}")
            if held is not None:
                watch.seen.append(held)
                if watch.stale == 0:
                    trainer.save_adapter(self.run.folder / "best")
        if s.save_every and trainer.step % s.save_every == 0:
            save_checkpoint(self.run, trainer.learner)
        return held

    def _sample(self, trainer: Trainer, watch: Watch, name: str) -> float | None:
        images, held = watch.look(trainer)
        self.run.samples.mkdir(exist_ok=True)
        grid(pictures(images), 4, watch.prompts).save(self.run.samples / f"{name}.png")
        if name == "before":
            watch.before.append(images)
        elif name == "after" and watch.before:
            shown = before_after(pictures(watch.before[0]), pictures(images), watch.prompts)
            shown.save(self.run.samples / "before_after.png")
        return held

    def _finish(self, trainer: Trainer, watch: Watch) -> None:
        save_checkpoint(self.run, trainer.learner)
        trainer.save_adapter(self.run.adapter)
        if self.stop_reason != "interrupted":
            self._sample(trainer, watch, "after")
        self.run.write_text("stopped.txt", f"{self.stop_reason} at update {trainer.step}\n")
        report(self.run.folder)
