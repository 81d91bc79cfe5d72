"""Steering as a task of the loop: batch after batch, each until it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chainrule import card
from chainrule.adapters import Adapter, Band, inject, unused_name
from chainrule.adapters.lora import every_layer
from chainrule.chain import Memory
from chainrule.loop import Row
from chainrule.models import Model
from chainrule.processes import ALONE, Processes
from chainrule.rewards import Reward
from chainrule.runs import Run
from chainrule.settings import Steering
from chainrule.steer.found import LISTS, Steered, joined
from chainrule.steer.kinds import WEIGHTS, Over
from chainrule.steer.record import save
from chainrule.steer.search import Batch, Search, updates_of

PICTURES = ("images", "before")


@dataclass(slots=True)
class SteerTask:
    """Everything an update needs. `found` are the finished batches' results, `search` is the batch under way."""

    model: Model
    reward: Reward
    settings: Steering
    over: Over
    batches: Sequence[Batch]
    adapter: Adapter | None = None
    processes: Processes = ALONE
    found: list[Steered] = field(default_factory=list)
    search: Search | None = None
    step: int = 0
    skipped: int = 0
    watched: ClassVar[str] = "reward"

    @classmethod
    def start(
        cls, model: Model, reward: Reward, settings: Steering, over: Over, images: Batch, processes: Processes = ALONE
    ) -> SteerTask:  # fmt: skip
        """Part the images into batches. A variable that is weights is a fresh LoRA; `remove` takes it out again."""
        batches = images.parts(settings.batch)
        if over.kind is not WEIGHTS:
            return cls(model, reward, settings, over, batches, None, processes)
        name, targets = unused_name(model.network, "steered"), every_layer(model.network)
        adapter = inject(model.network, name, rank=settings.rank, targets=targets, component=model.component)
        return cls(replace(model, active={**model.active, name: Band()}), reward, settings, over, batches, adapter, processes)

    @property
    def label(self) -> str:
        """What the progress bar calls the update."""
        return f"batch {min(len(self.found) + 1, len(self.batches))} of {len(self.batches)}" if len(self.batches) > 1 else "steer"

    @property
    def batch(self) -> int:
        """Images per update."""
        return min(self.settings.batch, sum(len(each.prompts) for each in self.batches))

    @property
    def seed(self) -> int:
        """What draws of no seed of their own depend on: the first image's seed."""
        return self.batches[0].seeds[0]

    @property
    def total(self) -> int:
        """Updates over all batches. A batch that stops early takes its own off."""
        left = len(self.batches) - len(self.found)
        under_way = self.search.number if self.search else 0
        return self.step + left * updates_of(self.settings) - under_way

    @torch.no_grad()
    def update(self) -> Row:
        """Make one update and return its row of the log."""
        began = time.perf_counter()
        search = self._searched()
        with self.model.blockwise(Memory(self.settings.memory)):
            seen, norm = search.update()
            finite = math.isfinite(norm) and bool(seen.rewards.mean().isfinite())
            self.step, self.skipped = self.step + 1, self.skipped + (not finite)
            rewards, far, losses = (float(values.mean()) for values in search.numbers(seen))
            if search.done:
                search.finish()
                self.found.append(self._result(search))
                self.search = None
        terms = {name: float(values.mean()) for name, values in seen.terms.items()}
        row: Row = {"step": self.step, "reward": rewards, "loss": losses, "distance": far, "grad_norm": norm}
        return row | {
            "lr": self.settings.lr, "seconds": time.perf_counter() - began, "skipped": self.skipped, "terms": terms,
        }  # fmt: skip

    def _searched(self) -> Search:
        """The batch under way, or the next one."""
        if self.search is None:
            with self.model.blockwise(Memory(self.settings.memory)):
                batch = self.batches[len(self.found)]
                self.search = Search(self.model, self.settings, self.over, self.reward, batch, self.adapter, self.processes)
        return self.search

    def _result(self, search: Search) -> Steered:
        return search.found(self.batches[len(self.found)].prompts)

    @torch.no_grad()
    def result(self) -> Steered:
        """What was found so far, over all batches."""
        return joined([*self.found, *([self._result(self.search)] if self.search else [])])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a checkpoint needs: tensors, and values for JSON."""
        tensors = {
            f"found/{n}/{name}": torch.from_numpy(np.stack([np.asarray(picture) for picture in getattr(each, name)]))
            for n, each in enumerate(self.found)
            for name in PICTURES
        }
        lists = [{name: getattr(each, name) for name in (*LISTS, "curve")} for each in self.found]
        state: dict[str, Any] = {"step": self.step, "skipped": self.skipped, "found": lists, "search": None}
        if self.search:
            tensors |= {f"search/{name}": value for name, value in self.search.tensors().items()}
            state["search"] = {"number": self.search.number, "idle": self.search.idle, "rows": self.search.rows}
        return tensors, state

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a saved state. Raises KeyError, TypeError or RuntimeError when it is of another task."""
        self.found = []
        for n, lists in enumerate(state["found"]):
            images, before = ([Image.fromarray(p.numpy()) for p in tensors[f"found/{n}/{name}"]] for name in PICTURES)
            self.found.append(Steered(**lists, images=images, before=before))
        self.step, self.skipped, self.search = state["step"], state["skipped"], None
        if state["search"]:
            own = {name.removeprefix("search/"): value for name, value in tensors.items() if name.startswith("search/")}
            self._searched().restore(own, state["search"])

    def save(self, folder: Path) -> None:
        """Write the pictures, the curve and a report, and the adapter where weights were steered."""
        found = self.result()
        if found.images:
            save(found, Run(folder))
        if self.adapter:
            self.adapter.save(folder / "adapter")
            card.write(Run(folder), card.Base.of(self.model, self.settings.sample_steps))

    def remove(self) -> None:
        """Give the model back without the adapter."""
        if self.adapter:
            self.adapter.remove()
