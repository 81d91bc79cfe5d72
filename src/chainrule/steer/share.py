"""Which images of a batch are this process's, and how what every process finds of its own becomes what all have of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.processes import ALONE, Processes
from chainrule.steer.problem import Seen


@dataclass(frozen=True, slots=True)
class Share:
    """This process's images of a batch of `count`. What comes out of its functions is the same on every process."""

    count: int
    processes: Processes = ALONE

    @property
    def own(self) -> Sequence[int]:
        """The numbers of this process's own images."""
        return self.processes.share(range(self.count))

    @property
    def images(self) -> list[int]:
        """The images it computes, never none: a process without one of its own goes along with the first, which is not counted."""
        return list(self.own) or [0]

    def rows(self, mine: Tensor) -> Tensor:
        """The values (count, ...) of all images, from those (n, ...) of every process's."""
        if self.processes.count == 1:
            return mine
        return torch.stack(self.processes.gather([*mine.detach().cpu()][: len(self.own)])).to(mine.device)

    def total(self, mine: Tensor) -> Tensor:
        """The sum over all images, from the sum over every process's."""
        if self.processes.count == 1:
            return mine
        return self.processes.mean(mine if self.own else torch.zeros_like(mine)) * self.processes.count

    def seen(self, mine: Seen) -> Seen:
        """What was seen of all images."""
        losses, images, gradient, rewards = map(self.rows, (mine.losses, mine.images, mine.gradient, mine.rewards))
        return Seen(losses, images, gradient, rewards, {name: self.rows(values) for name, values in mine.terms.items()})
