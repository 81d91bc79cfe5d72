"""What a run shows while it trains: pictures of the same prompts and seeds, and the held-out reward on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from chainrule.files import make_folder, write_picture
from chainrule.loop import Listener, Row
from chainrule.models import Model
from chainrule.models.pictures import pictures
from chainrule.processes import ALONE, Processes
from chainrule.report import before_after, cells, grid
from chainrule.rewards import Reward
from chainrule.runs import Run, rounded
from chainrule.settings import Finetuning

COLUMNS = 4


@dataclass(slots=True)
class SampleGrids:
    """Grids in the run's `samples`: before, every so many updates, and after. Every process makes its share of the images.

    With a held-out reward `best` gets the adapter of the best grid by `keep_best`, and the run stops after
    `settings.patience` grids without a better one.
    """

    run: Run
    model: Model
    prompts: Sequence[str]
    settings: Finetuning
    held_out: Reward | None
    keep_best: Callable[[Path], None]
    processes: Processes = ALONE
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
        rows = self.run.metrics()
        self.seen = [row["held_out"] for row in rows if row.get("held_out") is not None]
        if not rows:
            self._save(self._images(), "before")

    def during(self, row: Row) -> str | None:
        """Make a grid every few updates."""
        s, step = self.settings, row["step"]
        if not s.sample_every or step % s.sample_every or step >= s.updates:
            return None
        images = self._images()
        self._save(images, f"step-{step:06d}")
        if not self.held_out:
            return None
        with torch.no_grad():
            row["held_out"] = rounded(float(self.held_out(images.to(self.model.device), self.prompts).mean()))
        if row["held_out"] is None:  # not finite
            return None
        self.seen.append(row["held_out"])
        if self.stale == 0 and self.processes.main:
            self.keep_best(self.run.folder / "best")
        return "held-out reward stopped rising" if s.patience and self.stale >= s.patience else None

    def after(self, reason: str) -> None:
        """Make the last grids."""
        if reason == "interrupted":
            return
        images = self._images()
        self._save(images, "after")
        before = self.run.samples / "before.png"
        if self.processes.main and before.exists():
            after = pictures(images)
            with Image.open(before) as sheet:
                shown = before_after(cells(sheet, after, COLUMNS, captioned=True), after, self.prompts)
            write_picture(self.run.samples / "before_after.png", shown)

    def _images(self) -> Tensor:
        s = self.settings
        batch = s.micro_batch or 8
        return self.model.render(self.prompts, range(len(self.prompts)), s.sample_steps, batch=batch, processes=self.processes)

    def _save(self, images: Tensor, name: str) -> None:
        if self.processes.main:
            make_folder(self.run.samples)
            write_picture(self.run.samples / f"{name}.png", grid(pictures(images), COLUMNS, self.prompts))
