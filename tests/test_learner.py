"""Parts under one AdamW: a rate each, by Adam's first step in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from chainrule.learner import Learner, gradients


@dataclass(frozen=True)
class Numbers:
    weights: nn.Parameter
    rate: float
    decay: float = 1.0

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {"weights": self.weights}


def test_each_part_learns_at_its_own_rate():
    """Adam's first step is lr * sign(gradient), whatever the gradient's size."""
    parts = {name: Numbers(nn.Parameter(torch.zeros(2, dtype=dtype)), rate)
             for name, rate, dtype in (("slow", 1.0, torch.float32), ("fast", 50.0, torch.float64))}  # fmt: skip
    learner = Learner.of(parts, weight_decay=0.0)
    weights = learner.train_only(parts)
    (3 * weights[0].sum() - 0.01 * weights[1].sum()).backward()
    learner.update(weights, gradients(weights), 0.0, lr=1e-3, clip=1.0, ema=0.0)
    torch.testing.assert_close(parts["slow"].weights.data, torch.full((2,), -1e-3), rtol=1e-4, atol=0)
    torch.testing.assert_close(parts["fast"].weights.data, torch.full((2,), 0.05, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_part_that_is_not_trained_stays_and_keeps_its_optimizer_state():
    parts = {name: Numbers(nn.Parameter(torch.zeros(1)), 1.0) for name in ("one", "two")}
    learner = Learner.of(parts, weight_decay=0.1)
    for names in (("one", "two"), ("two",)):
        weights = learner.train_only(names)
        sum(w.sum() for w in weights).backward()
        learner.update(weights, gradients(weights), 0.0, lr=0.1, clip=1.0, ema=0.0)
    one, two = (learner.optimizer.state[part.weights] for part in parts.values())
    assert (float(one["step"]), float(two["step"])) == (1.0, 2.0)
    assert float(parts["one"].weights.detach()) > float(parts["two"].weights.detach())


def test_weight_decay_is_a_part_of_its_own_too():
    """Adam moves nothing without a gradient; AdamW's decay takes lr * weight_decay off what there is."""
    parts = {
        name: Numbers(nn.Parameter(torch.full((2,), 4.0)), 1.0, decay) for name, decay in (("adapter", 1.0), ("guidance", 0.0))
    }
    learner = Learner.of(parts, weight_decay=0.1)
    weights = learner.train_only(parts)
    learner.update(weights, torch.zeros(4), 0.0, lr=0.5, clip=1.0, ema=0.0)
    assert parts["adapter"].weights.tolist() == pytest.approx([4.0 * (1 - 0.5 * 0.1)] * 2)
    assert parts["guidance"].weights.tolist() == [4.0, 4.0]
