"""Compares models on the same prompts and seeds: rewards with 95% intervals, and diversity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.asked import numbers
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.files import write_text
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.processes import ALONE, Processes
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import AnyReward, as_rewards, checked


@dataclass(frozen=True, slots=True)
class Table:
    """A comparison: rows are models, columns are rewards and diversity. Gains are over the first row, paired by prompt."""

    prompts: list[str]
    rows: dict[str, dict[str, Estimate]]
    gains: dict[str, dict[str, Estimate]]

    def __str__(self) -> str:
        columns = list(next(iter(self.rows.values())))
        lines = [["model", *columns]]
        lines += [[name, *(str(row[c]) for c in columns)] for name, row in self.rows.items()]
        lines += [[f"  gain of {name}", *(str(gain[c]) for c in columns)] for name, gain in self.gains.items()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON, which the report reads. An infinite interval becomes null, as JSON has no infinity."""

        def finite(row: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
            return {n: {k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for n, e in row.items()}

        rows = [{"name": name, "metrics": finite(row)} for name, row in self.rows.items()]
        last = finite(list(self.gains.values())[-1]) if self.gains else {}
        write_text(path, json.dumps({"prompts": self.prompts, "rows": rows, "gains": last}, indent=2) + "\n")
        return Path(path)


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
    models: Model | Mapping[str, Model],
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
    first = next(iter(per_prompt.values()))
    rows = {name: {c: Estimate.of(v) for c, v in columns.items()} for name, columns in per_prompt.items()}
    gains = {
        name: {c: Estimate.of([b - a for a, b in zip(first[c], v, strict=True)]) for c, v in columns.items()}
        for name, columns in list(per_prompt.items())[1:]
    }
    return Table(list(prompts), rows, gains)
