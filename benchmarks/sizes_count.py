"""Counting bytes without a GPU: on the meta device a tensor has a size and no numbers, and every operation says what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.cast import Member
from chainrule.denoise import Condition
from chainrule.meters import LiveBytes


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention as one operation that keeps its inputs, its output and a logarithm per row, and no matrix of weights.

    That is what the fused kernels on a GPU keep. The meta device would take attention apart instead, matrix and all.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _flash):
        yield


@dataclass(frozen=True)
class Rehearsed:
    """A member whose calls without gradient run once: of others like the first, only the peak is counted.

    A chain has fifty of them, which hold the same bytes on top of what is held already.
    """

    member: Member
    meter: LiveBytes
    seen: dict[Any, int] = field(default_factory=dict)

    @property
    def denoiser(self) -> Any:
        return self.member.denoiser

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        if torch.is_grad_enabled():
            return self.member(x, level, condition)
        key, meter = (x.shape, tuple(self.member.active.at(level).items())), self.meter
        if key in self.seen:
            meter.peak = max(meter.peak, meter.live + self.seen[key])
            return torch.empty_like(x)
        most, before = meter.peak, meter.live
        meter.peak = before
        answer = self.member(x, level, condition)
        self.seen[key] = meter.peak - before
        meter.peak = max(most, meter.peak)
        return answer


def largest(fits: Callable[[int], bool], guess: int, most: int = 4096) -> int:
    """The largest batch that fits, by steps away from a guess that double, then by halving. 0: not even one."""
    low, high, step, at = 0, most + 1, 1, min(max(guess, 1), most)
    while high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        at = min(low + step, most) if high > most else (low + high) // 2 if low else max(high - step, 1)
        step *= 2
    return low
