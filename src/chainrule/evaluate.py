"""Compares models on the same prompts and seeds: rewards with 95% intervals, and diversity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule import display
from chainrule.asked import numbers
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.files import write_text
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.processes import ALONE, Processes
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import AnyReward, as_rewards, checked


class Renderer(Protocol):
    """What makes images of prompts: a model, or one that chooses among its images or changes its prompts (`baselines`)."""

    @property
    def device(self) -> torch.device: ...

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = ..., processes: Processes = ALONE,
    ) -> Tensor:  # fmt: skip
        """Images of these pairs, (b, 3, h, w) in [0, 1] on the CPU, on every process."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """A comparison: rows are models, columns are rewards and diversity. Gains are over the first row, paired by prompt.

    `values` are the means over seeds, one for each prompt, of every row and column.
    """

    prompts: list[str]
    rows: dict[str, dict[str, Estimate]]
    gains: dict[str, dict[str, Estimate]]
    values: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Sequence[str], values: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
        """From one number for each prompt, for every row and column."""
        first = next(iter(values.values()))
        rows = {name: {c: Estimate.of(v) for c, v in columns.items()} for name, columns in values.items()}
        gains = {
            name: {c: Estimate.of([b - a for a, b in zip(first[c], v, strict=True)]) for c, v in columns.items()}
            for name, columns in list(values.items())[1:]
        }
        return cls(list(prompts), rows, gains, values)

    def by_group(self, groups: Sequence[str]) -> dict[str, Table]:
        """A table for each group of prompts, in the order in which they come first. `groups` has one for each prompt."""
        found = {}
        for group in dict.fromkeys(groups):
            at = [i for i, other in enumerate(groups) if other == group]
            values = {name: {c: [v[i] for i in at] for c, v in columns.items()} for name, columns in self.values.items()}
            found[group] = Table.of([self.prompts[i] for i in at], values)
        return found

    def grouped(self, groups: Sequence[str]) -> str:
        """For every reward the rows' means by group and over all prompts, as HPSv2's are printed (arXiv:2309.17400, Table 2)."""
        by, texts = self.by_group(groups), []
        for column in next(iter(self.rows.values())):
            lines = [[column, *by, "all"]]
            lines += [
                [name, *(str(t.rows[name][column]) for t in by.values()), str(row[column])] for name, row in self.rows.items()
            ]
            texts.append(aligned(lines))
        return "\n\n".join(texts)

    def __repr__(self) -> str:
        return aligned(self._lines())

    def _repr_html_(self) -> str:
        """In a notebook."""
        return display.table(self._lines())

    def _lines(self) -> list[list[str]]:
        columns = list(next(iter(self.rows.values())))
        lines = [["model", *columns]]
        lines += [[name, *(str(row[c]) for c in columns)] for name, row in self.rows.items()]
        return lines + [[f"  gain of {name}", *(str(gain[c]) for c in columns)] for name, gain in self.gains.items()]

    def save(self, path: str | Path, groups: Sequence[str] = ()) -> Path:
        """Write the table as JSON, which the report reads. An infinite interval becomes null, as JSON has no infinity.

        With `groups`, one for each prompt, it also has the rows of every group.
        """

        def finite(row: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
            return {n: {k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for n, e in row.items()}

        rows = [{"name": name, "metrics": finite(row)} for name, row in self.rows.items()]
        last = finite(list(self.gains.values())[-1]) if self.gains else {}
        told: dict[str, object] = {"prompts": self.prompts, "rows": rows, "gains": last}
        if groups:
            told["groups"] = {
                group: [{"name": name, "metrics": finite(row)} for name, row in table.rows.items()]
                for group, table in self.by_group(groups).items()
            }
        write_text(path, json.dumps(told, indent=2) + "\n")
        return Path(path)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def diversity(images: Tensor) -> float:
    """The mean distance between the images of one prompt, (seeds, 3, h, w): root mean square over 16x16 averaged pixels.

    It is 0 when all seeds give the same picture. Raises UserError for a single image.
    """
    if len(images) < 2:
        raise UserError("diversity needs at least two seeds per prompt")
    small = F.adaptive_avg_pool2d(images.float(), 16).flatten(1)
    distances = torch.pdist(small) / small.shape[1] ** 0.5
    return float(distances.mean())


@torch.no_grad()
def evaluate(
    models: Model | Mapping[str, Renderer],
    prompts: str | Sequence[str],
    rewards: AnyReward | Sequence[AnyReward],
    *,
    seeds: int | Sequence[int] = range(4),
    steps: int | None = None,
    guidance: AnyGuidance = None,
    batch: int = 16,
    on_call: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> Table:
    """Score every model on every prompt with every seed, and compare the others with the first model.

    Each of several `processes` makes and scores a share of the images and returns the whole table.

    Intervals are over prompts, after the seeds of one prompt are averaged. So they cover other prompts of the same kind.
    Raises UserError for no model, prompt, seed or reward, two rewards of one name, and a reward that does not return one float
    per image.
    """
    prompts, seeds, chosen = read_prompts(prompts), numbers(seeds), as_rewards(rewards)
    models = {models.name: models} if isinstance(models, Model) else models
    if not models or not seeds or not chosen:
        raise UserError("evaluate needs at least one model, one seed and one reward")
    names = ["diversity", *(reward.name for reward in chosen)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two columns of the table would be called {twice!r}; rename one with reward_of(fn, name=...)")
    repeated = [prompt for prompt in prompts for _ in seeds]
    per_prompt: dict[str, dict[str, list[float]]] = {}
    for name, model in models.items():
        images = model.render(repeated, seeds * len(prompts), steps, guidance, batch, on_call, processes)
        columns: dict[str, list[float]] = {}
        for reward in chosen:
            reward.to(model.device)
            mine, values = processes.share(range(len(repeated))), []
            for i in range(0, len(mine), batch):
                some = mine[i : i + batch]
                values += checked(reward, images[some].to(model.device), [repeated[k] for k in some]).float().tolist()
            columns[reward.name] = torch.tensor(processes.gather(values)).view(len(prompts), len(seeds)).mean(1).tolist()
        if len(seeds) > 1:
            columns["diversity"] = [diversity(same) for same in images.split(len(seeds))]
        per_prompt[name] = columns
    return Table.of(prompts, per_prompt)
