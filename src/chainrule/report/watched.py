"""What a run measured on the same prompts and seeds while it trained: means over prompts, and changes paired by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chainrule.estimate import Estimate

NAMES = {
    "reward": "Trained reward",
    "held_out": "Held-out reward",
    "diversity": "Diversity",
    "edges": "Edge density",
    "colors": "Color entropy, bits",
    "brightness": "Brightness",
    "saturation": "Saturation",
    "sharpness": "Sharpness",
}
"""What `watched.jsonl` holds, as the page calls it."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Numbers of the same images at several updates: `values[name][grid][prompt]`, NaN where there is none."""

    steps: Sequence[int]
    prompts: Sequence[str]
    values: Mapping[str, Sequence[Sequence[float]]]

    @property
    def names(self) -> list[str]:
        """What was measured at every grid for one prompt at least, in the order in which it was."""
        return [name for name in self.values if self._kept(name)]

    def column(self, name: str, at: int) -> list[float]:
        """The numbers of one grid, of the prompts that have one in all grids."""
        return [self.values[name][at][i] for i in self._kept(name)]

    def change(self, name: str, at: int = -1) -> Estimate:
        """The change since the first grid, with its 95% interval over prompts. Each prompt is compared with itself by one seed."""
        return Estimate.of([b - a for a, b in zip(self.column(name, 0), self.column(name, at), strict=True)])

    def mean(self, name: str, at: int) -> float:
        """The mean over prompts of one grid."""
        column = self.column(name, at)
        return math.fsum(column) / len(column)

    def curve(self, name: str) -> list[tuple[float, float, float]]:
        """(update, mean, half-width of the change's 95% interval) of every grid; the half-width is 0 where it is not known."""
        found = []
        for at, step in enumerate(self.steps):
            half = self.change(name, at).interval
            found.append((float(step), self.mean(name, at), half if math.isfinite(half) else 0.0))
        return found

    def _kept(self, name: str) -> list[int]:
        grids = self.values[name]
        return [i for i in range(len(self.prompts)) if all(math.isfinite(grid[i]) for grid in grids)]


def watched_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Watched | None, Watched | None]:
    """The prompts of every grid, and those that were not trained on, before and after. None where there are none.

    Rows that are of something else are passed over.
    """
    sound = [row for row in rows if _sound(row)]
    if not sound:
        return None, None
    counts = [len(row["prompts"]) - int(row.get("extra", 0)) for row in sound]
    every = _part(sound, range(min(counts)))
    ends = [row for row in sound if len(row["prompts"]) == len(sound[0]["prompts"])]
    unseen = [i for i, trained in enumerate(sound[0].get("trained", ())) if not trained and i < len(sound[0]["prompts"])]
    return every, _part([ends[0], ends[-1]], unseen) if unseen and len(ends) > 1 else None


def _part(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Watched | None:
    names = [name for name in rows[0]["values"] if all(name in row["values"] for row in rows)]
    values = {name: [[_number(row["values"][name][i]) for i in places] for row in rows] for name in names}
    prompts = [str(rows[0]["prompts"][i]) for i in places]
    return Watched(steps=[row["step"] for row in rows], prompts=prompts, values=values) if prompts else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _sound(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a list of numbers for each name, one for each prompt."""
    prompts, values, numbers = row.get("prompts"), row.get("values"), (row.get("step"), row.get("extra", 0))
    if not all(isinstance(each, int) for each in numbers) or not isinstance(prompts, list) or not isinstance(values, dict):
        return False
    return bool(prompts) and all(isinstance(column, list) and len(column) == len(prompts) for column in values.values())
