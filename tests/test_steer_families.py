"""Steering on every family: variables and gradients that are tested exactly elsewhere, here on other conditions and flows."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from families import CASES, PROMPTS, SEEDS

import chainrule as cr
from chainrule.chain import Memory
from chainrule.denoise import guidance_is_input
from chainrule.objective import Objective
from chainrule.rewards import reward_of
from chainrule.steer.gradients import gradient_of
from chainrule.steer.problem import Problem

TEXTS = [name for name in CASES if CASES[name].texts and name not in ("sd", "sd-v")]
bright = lambda images, prompts: images.mean((1, 2, 3))


@pytest.mark.parametrize("over", ["latent", "prompt", "negative"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_few_updates_raise_the_reward(name: str, over: str) -> None:
    case = CASES[name]
    model = cr.load(case.pipe(), size=case.size)
    if over == "negative" and guidance_is_input(model.denoiser):
        with pytest.raises(cr.UserError, match="reads its guidance and no negative embedding"):
            cr.steer(model, PROMPTS, reward=bright, over=over)
        return
    found = cr.steer(
        model, PROMPTS, reward=bright, over=over, gradient="full", updates=5, lr=0.05, steps=3, guidance=case.guidances[-1]
    )
    assert all(after > before for before, after in zip(found.rewards_before, found.rewards, strict=True))


@pytest.mark.parametrize("name", ["sd3", pytest.param("flux", marks=pytest.mark.heavy)])
def test_the_adjoint_of_a_flow_approaches_the_full_gradient_at_first_order(name: str) -> None:
    case, errors = CASES[name], []
    model = cr.load(case.pipe(dtype=torch.float64), size=case.size)
    for steps in (12, 24):
        grid = (*(1000 - 980 * i / steps for i in range(steps)), 0)
        chain = model.guided(case.guidances[-1]).chain(PROMPTS, SEEDS, Memory.RECOMPUTE)
        given = Problem(chain, grid, model.codec.decode, PROMPTS, Objective.of(bright))
        mine, full = (gradient_of(way, "latent")(given, model.noise(SEEDS), Random(0)).gradient for way in ("adjoint", "full"))
        errors.append(float((mine - full).norm() / full.norm()))
    assert errors[1] < 0.1 and 0.6 < math.log2(errors[0] / errors[1]) < 1.5, errors


@pytest.mark.parametrize("gradient", ["sdo", "adjoint", "invertible", "freedom"])
def test_pictures_enter_a_flow_by_inversion(gradient: str) -> None:
    case = CASES["sd3"]
    model = cr.load(case.pipe(), size=case.size)
    (picture,) = model.sample(["a fox"], [0], 10, 1.0)
    found = cr.steer(model, [""], images=[picture], reward=bright, gradient=gradient, updates=2, steps=10, guidance=1.0, seeds=[0])
    assert found.inverted[0] < 0.1


def test_universal_guidance_is_refused_where_it_divides_by_zero() -> None:
    model = cr.load(CASES["sd3"].pipe(), size=16)
    with pytest.raises(cr.UserError, match="universal guidance divides"):
        cr.steer(model, ["a fox"], reward=bright, gradient="universal", steps=3)


@pytest.mark.parametrize("way", ["sdo", "full", "adjoint", "invertible"])
def test_float16_keeps_the_direction_of_a_small_rewards_gradient(way: str) -> None:
    """Below the smallest number of float16 by itself."""
    found = []
    for dtype in (torch.float16, torch.float32):
        model = cr.load(CASES["sd"].pipe(dtype=dtype), size=16)
        chain = model.guided(1.0).chain(PROMPTS, SEEDS, Memory.RECOMPUTE)
        faint = reward_of(lambda images, prompts: 1e-5 * images.square().mean((1, 2, 3)), "faint")
        given = Problem(chain, model.grid(4), model.codec.decode, PROMPTS, Objective.of(faint))
        found.append(gradient_of(way, "latent")(given, model.noise(SEEDS), Random(0)).gradient.flatten())
    assert torch.cosine_similarity(*found, dim=0, eps=1e-30) > 0.95
