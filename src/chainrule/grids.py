"""What a run shows while it trains: pictures of the same prompts and seeds, and the held-out reward on them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from chainrule.errors import Note
from chainrule.files import make_folder, write_picture
from chainrule.loop import Listener, Row
from chainrule.pictures import pictures
from chainrule.report import before_after, cells, grid
from chainrule.rewards import Reward
from chainrule.runs import Run, rounded
from chainrule.training import FinetuneTask

COLUMNS = 4


@dataclass(slots=True)
class SampleGrids:
    """Grids in the run's `samples`: before, every so many updates, and after. Every process makes its share of the images.

    With a held-out reward `best` gets the adapter of the best grid, and the run stops after `settings.patience` grids
    without a better one.
    """

    run: Run
    task: FinetuneTask
    prompts: Sequence[str]
    held_out: Reward | None
    seen: list[float] = field(default_factory=list)  # held-out rewards, as the rows of the metrics have them

    @property
    def listener(self) -> Listener:
        """What the loop tells of its updates."""
        return Listener(started=self.before, updated=self.during, finished=self.after)

    @property
    def stale(self) -> int:
        """Grids since the best held-out reward."""
        return len(self.seen) - 1 - self.seen.index(max(self.seen)) if self.seen else 0

    def before(self) -> None:
        """The grid before the first update; a run that is resumed has it, and the held-out rewards in its rows."""
        rows = [row["held_out"] for row in self.run.metrics() if "held_out" in row]
        self.seen = [value for value in rows if value is not None]
        done, every = min(self.task.step, self.task.total - 1), self.task.settings.sample_every
        if self.held_out and every and len(rows) < done // every:
            place = self.run.folder / "metrics.jsonl"
            warnings.warn(Note(f"{place} has lost held-out rewards; the best adapter is chosen without them"), stacklevel=2)
        if not self.task.step:
            self._save(self._images(), "before")

    def during(self, row: Row) -> str | None:
        """Make a grid every few updates."""
        s, step = self.task.settings, row["step"]
        if not s.sample_every or step % s.sample_every or step >= s.updates:
            return None
        images = self._images()
        self._save(images, f"step-{step:06d}")
        if not self.held_out:
            return None
        with torch.no_grad():
            row["held_out"] = rounded(float(self.held_out(images.to(self.task.model.device), self.prompts).mean()))
        if row["held_out"] is None:  # not finite
            return None
        self.seen.append(row["held_out"])
        if self.stale == 0 and self.task.processes.main:
            self.task.save_adapter(self.run.folder / "best")
        return "held-out reward stopped rising" if s.patience and self.stale >= s.patience else None

    def after(self, reason: str) -> None:
        """Make the last grids."""
        if reason == "interrupted":
            return
        images = self._images()
        self._save(images, "after")
        place, after = self.run.samples / "before.png", pictures(images)
        if not self.task.processes.main:
            return
        try:
            with Image.open(place) as sheet:
                before = cells(sheet, after, COLUMNS, captioned=True)
        except (OSError, SyntaxError, ValueError) as error:
            warnings.warn(Note(f"{place} cannot be read ({error}), so there is no before_after.png"), stacklevel=2)
        else:
            write_picture(self.run.samples / "before_after.png", before_after(before, after, self.prompts))

    def _images(self) -> Tensor:
        s, task = self.task.settings, self.task
        seeds, batch = range(len(self.prompts)), s.micro_batch or 8
        return task.model.render(self.prompts, seeds, s.sample_steps, batch=batch, processes=task.processes)

    def _save(self, images: Tensor, name: str) -> None:
        if self.task.processes.main:
            make_folder(self.run.samples)
            write_picture(self.run.samples / f"{name}.png", grid(pictures(images), COLUMNS, self.prompts))
