"""What a run shows while it trains: pictures of the same prompts and seeds, and the held-out reward on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from chainrule.loop import Listener, Row
from chainrule.models import Model
from chainrule.models.pictures import pictures
from chainrule.processes import ALONE, Processes
from chainrule.report import before_after, grid
from chainrule.rewards import Reward
from chainrule.runs import Run
from chainrule.settings import Finetuning


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
    seen: list[float] = field(default_factory=list)  # held-out rewards
    first: Tensor | None = None  # the images before the first update

    @property
    def listener(self) -> Listener:
        """What the loop tells of its updates."""
        return Listener(started=self.before, updated=self.during, finished=self.after)

    @property
    def stale(self) -> int:
        """Grids since the best held-out reward."""
        return len(self.seen) - 1 - self.seen.index(max(self.seen)) if self.seen else 0

    def before(self) -> None:
        """The grid before the first update, once for a run that is resumed; its held-out rewards are those of its rows."""
        self.seen = [row["held_out"] for row in self.run.metrics() if row.get("held_out") is not None]
        if not (self.run.samples / "before.png").exists():
            self.first = self._images()
            self._save(self.first, "before")

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
            row["held_out"] = float(self.held_out(images.to(self.model.device), self.prompts).mean())
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
        if self.first is not None and self.processes.main:
            shown = before_after(pictures(self.first), pictures(images), self.prompts)
            shown.save(self.run.samples / "before_after.png")

    def _images(self) -> Tensor:
        s = self.settings
        batch = s.micro_batch or 8
        return self.model.render(self.prompts, range(len(self.prompts)), s.sample_steps, batch=batch, processes=self.processes)

    def _save(self, images: Tensor, name: str) -> None:
        if self.processes.main:
            self.run.samples.mkdir(exist_ok=True)
            grid(pictures(images), 4, self.prompts).save(self.run.samples / f"{name}.png")
