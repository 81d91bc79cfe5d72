"""What is steered, by one contract: its gradient is plain autograd's, every image has its own part, and it is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from pipelines import make_pipeline, score
from safetensors.torch import load_file
from steer_loops import PROMPTS, STEPS, close, problem
from torch import Tensor

import chainrule as cr
from chainrule.plan import walk
from chainrule.steer.gradients import gradient_of
from chainrule.steer.kinds import KINDS
from chainrule.steer.problem import Problem
from chainrule.steer.variables import Variable


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def started(name: str) -> tuple[cr.Model, Problem, Variable, Tensor]:
    """A variable a little away from where it starts, the problem without it, and the chain's first state."""
    model, adapter = cr.load(make_pipeline()), None
    if name == "weights":
        adapter = model.adapt("steered", rank=2)
    given, x = problem(model)
    variable, x = KINDS[name].start(given.chain, x, given.grid, adapter)
    torch.manual_seed(1)
    for weight in variable.named_parameters().values():
        weight.data += 0.1 * torch.randn_like(weight)
    return model, given, variable, x


def plain_loss(model: cr.Model, given: Problem, name: str, values: dict[str, Tensor], x: Tensor, gradient: str) -> Tensor:
    """The chain with autograd alone, the variable's values written in by hand, graphs only where the gradient keeps them."""
    condition, drawn = given.chain.condition, Random(3).randrange(STEPS)
    if name in ("prompt", "negative"):
        side = "positive" if name == "prompt" else "negative"
        condition = replace(condition, **{side: replace(getattr(condition, side), states=values[side])})
    state = values["latent"] if name == "latent" else x.detach()
    kept = {"latent": 0, "controls": None}.get(name, drawn)
    for i, jump in enumerate(walk(given.grid)):
        with torch.set_grad_enabled(gradient == "full" or i == kept):
            answer = given.chain.cast["base"](state, jump.start, condition)
        if name == "controls":
            answer = answer + values[f"{jump.start:g}"]
        a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
        state = a * state + b * answer
    return -score(model.codec.decode(state), PROMPTS).sum()


@pytest.mark.parametrize("gradient", ["sdo", "full"])
def test_its_gradient_is_plain_autograds(name: str, gradient: str) -> None:
    model, given, variable, x = started(name)
    values = dict(variable.named_parameters())
    loss = plain_loss(model, given, name, values, x, gradient)
    expected = dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
    part = variable.of(range(len(PROMPTS)))
    seen = gradient_of(gradient, name)(replace(given, chain=part.into(given.chain)), x.detach(), Random(3))
    close(seen.losses.sum(), loss.detach())
    found = {"latent": seen.gradient} if name == "latent" else {key: leaf.grad for key, leaf in part.named_parameters().items()}
    assert found.keys() == expected.keys() and any(value.abs().max() > 1e-8 for value in expected.values())
    for key, value in found.items():
        close(value, expected[key])


def test_some_images_have_their_own_part_of_it_unless_all_share_it(name: str) -> None:
    _, _, variable, _ = started(name)
    part = variable.of([1])
    assert variable.shared == (name == "weights") == (part is variable)
    for key, weight in part.named_parameters().items():
        whole = variable.named_parameters()[key]
        assert weight.is_leaf and weight.requires_grad
        assert weight is whole if variable.shared else torch.equal(weight, whole[1:]) and weight.data_ptr() != whole.data_ptr()


def test_it_is_saved(name: str, tmp_path: Path) -> None:
    _, _, variable, _ = started(name)
    variable.save(tmp_path / "new")
    (file,) = (tmp_path / "new").rglob("*.safetensors")
    kept, own = load_file(file), {key: weight.detach() for key, weight in variable.named_parameters().items()}
    if name == "weights":  # under the names that diffusers reads
        sums = [sorted(float(value.double().sum()) for value in values.values()) for values in (kept, own)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5, abs=1e-6)
    else:
        assert kept.keys() == own.keys() and all(torch.equal(kept[key], own[key]) for key in own)
