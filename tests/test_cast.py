"""Members of one's own: called by name in a plan, differentiated like any other, and missed in one line that says who is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from pipelines import make_pipeline, score
from torch import Tensor, nn

import chainrule as cr
from chainrule.cast import Answerer, in_float16, networks_of
from chainrule.denoise import Condition
from chainrule.methods import DRaFT
from chainrule.plan import Grad, Plan, walk

STEPS, SEEDS, PROMPTS = 4, [4, 9], ["a fox", "two bees"]


@dataclass(frozen=True)
class Timid:
    """Another member's answer, made smaller by a learned share."""

    member: Answerer
    share: nn.Parameter

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return tuple(networks_of({"": self.member}))

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        return self.share * self.member(x, level, condition)


def build() -> tuple[cr.Model, cr.Adapter, nn.Parameter]:
    model = cr.load(make_pipeline()).guided(3.0)
    adapter = model.adapt(rank=2)
    torch.manual_seed(1)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    share = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    return model.with_member("timid", Timid(model.cast()["base"], share)), adapter, share


def mixed(model: cr.Model) -> Plan:
    """The first and the third call are the member's, and all but the first reach weights and inputs."""
    path = [replace(jump, via="timid") if i in (0, 2) else jump for i, jump in enumerate(walk(model.grid(STEPS)))]
    return Plan((path[0],), (tuple(replace(jump, grad=Grad.FULL) for jump in path[1:]),))


@pytest.mark.parametrize("memory", ["keep", "recompute", "blocks"])
def test_its_gradient_is_plain_autograds(memory: str) -> None:
    model, adapter, share = build()
    plan, cast, condition = mixed(model), model.cast(), model.embed(PROMPTS)
    x = model.noise(SEEDS)
    for i, jump in enumerate(plan.jumps):
        m = cast[jump.via](x, jump.start, condition)
        a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
        x = a * x + b * m
        x = x if i else x.detach()
    leaves = [share, *adapter.parameters()]
    expected = torch.autograd.grad(-score(model.codec.decode(x), PROMPTS).mean(), leaves)
    cr.gradient(model, plan, score, PROMPTS, SEEDS, memory=memory)
    assert float(expected[0]) != 0
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-8, atol=1e-14)


def test_a_plan_draws_it_and_a_plain_function_will_do() -> None:
    model, _, _ = build()
    assert str(mixed(model)) == ">[#>#]"
    base = model.cast()["base"]
    same = model.with_member("timid", lambda x, level, condition: base(x, level, condition))
    plan = mixed(same)
    usual = Plan(plan.trunk[:0] + walk(model.grid(STEPS))[:1], (walk(model.grid(STEPS), Grad.FULL)[1:],))
    seen = [cr.gradient(same, each, score, PROMPTS, SEEDS).rewards for each in (plan, usual)]
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_a_member_that_does_not_name_its_networks_is_taken_for_float16() -> None:
    """Scaling a gradient by a power of two is right for every type; leaving it is wrong for that one."""
    model, _, share = build()
    assert in_float16(lambda x, level, condition: x) and not in_float16(Timid(model.cast()["base"], share))
    halved = cr.load(make_pipeline(dtype=torch.float16))
    assert in_float16(halved.cast()["base"])


@pytest.mark.parametrize("call", ["gradient", "walk"])
def test_a_member_that_is_not_there_is_missed_in_one_line(call: str) -> None:
    model, _, _ = build()
    plan = DRaFT(1).plan(model.grid(STEPS), Random(0))
    lost = replace(plan, trunk=(replace(plan.trunk[0], via="bold"), *plan.trunk[1:]))
    ask: dict[str, Callable[[], Any]] = {
        "gradient": lambda: cr.gradient(model, lost, score, PROMPTS, SEEDS),
        "walk": lambda: next(model.chain(PROMPTS, SEEDS).walk(lost, model.noise(SEEDS))),
    }
    with pytest.raises(cr.UserError, match="jumps by bold, and the members are base, unguided, timid"):
        ask[call]()
