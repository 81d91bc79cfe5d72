"""Levels, schedules and seeded noise.

A schedule gives every level its signal scale alpha and noise scale sigma: x_level = alpha * x_0 + sigma * epsilon.
Level 0 is the finished image, (1, 0).
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor


class Schedule(Protocol):
    """The signal and noise scales of every level, from 0 to `top`, as Python floats (float64)."""

    offset: ClassVar[int]  # a level minus the scheduler's timestep for it

    @property
    def top(self) -> int:
        """The noisiest level."""
        ...

    def __call__(self, level: float, finish: bool = False) -> tuple[float, float]:
        """(alpha, sigma) of a level; with `finish`, of the level the sampler's last step lands on."""
        ...

    def level(self, alpha: float, sigma: float) -> float:
        """The level that has these scales, between two whole ones if it lies there."""
        ...


@dataclass(frozen=True, slots=True)
class Diffusion:
    """A variance-preserving schedule: alpha^2 + sigma^2 = 1, tabulated at whole levels; between them sigma / alpha is linear.

    That is how diffusers' Euler scheduler reads the table between two timesteps. `end` is the level whose scales the
    sampler's own last step lands on: Stable Diffusion's DDIM (`set_alpha_to_one=False`) lands on `alphas_cumprod[0]`,
    level 1, and calls that the finished image.
    """

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    end: int = 0
    offset: ClassVar[int] = 1

    @classmethod
    def of(cls, alphas_cumprod: Tensor, end: int = 0) -> Diffusion:
        """From diffusers' table: `alphas_cumprod[t]` is level t + 1."""
        squared = [1.0, *alphas_cumprod.double().tolist()]
        return cls(tuple(a**0.5 for a in squared), tuple((1 - a) ** 0.5 for a in squared), end)

    @property
    def top(self) -> int:
        """The noisiest level, the last of the table."""
        return len(self.alpha) - 1

    def __call__(self, level: float, finish: bool = False) -> tuple[float, float]:
        level = self.end if finish else level
        below = int(level)
        if below == level:
            return self.alpha[below], self.sigma[below]
        share, (low, high) = level - below, (self.sigma[i] / self.alpha[i] for i in (below, below + 1))
        ratio = (1 - share) * low + share * high
        return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5

    def level(self, alpha: float, sigma: float) -> float:
        """The level with this ratio of sigma to alpha, in [0, top]; whole if it is within 1e-6 of a whole one."""
        ratios = [s / max(a, 1e-12) for a, s in zip(self.alpha, self.sigma, strict=True)]
        ratio = sigma / max(alpha, 1e-12)
        above = min(max(bisect_left(ratios, ratio), 1), self.top)
        share = (ratio - ratios[above - 1]) / (ratios[above] - ratios[above - 1])
        found = above - 1 + min(max(share, 0.0), 1.0)
        return round(found) if abs(found - round(found)) < 1e-6 else found


@dataclass(frozen=True, slots=True)
class Flow:
    """The schedule of rectified flow (arXiv:2209.03003): sigma = level / top and alpha = 1 - sigma at every level."""

    top: int = 1000
    offset: ClassVar[int] = 0

    def __call__(self, level: float, finish: bool = False) -> tuple[float, float]:
        return 1 - level / self.top, level / self.top

    def level(self, alpha: float, sigma: float) -> float:
        """The level with this noise scale."""
        return sigma * self.top


def derive(seed: int, *salt: int | str) -> int:
    """A 63-bit seed made of a seed and what it is for (`salt`), the same on every machine."""
    return random.Random("/".join(map(str, (seed, *salt)))).getrandbits(63)


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard normal noise, one generator per image: image k is the same in any batch and on any process.

    Drawn on the CPU in float32, as diffusers draws from a list of CPU generators.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    _under_way: dict[int, tuple[int, torch.Generator]] = field(default_factory=dict, repr=False, compare=False)

    def initial(self) -> Tensor:
        """The initial noise, (b, *shape): what a pipeline draws from `[torch.Generator().manual_seed(s) for s in seeds]`."""
        return self._draw(self.seeds)

    def stream(self, number: int) -> Tensor:
        """The noise of a stochastic solver's step, (b, *shape): the `number`-th draw after the initial one, counted from 0.

        It equals what diffusers' schedulers draw from the pipeline's generators.
        """
        return torch.stack([self._next(i, number) for i in range(len(self.seeds))])

    def fresh(self, number: int) -> Tensor:
        """The noise of the `number`-th jump up, (b, *shape), independent of the initial noise."""
        return self._draw([derive(seed, "up", number) for seed in self.seeds])

    def _draw(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack(
            [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) for seed in seeds]
        )

    def _next(self, image: int, number: int) -> Tensor:
        """One image's draw. A chain asks in order, so its generator is kept where it stands; any other order starts anew."""
        at, generator = self._under_way.get(image, (-1, torch.Generator()))
        if at != number:
            generator.manual_seed(self.seeds[image])
            for _ in range(number + 1):
                torch.randn(self.shape, generator=generator, dtype=torch.float32)
        self._under_way[image] = (number + 1, generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float32)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """In the block torch's, numpy's and Python's own generators start from this seed; after it they are as they were."""
    kept, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002  the generator that others draw from
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(numpys)  # noqa: NPY002
