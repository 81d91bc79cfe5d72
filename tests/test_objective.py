"""Objectives: every term's value against its formula, its gradient against plain autograd, and terms together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from pipelines import make_pipeline, score
from torch import Tensor

import chainrule as cr
from chainrule import rewards
from chainrule.methods import SDO, DRaFT, DRaFTLV, DRTune, Method
from chainrule.objective import KL, Call, Distance, Objective, RewardTerm, SegmentError, read
from chainrule.plan import Grad, Jump
from chainrule.rewards import reward_of

PROMPTS, SEEDS = ["a fox", "two bees", "a cat"], [1, 2, 3]
REFERENCE = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@dataclass(frozen=True)
class Gray:
    """A term of one's own: how far an image's mean is from middle gray, squared."""

    weight: float = 0.5
    name: str = "gray"

    def of_images(self, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        return (images.mean((1, 2, 3)) - 0.5).square()


ON_IMAGES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "reward": (RewardTerm(reward_of(score)), lambda images: score(images, PROMPTS)),
    "distance": (Distance(REFERENCE, 0.3), lambda images: (images - REFERENCE).flatten(1).norm(dim=1) / (3 * 16 * 16) ** 0.5),
    "one's own": (Gray(), lambda images: (images.mean((1, 2, 3)) - 0.5) ** 2),
}
BASE, TARGET = lambda x, level, condition: 0.3 * x, torch.ones(3, 4, 8, 8).double()
ON_CALLS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": (KL(BASE, 0.2), lambda answer, x: (answer - 0.3 * x).square().sum((1, 2, 3))),
    "segment error": (
        SegmentError(TARGET, (0.9, -0.4), 2.0), lambda answer, x: ((0.9 * x - 0.4 * answer - 1) / 2).square().mean((1, 2, 3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_IMAGES)
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_a_term_on_images_is_its_formula(name: str, micro_batch: int) -> None:
    (term, formula), model = ON_IMAGES[name], cr.load(make_pipeline())
    latents = model.noise(SEEDS)
    reading, gradient = read(model.codec.decode, Objective((term,)), latents, PROMPTS, micro_batch)
    leaf = latents.clone().requires_grad_()
    values = formula(model.codec.decode(leaf))
    (expected,) = torch.autograd.grad(term.weight * values.sum(), leaf)
    torch.testing.assert_close(reading.terms[term.name], values.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(reading.loss, term.weight * values.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ON_CALLS)
def test_a_term_on_calls_is_its_formula(name: str) -> None:
    term, formula = ON_CALLS[name]
    torch.manual_seed(0)
    answer, x = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 4, 8, 8).double()
    condition = cr.load(make_pipeline()).embed(PROMPTS)
    gradient, values = Objective((term,)).of_call(Call(answer, x, Jump(2, 0, grad=Grad.FULL), condition))
    leaf = answer.clone().requires_grad_()
    expected = formula(leaf, x)
    torch.testing.assert_close(values[term.name], expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(term.weight * expected.sum(), leaf)[0])


def test_kl_looks_at_the_last_live_call_of_the_first_branch_only() -> None:
    x, condition = torch.ones(3, 4, 8, 8), cr.load(make_pipeline()).embed(PROMPTS)
    assert Objective((KL(BASE),)).of_call(Call(x, x, Jump(2, 0), condition, last=False)) == (None, {})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("method", "memory"),
    [*((DRaFT(2), memory) for memory in ("recompute", "keep", "blocks")),
     *((method, "recompute") for method in (DRaFTLV(), SDO(), DRTune(k=2, m=1)))],
    ids=str,
)  # fmt: skip
def test_kl_is_the_squared_difference_of_the_noise_at_one_call_of_any_plan(method: Method, memory: str, prediction: str) -> None:
    """Against autograd of the written-out term: the state a constant, the noise read off by diffusers' formulas."""
    net = cr.load(make_pipeline(prediction)).guided(2.0)
    adapter = net.adapt(rank=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    base = replace(net, active={}).cast()["base"]
    grid = net.grid(4)
    plan = method.plan(grid, Random(1))
    calls = [*plan.trunk, *plan.branches[0]]
    at = max(i for i, jump in enumerate(calls) if jump.grad is not Grad.NONE)
    nothing = lambda images, prompts: (images * 0).sum((1, 2, 3))
    seen = cr.gradient(net, plan, Objective.of(nothing).with_terms(KL(base, 0.7)), PROMPTS, SEEDS, memory=memory)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapter.parameters()]

    with torch.no_grad():
        x = [net.noise(SEEDS), *net.states(PROMPTS, SEEDS, 4)][at]
    t, condition = calls[at].start, net.embed(PROMPTS)
    alpha = net.pipe.scheduler.alphas_cumprod[int(t) - 1].double().sqrt()
    sigma = (1 - alpha**2).sqrt()
    noise = {
        "epsilon": lambda m: m, "v_prediction": lambda m: alpha * m + sigma * x, "sample": lambda m: (x - alpha * m) / sigma
    }[prediction]  # fmt: skip
    with torch.no_grad():
        before = noise(base(x, t, condition))
    distance = (noise(net.cast()["base"](x, t, condition)) - before).square().sum() / len(SEEDS)
    assert seen.terms["kl"] == pytest.approx(float(distance.detach()), rel=1e-6)
    expected = torch.autograd.grad(0.7 * distance, adapter.parameters(), allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-6, atol=1e-6 * scale)


def test_a_sum_of_rewards_is_a_term_for_each_and_their_sum() -> None:
    both = 2.0 * reward_of(score, "ramp") + 0.5 * rewards.Symmetry()
    objective = Objective.of(both)
    assert [(term.name, term.weight) for term in objective.terms] == [("ramp", -2.0), ("symmetry", -0.5)]
    images = REFERENCE.float()
    reading = objective.of_images(images, PROMPTS, slice(0, 3))
    torch.testing.assert_close(reading.rewards, both(images, PROMPTS))
    torch.testing.assert_close(reading.loss, -both(images, PROMPTS))
    assert Objective.of(objective) is objective


def test_terms_together_pull_as_their_weighted_sum() -> None:
    """Image terms and a call term through a chain: the gradient of the sum is the sum of the gradients."""
    model = cr.load(make_pipeline()).guided(3.0)
    adapter = model.adapt(rank=2)
    torch.manual_seed(1)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    base = replace(model, active={}).cast()["base"]
    terms = [*Objective.of(score).terms, Distance(REFERENCE, 0.3), Gray(), KL(base, 0.7)]
    plan = DRaFT(2).plan(model.grid(3), Random(0))

    def gradient(*chosen: Any) -> tuple[list[Tensor], cr.Result]:
        result = cr.gradient(model, plan, Objective(chosen), PROMPTS, SEEDS)
        found = [weight.grad.clone() for weight in adapter.parameters()]
        for weight in adapter.parameters():
            weight.grad = None
        return found, result

    whole, result = gradient(*terms)
    single = [gradient(term)[0] for term in terms]
    for i, found in enumerate(whole):
        torch.testing.assert_close(found, sum(part[i] for part in single), rtol=1e-9, atol=1e-12)
    assert list(result.terms) == ["score", "distance", "gray", "kl"]
    doubled, _ = gradient(*Objective(tuple(terms)).scaled(2.0).terms)
    torch.testing.assert_close(doubled, [2 * found for found in whole])


def test_every_update_logs_every_term(tmp_path: Any) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32))
    run = cr.finetune(
        model, DRaFT(1), 2.0 * reward_of(score, "ramp") + rewards.Symmetry(), PROMPTS, out=tmp_path / "run", kl=0.1,
        updates=2, batch=2, rank=2, sample_steps=3, guidance=2.0, sample_every=0, save_every=0,
    )  # fmt: skip
    first, second = (row["terms"] for row in run.metrics())
    assert list(first) == ["ramp", "symmetry", "kl"]
    assert first["kl"] == 0.0 and second["kl"] > 0.0  # a fresh adapter is the identity
    row = run.metrics()[0]
    assert row["reward"] == pytest.approx(2 * first["ramp"] + first["symmetry"], rel=1e-4)
