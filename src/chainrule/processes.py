"""Several processes that do one thing together: which share of the work is mine, means over all, who writes.

Under `accelerate launch` (or torchrun) every process runs the same lines; what they share out is the images of a batch. The
rule is that N processes give the numbers of one process. Only this file knows accelerate's processes, and where there is
one process nothing of torch.distributed is touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from chainrule.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that run the same program: number `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls, device: torch.device | None = None) -> Self:
        """The processes this program was launched as; one, where it was not launched as several.

        `device` is where the tensors are that will be averaged (default: the GPU if there is one).
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu" if device else not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all have together: every `count`-th item."""
        return list(items[self.index :: self.count])

    def check_batch(self, batch: int, accumulate: int = 1) -> None:
        """Raises UserError for a batch that cannot be shared equally, in `accumulate` parts each."""
        if batch % (self.count * accumulate):
            raise UserError(f"batch is {batch}, but must be divisible by {self.count} processes x accumulate")

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, of the same shape; every process gets it."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        averaged: Tensor = reduce(tensor, "mean")
        return averaged

    def mean_of(self, number: float) -> float:
        """The mean of a number over all processes; every process gets it."""
        return sum(self.gather([number])) / self.count

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The whole list, in order, from every process's `share` of it; every process gets it."""
        if self.count == 1:
            return list(mine)
        from accelerate.utils import gather_object

        shares: list[list[T]] = gather_object([list(mine)])
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def agree(self, mine: str | None) -> str | None:
        """What the first process says that says anything; every process gets it."""
        return next(filter(None, self.gather([mine])), None)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def main_does(self, work: Callable[[], object]) -> None:
        """The main process does this before the others go on. Raises its UserError on every process."""
        failed = None
        if self.main:
            try:
                work()
            except UserError as error:
                failed = str(error)
        if failed := self.agree(failed):
            raise UserError(failed)


ALONE = Processes()


def default_device() -> str:
    """The GPU if there is one, of several processes on one machine each its own; otherwise the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"
