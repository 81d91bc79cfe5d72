"""What a run shows while it trains: pictures of the same prompts and seeds, and what is measured on them."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from chainrule.appearance import STATISTICS
from chainrule.errors import Note
from chainrule.files import make_folder, write_picture
from chainrule.loop import Listener, Row
from chainrule.noise import derive, drawing
from chainrule.pictures import pictures
from chainrule.report import before_after, cells, grid
from chainrule.report.guard import alarm
from chainrule.report.watched import watched_of
from chainrule.rewards import Reward, checked
from chainrule.rows import rounded
from chainrule.runs import Run
from chainrule.training import FinetuneTask

COLUMNS = 4
SOUND = "sound"  # of `Finetuning.best`: the trained reward, while the report raises no alarm
WORDS = {"held_out": "held-out reward", SOUND: "sound reward"}
Values = dict[str, list[float]]


@dataclass(slots=True)
class SampleGrids:
    """Grids in the run's `samples`: before, every so many updates, and after. Every process makes its share of the images.

    What is measured on the images of each goes into `watched.jsonl`. `best` gets the adapter of the best grid by what
    `settings.best` names, and the run stops after `settings.patience` grids without a better one. `unseen` are prompts that it does
    not train on: they are shown and measured before and after.
    """

    run: Run
    task: FinetuneTask
    prompts: Sequence[str]
    held_out: Reward | None
    unseen: Sequence[str] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)  # of `watched.jsonl`

    @property
    def listener(self) -> Listener:
        """What the loop tells of its updates."""
        return Listener(started=self.before, updated=self.during, finished=self.after)

    @property
    def followed(self) -> list[float]:
        """What `best` follows, of every grid after the first update; minus infinity where there is no number, or an alarm."""
        name = self.task.settings.best
        raised = alarm(watched_of(self.rows)[0]) if name == SOUND else None
        found = []
        for row in self.rows:
            values = row["values"].get("reward" if name == SOUND else name, [])
            known: list[Any] = values[: len(values) - row["extra"]] or [None]
            lost = None in known or (raised is not None and row["step"] >= raised.step)
            found += [-math.inf if lost else statistics.fmean(known)] if row["step"] else []
        return found

    def before(self) -> None:
        """The grid before the first update; a run that is resumed has it, and what was measured on the others."""
        self.rows = self.run.watched()
        done, every = min(self.task.step, self.task.total - 1), self.task.settings.sample_every
        if every and len(self.rows) < 1 + done // every and self.task.step:
            place = self.run.folder / "watched.jsonl"
            warnings.warn(Note(f"{place} has lost rows; the best adapter is chosen without them"), stacklevel=2)
        if not self.task.step:
            images, unseen = self._images(self.prompts), self._images(self.unseen)
            self._save(images, "before")
            self._save(unseen, "unseen-before")
            self._watch(images, unseen)

    def during(self, row: Row) -> str | None:
        """Make a grid every few updates."""
        s, step = self.task.settings, row["step"]
        if not s.sample_every or step % s.sample_every or step >= s.updates:
            return None
        images = self._images(self.prompts)
        self._save(images, f"step-{step:06d}")
        if found := self._watch(images).get("held_out"):
            row["held_out"] = rounded(statistics.fmean(found))
        stale = self._keep_best()
        return f"{WORDS.get(s.best, s.best)} stopped rising" if s.patience and stale >= s.patience else None

    def _keep_best(self) -> int:
        """Save the adapter where no grid before was as good; how many grids ago the best one was."""
        *earlier, last = self.followed
        if last <= max(earlier, default=-math.inf):
            return len(earlier) - earlier.index(max(earlier)) if earlier else 0
        if self.task.processes.main:
            self.task.save_adapter(self.run.folder / "best")
        return 0

    def after(self, reason: str) -> None:
        """Make the last grids."""
        if reason == "interrupted":
            return
        images, unseen = self._images(self.prompts), self._images(self.unseen)
        self._save(images, "after")
        self._watch(images, unseen)
        if self.task.settings.sample_every and self.task.step:
            self._keep_best()
        self._pair("before", images, "before_after")
        self._pair("unseen-before", unseen, "unseen")

    def _pair(self, name: str, images: Tensor, both: str) -> None:
        """The picture `both` of a sheet that is there and these images."""
        place, after = self.run.samples / f"{name}.png", pictures(images)
        if not len(images) or not self.task.processes.main:
            return
        try:
            with Image.open(place) as sheet:
                before = cells(sheet, after, COLUMNS, captioned=True)
        except (OSError, SyntaxError, ValueError) as error:
            warnings.warn(Note(f"{place} cannot be read ({error}), so there is no {both}.png"), stacklevel=2)
        else:
            write_picture(self.run.samples / f"{both}.png", before_after(before, after, self._prompts(name)))

    def _watch(self, images: Tensor, unseen: Tensor | None = None) -> Values:
        """Measure the images, write it down, and return it for the watched prompts."""
        found, prompts = self._measured(images, self.prompts), [*self.prompts]
        if unseen is None or not len(unseen):
            values, more = found, 0
        else:
            others, more = self._measured(unseen, self.unseen), len(unseen)
            values = {name: [*found[name], *others[name]] for name in found}
            prompts += self.unseen
        trained = set(self.task.prompts)
        row = {"step": self.task.step, "prompts": prompts, "trained": [prompt in trained for prompt in prompts], "extra": more}
        self.rows = [*(other for other in self.rows if other["step"] < self.task.step), rounded({**row, "values": values})]
        if self.task.processes.main:
            self.run.watch(self.rows[-1])
        return found

    @torch.no_grad()
    def _measured(self, images: Tensor, prompts: Sequence[str]) -> Values:
        """The trained reward, the held-out one and what the images look like, a number for each image."""
        task, batch = self.task, self.task.settings.micro_batch or 8
        rewards = {"reward": task.raised, **({"held_out": self.held_out} if self.held_out else {})}
        found: Values = {name: [] for name in rewards}
        with drawing(derive(task.seed, "watched", task.step)):
            for name, reward in rewards.items():
                for i in range(0, len(images), batch):
                    some = images[i : i + batch].to(task.model.device)
                    found[name] += checked(reward, some, prompts[i : i + batch]).float().tolist()
        sound = images.clamp(0, 1).nan_to_num(0)
        return found | {name: measure(sound).tolist() for name, measure in STATISTICS.items()}

    def _images(self, prompts: Sequence[str]) -> Tensor:
        """An image for each of the prompts, by what is saved: the averaged adapter. The seeds are 0, 1, 2, ..."""
        s, task = self.task.settings, self.task
        if not prompts:
            return torch.zeros(0, 3, *task.model.size)
        with task.learner.averaged():
            return task.model.render(
                prompts, range(len(prompts)), s.sample_steps, batch=s.micro_batch or 8, processes=task.processes
            )

    def _save(self, images: Tensor, name: str) -> None:
        if len(images) and self.task.processes.main:
            make_folder(self.run.samples)
            write_picture(self.run.samples / f"{name}.png", grid(pictures(images), COLUMNS, self._prompts(name)))

    def _prompts(self, name: str) -> Sequence[str]:
        """The prompts of a sheet."""
        return self.unseen if name.startswith("unseen") else self.prompts
