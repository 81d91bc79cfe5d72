"""A reward that is computed on a device of its own, or in a lower precision."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.rewards.base import Reward, Sum

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class On(Reward):
    """A reward computed on `device`, its networks in `dtype`; written `pickscore@cuda:1`, or `pickscore@cuda:1/bfloat16`.

    The images go there, the values come back, and so does the gradient, in the images' precision. A lower `dtype` is torch's
    autocast, which saves time and activations; CLIP's image towers and HPSv3's network are held in it too, other weights stay in
    float32. Put the terms of a sum in their places one by one.
    """

    reward: Reward
    device: str
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", self.device):
            raise UserError(f"a reward's device is like cpu, cuda or cuda:1, not {self.device!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"a reward's dtype is {', '.join(DTYPES)}, not {self.dtype!r}")
        if isinstance(self.reward, Sum | On):
            raise UserError(f"{self.reward.name!r} cannot be moved as a whole; put each term on its device")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"{self.reward.name}@{self.device}{'' if self.dtype == 'float32' else '/' + self.dtype}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        there = images.to(self.device)
        with self._precision():
            values = self.reward(there, prompts)
        return values.to(images.device, torch.promote_types(images.dtype, torch.float32))

    def to(self, device: torch.device | str) -> Reward:
        """Load the reward on its own device, whatever `device` is. Raises UserError if there is no such device here."""
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"there is no device {self.device!r} here for reward {self.reward.name!r}") from error
        with self._precision():
            return On(self.reward.to(self.device), self.device, self.dtype)

    def _precision(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, DTYPES[self.dtype], enabled=self.dtype != "float32")

    def with_reference(self, reference: Tensor) -> Reward:
        """The reward that is given `reference` (b, 3, h, w) too."""
        return On(self.reward.with_reference(reference), self.device, self.dtype)
