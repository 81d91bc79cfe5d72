"""Levels, schedules and seeded noise.

A schedule gives every level its signal scale alpha and noise scale sigma: x_level = alpha * x_0 + sigma * epsilon.
Level 0 is the finished image, (1, 0).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Schedule:
    """Signal and noise scales per level, as Python floats (float64).

    `end` is the level whose scales the sampler's own last step lands on. Stable Diffusion's DDIM
    (`set_alpha_to_one=False`) lands on `alphas_cumprod[0]`, level 1, and calls that the finished image.
    """

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    end: int = 0

    @classmethod
    def diffusion(cls, alphas_cumprod: Tensor, end: int = 0) -> Schedule:
        """Variance preserving: alpha^2 + sigma^2 = 1. `alphas_cumprod[t]` is level t + 1."""
        squared = [1.0, *alphas_cumprod.double().tolist()]
        return cls(tuple(a**0.5 for a in squared), tuple((1 - a) ** 0.5 for a in squared), end)

    @classmethod
    def flow(cls, sigmas: Sequence[float]) -> Schedule:
        """Rectified flow: alpha = 1 - sigma. `sigmas[0]` must be 0."""
        return cls(tuple(1 - s for s in sigmas), tuple(sigmas))

    def __call__(self, level: int, finish: bool = False) -> tuple[float, float]:
        """(alpha, sigma) of a level; with `finish`, of the level the sampler's last step lands on."""
        level = self.end if finish else level
        return self.alpha[level], self.sigma[level]


def derive(seed: int, *salt: int | str) -> int:
    """A 63-bit seed from a seed and a purpose, the same on every machine."""
    return random.Random("/".join(map(str, (seed, *salt)))).getrandbits(63)


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard normal noise, one generator per image: image k is the same in any batch and on any process.

    Drawn on the CPU in float32, as diffusers draws from a list of CPU generators.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]

    def initial(self) -> Tensor:
        """(b, *shape): what a pipeline draws from `[torch.Generator().manual_seed(s) for s in seeds]`."""
        return self._draw(self.seeds)

    def fresh(self, number: int) -> Tensor:
        """(b, *shape): the `number`-th re-noising of these images, independent of the initial noise."""
        return self._draw([derive(seed, "up", number) for seed in self.seeds])

    def _draw(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
