"""Several processes that do one thing together: which share of the work is mine, means over all, who writes.

Under `accelerate launch` (or torchrun) every process runs the same lines; what they share out is the images of a batch. The
rule is that N processes give the numbers of one process. Only this file knows accelerate's processes, and where there is
one process nothing of torch.distributed is touched.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Self, TypeVar

import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.settings import TIMEOUT

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Round:
    """What one process makes while each makes its own: the numbers of `own` things, and how many the one with the `most` has."""

    own: range
    most: int

    def along(self, together: bool) -> range:
        """The things to go through: its own; without any, where all go `together`, the first ones, which do not count."""
        return self.own or range(self.most if together else 0)


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that run the same program: number `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls, device: torch.device | str | None = None, timeout: float = TIMEOUT) -> Self:
        """The processes this program was launched as; one, where it was not launched as several.

        `device` is where the tensors are that will be averaged (default: the GPU if there is one). A process waits `timeout`
        seconds for the others; the first call decides. Raises UserError if they cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls()
        from accelerate import PartialState

        cpu = torch.device(device).type == "cpu" if device else not torch.cuda.is_available()
        with answered():
            state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))
        atexit.unregister(leave)
        atexit.register(leave)
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of what all have together: every `count`-th item."""
        return list(items[self.index :: self.count])

    def rounds(self, count: int, batch: int, done: Container[int] = ()) -> Iterator[Round]:
        """This process's share of the batches of `count` things; a batch whose things are all `done` is left out.

        A batch holds the same things whatever is done, and on any number of processes that have a whole batch each. Every
        process is given equally many rounds, the last perhaps without a batch of its own, so that all can meet after each.
        """
        size = max(1, min(batch, -(-count // self.count)))
        every = (range(start, min(start + size, count)) for start in range(0, count, size))
        left = [some for some in every if any(number not in done for number in some)]
        for start in range(0, len(left), self.count):
            now = left[start : start + self.count]
            yield Round(now[self.index] if self.index < len(now) else range(0), max(map(len, now)))

    def batches(self, count: int, batch: int, done: Container[int] = ()) -> Iterator[range]:
        """The own batch of each of the `rounds`, perhaps an empty one."""
        return (each.own for each in self.rounds(count, batch, done))

    def of_main(self, mine: T) -> T:
        """What the main process has; every process gets it."""
        return self.gather([mine])[0]

    def check_batch(self, batch: int, accumulate: int = 1) -> None:
        """Raises UserError for a batch that cannot be shared equally, in `accumulate` parts each."""
        if batch % (self.count * accumulate):
            raise UserError(f"batch is {batch}, but must be divisible by {self.count} processes x accumulate")

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, of the same shape; every process gets it."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        # In float64 the order of the sum, which differs with the number of processes, is not seen in float32.
        with answered():
            total: Tensor = reduce(tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64), "sum")
        return (total / self.count).to(tensor)

    def mean_of(self, number: float) -> float:
        """The mean of a number over all processes; every process gets it."""
        return sum(self.gather([number])) / self.count

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The whole list, in order, from every process's `share` of it; every process gets it."""
        if self.count == 1:
            return list(mine)
        from accelerate.utils import gather_object

        with answered():
            shares: list[list[T]] = gather_object([list(mine)])
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def agree(self, mine: str | None) -> str | None:
        """What the first process says that says anything; every process gets it."""
        return next(filter(None, self.gather([mine])), None)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            with answered():
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


@contextmanager
def answered() -> Iterator[None]:
    """What torch says when another process does not answer, as a UserError."""
    try:
        yield
    except RuntimeError as error:  # torch's own errors of this sort are RuntimeErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"another process has ended, or did not answer in time; look at what it said, then resume the run ({reason})"
        ) from error


def leave() -> None:
    """Take leave of the others at the end of the program: torch's threads that are still at work then may abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def first_to_tell() -> bool:
    """Whether no other process of this launch has told of its error yet: one mistake is one line, from however many processes.

    torchrun and accelerate's launcher have a store that all processes share; where there is none, each tells its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"chainrule/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # the launcher is gone
        return True


def default_device() -> str:
    """The GPU if there is one, of several processes on one machine each its own; otherwise the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}"
