"""Peak memory of one gradient: under recompute one call's graph whatever N and K, and under keep in proportion.

A live call must store the state it started from, one latent of the batch, so that it can be made again; nothing else of
a call has to outlive it. That is the bound below, with nothing added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

import pytest
import torch
from pipelines import make_pipeline
from torch import Tensor

import chainrule as cr
from chainrule.meters import LiveBytes, peak_bytes
from chainrule.methods import SDO, DRaFT, DRaFTLV, Method

PROMPTS, SEEDS = ["a fox", "two bees"], [4, 9]


def score(images: Tensor, prompts: object) -> Tensor:
    return -(images - 0.4).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def model() -> cr.Model:
    model = cr.load(make_pipeline())
    model.adapt("mine", rank=2)
    return model


@pytest.fixture(scope="module")
def peak(model: cr.Model) -> Callable[[Method, int, str], int]:
    @cache
    def measure(method: Method, steps: int, memory: str) -> int:
        for weight in model.network.parameters():
            weight.grad = None
        plan = method.plan(model.grid(steps), Random(0))
        return peak_bytes(lambda: cr.gradient(model, plan, score, PROMPTS, SEEDS, guidance=2.0, memory=memory))

    return measure


@pytest.fixture
def latent(model: cr.Model) -> int:
    """Bytes of one state of the batch."""
    state = model.noise(SEEDS)
    return state.numel() * state.itemsize


def test_meter_counts_what_is_held():
    before = torch.zeros(10_000)
    with LiveBytes() as meter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).t()  # a view: nothing
        c = before.view(-1)[:5].add_(1)  # in place on what was there: nothing
        d = a + 1  # 8000 at once
        del a, b
        assert meter.live == 4000
        e = torch.ones(500)
        assert meter.live == 6000
    assert meter.peak == 8000
    del c, d, e


def test_meter_sees_recomputed_activations():
    x, weight = torch.ones(100, 100), torch.ones(100, 100, requires_grad=True)

    def run() -> None:
        torch.utils.checkpoint.checkpoint(lambda y: (y @ weight).sin().exp().sum(), x, use_reentrant=False).backward()

    assert peak_bytes(run) >= 3 * x.numel() * x.itemsize  # the product, its sine and the exponential's result


def test_recompute_stores_one_latent_for_a_further_live_call(peak, latent):
    most = peak(DRaFT(), 12, "recompute")
    assert most - peak(DRaFT(), 4, "recompute") <= (12 - 4) * latent  # N
    assert most - peak(DRaFT(2), 12, "recompute") <= (12 - 2) * latent  # K


def test_keep_grows_with_live_calls(peak):
    """So the meter would have seen it: three times the calls, close to three times the memory."""
    assert 2.5 < peak(DRaFT(), 12, "keep") / peak(DRaFT(), 4, "keep") < 3


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_calls_without_gradient_store_nothing(peak, latent, memory):
    """One live call of any number; a latent is allowed for where in the chain the random call lies."""
    assert abs(peak(SDO(), 8, memory) - peak(SDO(), 2, memory)) <= latent


def test_branches_are_held_one_at_a_time(peak):
    """From the second copy on: while it is made, the images of the first branch and of the one before are at hand."""
    assert peak(DRaFTLV(3), 1, "keep") == peak(DRaFTLV(2), 1, "keep")
