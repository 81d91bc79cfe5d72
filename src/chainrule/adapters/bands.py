"""At which levels an adapter is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Band:
    """An adapter's scale, on for levels with low < level <= high (None: no bound).

    DRaFT's start and end steps (arXiv:2309.17400, Fig. 26-27) are bands over the sampling grid.
    """

    scale: float = 1.0
    high: int | None = None
    low: int | None = None

    def at(self, level: int) -> float:
        inside = (self.high is None or level <= self.high) and (self.low is None or level > self.low)
        return self.scale if inside else 0.0


ALWAYS = Band()


@dataclass(frozen=True, slots=True)
class Active:
    """Which adapters are on at which levels."""

    bands: Mapping[str, Band] = field(default_factory=dict)

    def at(self, level: int) -> dict[str, float]:
        return {name: scale for name, band in self.bands.items() if (scale := band.at(level))}
