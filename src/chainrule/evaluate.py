"""Compares models on the same prompts and seeds: rewards with 95% intervals, and diversity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from chainrule import display
from chainrule.appearance import apart
from chainrule.asked import numbers
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.files import write_text
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.processes import ALONE, Processes, Round
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import AnyReward, Reward, as_rewards, checked
from chainrule.scores import Score, Scores
from chainrule.shards import is_sharded


class Renderer(Protocol):
    """What makes images of prompts: a model, or one that chooses among its images or changes its prompts (`baselines`)."""

    @property
    def device(self) -> torch.device: ...

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = ...,
    ) -> Tensor:  # fmt: skip
        """Images of these pairs, (b, 3, h, w) in [0, 1] on the CPU."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class Table:
    """A comparison: rows are models, columns are rewards and diversity. Gains are over the first row, paired by prompt.

    `values` are the means over seeds, one for each prompt, of every row and column. `images` has every image's own scores: for
    diversity, its mean distance to the prompt's other images.
    """

    prompts: list[str]
    rows: dict[str, dict[str, Estimate]]
    gains: dict[str, dict[str, Estimate]]
    values: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    images: Sequence[Score] = ()

    @classmethod
    def of(
        cls, prompts: Sequence[str], values: Mapping[str, Mapping[str, Sequence[float]]], images: Sequence[Score] = ()
    ) -> Table:  # fmt: skip
        """From one number for each prompt, for every row and column."""
        first = next(iter(values.values()))
        rows = {name: {c: Estimate.of(v) for c, v in columns.items()} for name, columns in values.items()}
        gains = {
            name: {c: Estimate.of([b - a for a, b in zip(first[c], v, strict=True)]) for c, v in columns.items()}
            for name, columns in list(values.items())[1:]
        }
        return cls(list(prompts), rows, gains, values, images)

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

    def save(self, path: str | Path, groups: Sequence[str] = (), made: Mapping[str, object] = MappingProxyType({})) -> Path:
        """Write the table as JSON, which the report reads. An infinite interval becomes null, as JSON has no infinity.

        With `groups`, one for each prompt, it also has the rows of every group; `made` may say how each row's images were made.
        """

        def finite(row: dict[str, Estimate]) -> dict[str, dict[str, float | None]]:
            return {n: {k: v if math.isfinite(v) else None for k, v in asdict(e).items()} for n, e in row.items()}

        rows = [{"name": name, "metrics": finite(row)} for name, row in self.rows.items()]
        gains = [{"name": name, "metrics": finite(row)} for name, row in self.gains.items()]
        last = gains[-1]["metrics"] if gains else {}
        told: dict[str, object] = {"prompts": self.prompts, "rows": rows, "gains": last, "gains of rows": gains}
        if made:
            told["made"] = dict(made)
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


def distances(images: Tensor) -> Tensor:
    """Each image's mean distance to the others, (n,), of (n, 3, h, w). Raises UserError for a single image."""
    if len(images) < 2:
        raise UserError("diversity needs at least two seeds per prompt")
    return apart(images)


def diversity(images: Tensor) -> float:
    """The mean distance between the images of one prompt, (seeds, 3, h, w). See `distances`."""
    return float(distances(images).mean())


def shares(prompts: int, seeds: int, batch: int = 16, processes: Processes = ALONE, done: Container[int] = ()) -> list[int]:
    """How many images of a row this process makes at a time, for a progress bar; the prompts that are `done` are left out."""
    return [len(each.own) * seeds for each in _shares(prompts, seeds, batch, processes, done)]


def _shares(prompts: int, seeds: int, batch: int, processes: Processes, done: Container[int]) -> Iterator[Round]:
    """The prompts whose images are made at a time: diversity needs all images of one together."""
    return processes.rounds(prompts, max(1, batch // seeds), done)


def _sharded(maker: object) -> bool:
    """Whether every process has to make the same calls: of a model, or of what has one as its `model`."""
    return is_sharded(maker.network) if isinstance(maker, Model) else hasattr(maker, "model") and _sharded(maker.model)


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
    scores: Scores | None = None,
) -> Table:
    """Score every model on every prompt with every seed, and compare the others with the first model.

    `seeds` are those of each prompt's images: range(4) makes four, and 4 one image with that seed, of which there is no diversity.
    A batch of images, or those of one prompt, is in memory at a time. Each of several `processes` makes and scores a share of
    the prompts and returns the whole table. With `scores` every image's are saved as it is made, and those that are there are
    taken from there.

    Intervals are over prompts, after the seeds of one prompt are averaged. So they cover other prompts of the same kind.
    Raises UserError for no model, prompt, seed or reward, two rewards of one name, and a reward that does not return one float
    per image.
    """
    prompts, seeds, chosen = read_prompts(prompts), numbers(seeds), as_rewards(rewards)
    models = _by_name(models)
    columns = columns_of(chosen, len(seeds))
    if not models or not seeds or not chosen or batch < 1:
        raise UserError("evaluate needs at least one model, one seed, one reward, and a batch of one")
    if scores:
        processes.main_does(scores.begin)
    per_prompt: dict[str, dict[str, list[float]]] = {}
    every: list[Score] = []
    for name, model in models.items():
        found = processes.of_main(scores.there(name, prompts, seeds, columns) if scores and processes.main else {})
        for reward in chosen:
            reward.to(model.device)
        for each in _shares(len(prompts), len(seeds), batch, processes, found):
            images, said = _rendered(model, prompts, seeds, each, steps, guidance, batch, on_call)
            mine = [] if images is None else _scored(name, images, said, seeds, chosen, batch, model.device)
            made = processes.gather([list(zip(each.own, mine, strict=True))])
            found |= {k: same for share in made for k, same in share}
            if scores and processes.main:
                scores.extend([one for share in made for _, same in share for one in same], seeds)
        own = [found[k] for k in range(len(prompts))]
        per_prompt[name] = {c: torch.tensor([[each.values[c] for each in same] for same in own]).mean(1).tolist() for c in columns}
        every += [each for same in own for each in same]
    if scores:
        processes.main_does(lambda: scores.finish(every, seeds))
    return Table.of(prompts, per_prompt, every)


def _by_name(models: object) -> Mapping[str, Renderer]:
    """The models by the names of their rows. Raises UserError for anything but a model, or things that make images by name."""
    found = {models.name: models} if isinstance(models, Model) else models
    if not isinstance(found, Mapping):
        raise UserError(f"models is {type(found).__name__}; give a model, or several by name, as {{'base': model, 'mine': other}}")
    if bad := next((name for name, maker in found.items() if not hasattr(maker, "render")), None):
        raise UserError(f"the model {bad!r} is {found[bad]!r}, which makes no images; give model.using(a run or adapter)")
    return found


def _rendered(
    model: Renderer, prompts: Sequence[str], seeds: list[int], each: Round, steps: int | None, guidance: AnyGuidance, batch: int,
    on_call: Callable[[], None],
) -> tuple[Tensor | None, list[str]]:  # fmt: skip
    """The images of a round's own prompts, None where there are none, and the prompt of each image.

    Where all processes make the same calls one with fewer prompts adds others, whose images do not count.
    """
    added = range(each.most - len(each.own) if _sharded(model) else 0)
    said = [prompts[k] for k in (*each.own, *added) for _ in seeds]
    images = model.render(said, seeds * (len(said) // len(seeds)), steps, guidance, batch, on_call) if said else None
    own = len(each.own) * len(seeds)
    return (None if images is None or not own else images[:own]), said[:own]


def columns_of(rewards: Sequence[Reward], seeds: int) -> list[str]:
    """The columns of a table: the rewards, and diversity where there are several seeds. Raises UserError for two of one name."""
    names = [*(reward.name for reward in rewards), "diversity"]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two columns of the table would be called {twice!r}; rename one with reward_of(fn, name=...)")
    return names if seeds > 1 else names[:-1]


def _scored(
    row: str, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], rewards: Sequence[Reward], batch: int,
    device: torch.device,
) -> list[list[Score]]:  # fmt: skip
    """The scores of some prompts' images, (prompts x seeds, 3, h, w): a list for each prompt, of one for each seed."""
    columns: dict[str, list[float]] = {reward.name: [] for reward in rewards}
    for reward in rewards:
        for i in range(0, len(images), batch):
            some = images[i : i + batch].to(device)
            columns[reward.name] += checked(reward, some, prompts[i : i + batch]).float().tolist()
    if len(seeds) > 1:
        columns["diversity"] = torch.cat([distances(same) for same in images.split(len(seeds))]).tolist()
    each = [Score(row, prompts[k], seeds[k % len(seeds)], {c: v[k] for c, v in columns.items()}) for k in range(len(images))]
    return [each[i : i + len(seeds)] for i in range(0, len(each), len(seeds))]
