"""Penalties added to the reward's loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from chainrule.denoise import Condition, Member
from chainrule.plan import Jump


def divergence(bare: Member, condition: Condition, weight: float) -> Callable[[Tensor, Tensor, Jump], Tensor]:
    """KL to the base model at the last call, weight * ||m - m_base||^2 (arXiv:2309.17400, appendix B.8).

    The squared distance is summed over an image and averaged over the batch. Returned is its gradient with respect to a
    call's answer m, (b, c, h, w), zero for calls that are not the last; the base's answer is a constant.
    """

    def gradient(answer: Tensor, x: Tensor, jump: Jump) -> Tensor:
        if jump.stop != 0:
            return torch.zeros_like(answer)
        with torch.no_grad():
            base = bare(x, jump.start, condition)
        return 2 * weight / len(x) * (answer - base)

    return gradient
