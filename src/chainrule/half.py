"""Backward passes through float16, where gradients as small as a reward's would be rounded to zero.

The upstream gradient is scaled to about 1 by a power of two, and the result is scaled back. In float32 and wider this
changes no bit.
"""

from __future__ import annotations

from math import floor, inf, log2

import torch
from torch import Tensor


def backward(answer: Tensor, upstream: Tensor, retain_graph: bool = False) -> None:
    """`answer.backward(upstream, retain_graph)` with the upstream gradient scaled: adds to the `.grad` of the leaves."""
    scale = power_of_two(upstream)
    leaves = _leaves(answer)
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    answer.backward((upstream * scale).to(answer.dtype), retain_graph=retain_graph)
    for leaf, grad in zip(leaves, before, strict=True):
        if leaf.grad is not None:
            leaf.grad = leaf.grad / scale if grad is None else grad + leaf.grad / scale
        else:
            leaf.grad = grad


def gradient(answer: Tensor, at: Tensor, upstream: Tensor) -> Tensor:
    """`torch.autograd.grad(answer, at, upstream)[0]` with the upstream gradient scaled: the gradient at `at`."""
    scale = power_of_two(upstream)
    return torch.autograd.grad(answer, at, (upstream * scale).to(answer.dtype))[0] / scale


def power_of_two(gradient: Tensor) -> float:
    """The power of two that scales the largest number of a gradient to between 1 and 2; 1 for zero or infinity."""
    largest = float(gradient.abs().max())
    return 2.0 ** -floor(log2(largest)) if 0 < largest < inf else 1.0


def _leaves(answer: Tensor) -> list[Tensor]:
    """The tensors whose `.grad` a backward pass from here would write."""
    seen, found, todo = set(), [], [answer.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [upper for upper, _ in node.next_functions]
    return found
