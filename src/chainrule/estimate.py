"""A mean with its 95% interval, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The 97.5% points of Student's t for 1 to 30 degrees of freedom; beyond, 1.96 + 2.4 / degrees is right to 0.003.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13,
      2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)  # fmt: skip


def _t(n: int) -> float:
    """The half width of the 95% interval of a mean of `n` values, in standard errors."""
    return _T[n - 2] if n - 2 < len(_T) else 1.96 + 2.4 / (n - 1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the half width of its 95% interval; printed as "mean ± half width"."""

    mean: float
    interval: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The mean of at least one independent value. The interval of a single value is infinite."""
        n = len(values)
        mean = math.fsum(values) / n
        if n < 2:
            return cls(mean, math.inf)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        return cls(mean, _t(n) * spread / math.sqrt(n))

    def spread(self, n: int) -> float:
        """The standard deviation of the `n` values that this was made of, which are two at least."""
        return self.interval * math.sqrt(n) / _t(n)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.interval:.2g}"


def wilson(wins: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share, `wins` of `count` independent trials (Wilson 1927, Eq. 5)."""
    share, z = wins / count, 1.959964
    center, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max((center - half) / (1 + z**2 / count), 0.0), min((center + half) / (1 + z**2 / count), 1.0)
