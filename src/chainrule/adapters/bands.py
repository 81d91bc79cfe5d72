"""At which levels an adapter is on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainrule.adapters.lora import Lease

from chainrule.errors import UserError

Scale = float | tuple[float, float]
"""How strongly an adapter answers: everywhere, or from pure noise (level 1000) to the finished image, linear in the level."""
TOP = 1000.0


@dataclass(frozen=True, slots=True)
class Band:
    """An adapter's scale, on for the levels of its spans: low < level <= high (None: no upper end). No spans: always.

    A scale of two numbers mixes base and adapter by level, as annealed guidance does between two models. `factor` multiplies it.

    DRaFT's start and end steps (arXiv:2309.17400, Fig. 26-27) are one span of the sampling grid; ShortFT's adapters
    (arXiv:2507.22604, section 3.3) are on at chosen calls.
    """

    scale: Scale = 1.0
    spans: tuple[tuple[float, float | None], ...] | None = None
    lease: Lease | None = field(default=None, compare=False, repr=False)  # keeps a loaded adapter in its network
    factor: float = 1.0

    def __post_init__(self) -> None:
        numbers = self.scale if isinstance(self.scale, tuple) and len(self.scale) == 2 else (self.scale,)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise UserError(f"the scale is {self.scale!r}, but must be a finite number, or two, (0, 1) say, at noise and image")

    def at(self, level: float) -> float:
        """The scale at a level; 0 where the adapter is off."""
        on = self.spans is None or any(low < level and (high is None or level <= high) for low, high in self.spans)
        first, last = self.scale if isinstance(self.scale, tuple) else (self.scale, self.scale)
        return self.factor * (last + (first - last) * level / TOP) if on else 0.0


@dataclass(frozen=True, slots=True)
class Active:
    """Which adapters are on at which levels."""

    bands: Mapping[str, Band] = field(default_factory=dict)

    def at(self, level: float) -> dict[str, float]:
        """The adapters that are on at a level, and their scales."""
        return {name: scale for name, band in self.bands.items() if (scale := band.at(level))}


class InPart(str):
    """The name of an adapter that is on at a scale or at steps of its own, or that is in no file: a config cannot say it."""


def whole(names: tuple[str, ...]) -> tuple[str, ...]:
    """Adapters that a config can name. Raises UserError for one `InPart`."""
    if part := next((name for name in names if isinstance(name, InPart)), None):
        what = f"a run names its adapters, but {part} is on at a scale or steps of its own, or is in no file"
        raise UserError(f"{what}; save it as it is to be (chainrule.mix), and use that")
    return names


def span_of(grid: Sequence[float], steps: tuple[int, int]) -> tuple[tuple[float, float | None], ...]:
    """The span of the sampling steps from the first, included, to the last, excluded. Raises UserError for other steps."""
    first, last = steps
    if not 0 <= first < last <= len(grid) - 1:
        raise UserError(f"adapter_steps is {steps}, but must satisfy 0 <= first < last <= {len(grid) - 1}")
    return ((grid[last], grid[first]),)


def check_calls(bands: Mapping[str, Band], calls: Sequence[float]) -> None:
    """Raises UserError for an adapter by levels that would be on at none of these calls' levels."""
    for name, band in bands.items():
        for low, high in band.spans or ():
            if not any(low < level and (high is None or level <= high) for level in calls):
                where = f"above level {low}" + ("" if high is None else f" up to {high}")
                raise UserError(
                    f"the adapter {name} is on {where}, where a {len(calls)}-step grid has no call; "
                    "sample with the steps it was trained with"
                )
