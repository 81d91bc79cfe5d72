"""What every estimator is: it adds the gradient of one update. The plain one follows the reward's gradient along the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from chainrule.gradient import Result, gradient
from chainrule.models import Model
from chainrule.objective import Objective
from chainrule.plan import Plan
from chainrule.processes import ALONE, Processes


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's images of an update, as prompts and seeds, to be gone through in `parts`; what memory may be held."""

    prompts: list[str]
    seeds: list[int]
    parts: int = 1
    memory: str = "recompute"
    micro_batch: int | None = None
    processes: Processes = ALONE

    def split(self) -> Iterator[tuple[list[str], list[int]]]:
        """The prompts and seeds of each part."""
        for part in range(self.parts):
            yield self.prompts[part :: self.parts], self.seeds[part :: self.parts]


class Estimator(Protocol):
    """Adds the gradient of a batch to the trainable leaves, update by update, and may keep something in between."""

    def add(self, model: Model, plan: Plan, objective: Objective, batch: Batch, /) -> list[Result]:
        """Add the gradient of the objective's mean over the batch to `.grad` of the model's leaves. A result for each part."""

    def settle(self, mean: Callable[[Tensor], Tensor], /) -> None:
        """The update is made. What the estimator itself learns is updated now; `mean` averages a tensor over all processes."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs of it: tensors, and what JSON can hold."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any], /) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError when it is of another."""

    def remove(self) -> None:
        """Take out what it has put into networks."""


@dataclass(frozen=True, slots=True)
class Paths:
    """The reward's gradient, along the chain as the plan says."""

    def add(self, model: Model, plan: Plan, objective: Objective, batch: Batch) -> list[Result]:
        """Add the gradient of the objective's mean over the batch to `.grad` of the model's leaves. A result for each part."""
        return [
            gradient(
                model, plan, objective, prompts, seeds, memory=batch.memory, micro_batch=batch.micro_batch, scale=1 / batch.parts
            )
            for prompts, seeds in batch.split()
        ]  # fmt: skip

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Nothing is learned here."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing is kept."""
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Nothing was kept."""

    def remove(self) -> None:
        """Nothing was put in."""
