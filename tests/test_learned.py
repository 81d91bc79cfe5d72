"""Learned parts by one contract: their gradient is plain autograd's for any method; they are trained with a run and saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import torch
from pipelines import make_pipeline, score
from safetensors.torch import load_file
from students import student_file
from torch import Tensor, nn

import chainrule as cr
from chainrule.guidance import CFG, ByLevel
from chainrule.learned import GuidanceWeights, Learned, NegativeEmbedding
from chainrule.methods import SDO, DRaFT, DRaFTLV, Method, ShortFT, needs
from chainrule.plan import Grad, Plan
from chainrule.plan import Path as Jumps
from chainrule.steer.variables import Controls, Embedding

STEPS, SEEDS, PROMPTS = 5, [4, 9], ["a fox", "two bees"]


class Mixer(nn.Module):
    """A small network over token states, which starts away from the identity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inner, self.out = nn.Linear(16, 8).double(), nn.Linear(8, 16).double()

    def forward(self, states: Tensor) -> Tensor:
        return states + self.out(self.inner(states).tanh())


@dataclass(frozen=True)
class Case:
    """A part for a model, and where a person would write its values into a plain loop."""

    part: Callable[[cr.Model], Learned]
    scale: Callable[[Learned, int], Tensor | float] = lambda part, call: 3.0
    negative: Callable[[Learned, Tensor, Tensor], Tensor] = lambda part, positive, negative: negative
    positive: Callable[[Learned, Tensor], Tensor] = lambda part, positive: positive
    control: Callable[[Learned, float], Tensor | float] = lambda part, level: 0.0


def guidance_weights(model: cr.Model) -> GuidanceWeights:
    part = GuidanceWeights.start(model.grid(STEPS), 3.0)
    part.weights.data += torch.linspace(-1, 1, STEPS)
    return part


def negative_network(model: cr.Model) -> NegativeEmbedding:
    part = NegativeEmbedding.start(model.embed([""]).negative.states[0])
    torch.manual_seed(5)
    for parameter in part.network.parameters():
        parameter.data.normal_(0, 0.3)
    return part


def embedding(side: str) -> Callable[[cr.Model], Embedding]:
    """One away from the prompts' own."""

    def part(model: cr.Model) -> Embedding:
        torch.manual_seed(3)
        states = getattr(model.embed(PROMPTS), side).states
        return Embedding(nn.Parameter(states + 0.1 * torch.randn_like(states)), side)

    return part


def controls(model: cr.Model) -> Controls:
    torch.manual_seed(4)
    x = model.noise(SEEDS)
    return Controls({level: nn.Parameter(0.1 * torch.randn_like(x)) for level in model.grid(STEPS)[:-1]})


CASES = {
    "guidance weights": Case(guidance_weights, scale=lambda part, call: part.weights[call]),
    "negative embedding": Case(
        lambda model: NegativeEmbedding(Mixer()), negative=lambda part, positive, negative: part.network(positive)
    ),
    "the paper's negative embedding": Case(negative_network, negative=lambda part, positive, negative: part.network(positive)),
    "steered prompt": Case(embedding("positive"), positive=lambda part, positive: part.states),
    "steered negative prompt": Case(embedding("negative"), negative=lambda part, positive, negative: part.states),
    "steered controls": Case(controls, control=lambda part, level: part.values[level]),
}
METHODS = [DRaFT(1), DRaFT(), DRaFTLV(2), SDO(), SDO(2), ShortFT(k=2, stage=1), ShortFT(k=2, stage=2)]


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def prepared(method: Method, case: Case, folder: Path) -> tuple[cr.Model, dict[str, cr.Adapter], Learned]:
    """A model with the method's adapters away from the identity, a student if it needs one, and the part."""
    model = cr.load(make_pipeline())
    own = needs(method, model.grid(STEPS))
    if own.members:
        model = model.with_student(student_file(folder / "student"))
    adapters = {name: model.adapt(name, rank=2, levels=levels) for name, levels in own.adapters.items()}
    torch.manual_seed(1)
    for adapter in adapters.values():
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.2)
    part = case.part(model)
    return model.guided(3.0).learning("part", part), adapters, part


def plain_loss(model: cr.Model, part: Learned, case: Case, plan: Plan) -> Tensor:
    """The plan walked with autograd alone, the part's values written in by hand at every call."""
    cast, condition, grid = replace(model, learned={}).cast(), model.embed(PROMPTS), list(model.grid(STEPS))
    positive = case.positive(part, condition.positive.states)
    negative = case.negative(part, condition.positive.states, condition.negative.states)
    condition = replace(
        condition, positive=replace(condition.positive, states=positive), negative=replace(condition.negative, states=negative)
    )
    noise = replace(model, learned={}).chain(PROMPTS, SEEDS).noise

    def run(x: Tensor, path: Jumps, branch: int) -> Tensor:
        for jump in path:
            if jump.up:
                a, d = model.solver.process.renoise(jump.start, jump.stop)
                x = a * x + d * noise.fresh(branch).double()
                continue
            member = cast[jump.via]
            if jump.via == "base":
                member = replace(member, guidance=CFG(case.scale(part, grid.index(jump.start))))
            seen = x if jump.grad is Grad.FULL else x.detach()
            m = member(seen, jump.start, condition)
            if jump.via == "base":
                m = m + case.control(part, jump.start)
            a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
            x = a * x + b * (m.detach() if jump.grad is Grad.NONE else m)
        return x

    trunk = run(model.noise(SEEDS), plan.trunk, 0).detach()
    total, first = torch.zeros(()), trunk
    for number, branch in enumerate(plan.branches):
        latent = run(first.detach() if number and branch[0].start == 0 else trunk, branch, number)
        first = latent if not number else first
        total = total - score(model.codec.decode(latent), PROMPTS).mean()
    return total


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_gradient_is_plain_autograds(case: Case, method: Method, tmp_path: Path) -> None:
    model, adapters, part = prepared(method, case, tmp_path)
    plan = method.plan(model.grid(STEPS), Random(3))
    leaves = [*part.named_parameters().values(), *(w for a in adapters.values() for w in a.parameters())]
    expected = torch.autograd.grad(plain_loss(model, part, case, plan), leaves, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in expected[: len(part.named_parameters())])
    for memory in ("keep", "recompute"):
        cr.gradient(model, plan, score, PROMPTS, SEEDS, memory=memory)
        for leaf, gradient in zip(leaves, expected, strict=True):
            found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            wanted = torch.zeros_like(leaf) if gradient is None else gradient
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()) + 1e-14)
            leaf.grad = None


def test_it_answers_when_sampling(case: Case, tmp_path: Path) -> None:
    model, _, part = prepared(DRaFT(1), case, tmp_path)
    with torch.no_grad():
        loss = plain_loss(model, part, case, DRaFT().plan(model.grid(STEPS), Random(0)))
        *_, latent = model.states(PROMPTS, SEEDS, STEPS)
        assert float(-score(model.codec.decode(latent), PROMPTS).mean()) == pytest.approx(float(loss), rel=1e-9)
        *_, without = replace(model, learned={}).states(PROMPTS, SEEDS, STEPS)
    assert not torch.allclose(latent, without, atol=1e-4)


def test_it_is_trained_and_saved_with_a_run(case: Case, tmp_path: Path) -> None:
    """The rate is the part's own: AdamW's first step is about lr times rate, whatever the gradient's size."""
    model = cr.load(make_pipeline())
    part = replace(case.part(model), rate=5.0)  # type: ignore[type-var]
    before = {name: weight.detach().clone() for name, weight in part.named_parameters().items()}
    options = {"updates": 1, "batch": 2, "lr": 1e-3, "rank": 2, "sample_steps": STEPS, "guidance": 3.0, "weight_decay": 0.0}
    run = cr.finetune(
        model.learning("mine", part), DRaFT(2), score, PROMPTS, out=tmp_path / "run", sample_every=0, save_every=0, **options
    )
    moved = max(float((weight.detach() - before[name]).abs().max()) for name, weight in part.named_parameters().items())
    assert moved == pytest.approx(5e-3, rel=0.1)  # AdamW adds 1e-8 to a small gradient
    (file,) = (run.adapter / "learned" / "mine").glob("*.safetensors")
    kept = load_file(file)
    for name, weight in part.named_parameters().items():
        assert torch.equal(kept[name], weight.detach())


def test_guidance_weights_are_a_schedule_for_any_number_of_steps(tmp_path: Path) -> None:
    model = cr.load(make_pipeline())
    part = guidance_weights(model)
    part.save(tmp_path)
    schedule = json.loads((tmp_path / "guidance.json").read_text())["schedule"]
    assert [level for level, _ in schedule] == list(model.grid(STEPS))[:-1]
    assert [scale for _, scale in schedule] == pytest.approx([2.0, 2.5, 3.0, 3.5, 4.0])
    chain = model.learning("mine", part).chain(PROMPTS, SEEDS)
    guidance = chain.cast["base"].guidance  # type: ignore[attr-defined]
    assert isinstance(guidance, ByLevel)
    (high, low), middle = (schedule[0][0], schedule[1][0]), (schedule[0][0] + schedule[1][0]) / 2
    assert [float(guidance.at(level).detach()) for level in (high, middle, low)] == pytest.approx([2.0, 2.25, 2.5])
