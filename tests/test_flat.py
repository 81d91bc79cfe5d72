"""RSA-FT around any method: the gradient at nearby worse weights and images, against the definition written out in float64."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from exact import prepared
from pipelines import make_pipeline, score
from tuned import gray

import chainrule as cr
from chainrule.estimators import Batch, Flat, Paths
from chainrule.learner import gradients
from chainrule.methods import SDO, DRaFTLV, Method
from chainrule.objective import Objective
from chainrule.rewards import Hinge, Nearby, Perceptual, Steepness, Target, reward_of

PROMPTS, SEEDS, RADIUS = ["a fox", "two bees"], [4, 9], 0.05


def test_the_nearby_image_is_a_step_against_the_gradient() -> None:
    """For the reward -|x - c|^2 / 2 the gradient is c - x, so that the nearby image is further away by the radius."""
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    reward = reward_of(lambda x, prompts: -(x - 0.5).flatten(1).square().sum(1) / 2, name="near gray")
    away = (images.detach() - 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(Nearby(reward, RADIUS)(images, [""] * 3), -((away + RADIUS) ** 2) / 2)
    steep = Steepness(reward, RADIUS)(images, [""] * 3)
    torch.testing.assert_close(steep, ((away + RADIUS) ** 2 - away**2) / 2)
    (gradient,) = torch.autograd.grad(Nearby(reward, RADIUS)(images, [""] * 3).sum(), images)
    out = (images.detach() - 0.5).flatten(1) / away[:, None]
    torch.testing.assert_close(gradient.flatten(1), -(away + RADIUS)[:, None] * out)  # the step is a constant
    flat = reward_of(lambda x, prompts: 0 * x.flatten(1).sum(1), name="flat")
    assert Nearby(flat)(images, [""] * 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", [SDO(), DRaFTLV()], ids=str)
def test_the_gradient_is_that_of_the_definition(method: Method) -> None:
    model, adapter = prepared("epsilon")
    plan, weights = method.plan(model.grid(4), Random(1)), adapter.parameters()
    before = [weight.detach().clone() for weight in weights]
    near = Nearby(reward_of(score), RADIUS)

    def gradient() -> torch.Tensor:
        for weight in weights:
            weight.grad = None
        cr.gradient(model, plan, near, PROMPTS, SEEDS)
        return gradients(weights).clone()

    first = gradient()
    for weight, piece in zip(weights, (RADIUS * first / first.norm()).split([w.numel() for w in weights]), strict=True):
        weight.data += piece.view_as(weight)
    expected = gradient()
    for weight, value in zip(weights, before, strict=True):
        weight.data.copy_(value)
        weight.grad = None
    Flat(Paths(), RADIUS, lambda: weights).add(model, plan, Objective.of(reward_of(score)), Batch(PROMPTS, SEEDS))
    torch.testing.assert_close(gradients(weights), expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    assert not torch.allclose(expected, first, rtol=1e-3)


def test_a_run_with_it_trains_and_another_radius_is_another_run(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32))
    small: dict[str, Any] = {"updates": 2, "batch": 4, "sample_steps": 3, "rank": 2, "lr": 1e-2, "sample_every": 0, "save_every": 0}
    rows = {}
    for radius in (0.0, 0.05):
        run = cr.finetune(model, "sdo", gray, PROMPTS, out=tmp_path / str(radius), flat=radius, **small)
        rows[radius] = [row["grad_norm"] for row in run.metrics()]
    assert rows[0.0] != rows[0.05]
    for method, radius, said in (("sdo", -1.0, "flat is -1"), ("grpo", 0.1, "which GRPO.* does not take; leave flat out")):
        with pytest.raises(cr.UserError, match=said):
            cr.finetune(model.solving("sde"), method, gray, PROMPTS, out=tmp_path / "bad", flat=radius, **small)


@pytest.mark.parametrize("kind", [Nearby, Steepness, Target, Hinge])
def test_a_reward_of_a_reward_passes_on_what_images_were(kind: type[Any]) -> None:
    reference = torch.rand(1, 3, 8, 8)
    inner = Perceptual("tiny")
    assert kind(inner, 0.5).with_reference(reference).reward == inner.with_reference(reference)
    assert kind(inner, 0.5).to("cpu") == kind(inner, 0.5)
