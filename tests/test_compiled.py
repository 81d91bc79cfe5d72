"""Compiled networks give eager's images and gradients to rounding, and are compiled once for all scales, levels and prompts."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from families import CASES, SEEDS, Case, loaded, said, shaken
from torch import Tensor
from torch._dynamo.utils import counters

import chainrule as cr
from chainrule import methods
from chainrule.adapters import Band
from chainrule.models.compiled import check_compiler, compiled
from chainrule.rewards import reward_of

WITH_BLOCKS = [name for name in CASES if name not in ("ddpm", "ddim")]
OTHERS = [pytest.param(name, marks=pytest.mark.heavy) for name in WITH_BLOCKS if name != "sd"]
bright = reward_of(lambda images, prompts: images.float().mean((1, 2, 3)), name="bright")


def looked(model: cr.Model, case: Case, memory: str = "recompute") -> tuple[Tensor, Tensor]:
    """Images with an adapter on, and the gradient at it."""
    guidance = case.guidances[-1]
    images = model.render(said(case), SEEDS, 3, guidance)
    for weight in model.network.parameters():
        weight.grad = None
    cr.gradient(model, methods.DRaFT(2).plan(model.grid(3), Random(0)), bright, said(case), SEEDS, guidance=guidance, memory=memory)
    return images, torch.cat([w.grad.flatten() for w in model.network.parameters() if w.grad is not None])


@pytest.mark.parametrize("name", ["sd", *OTHERS])
def test_compiled_blocks_answer_as_eager_ones_and_are_compiled_once(name: str) -> None:
    """By the backend that traces as all others do and then runs eager's operations."""
    case = CASES[name]
    model = loaded(case)
    shaken(model)
    expected = {memory: looked(model, case, memory) for memory in ("recompute", "blocks")}
    torch._dynamo.reset()
    counters.clear()
    compiled(model, "aot_eager")
    for memory, (images, gradient) in expected.items():
        found = looked(model, case, memory)
        torch.testing.assert_close(found[0], images, rtol=0, atol=2e-5)
        torch.testing.assert_close(found[1], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    for scale in (0.5, 0.6):  # the second scale that a graph sees makes scales numbers that are read and not built in
        model.active["mine"] = Band(scale)
        model.render(said(case), SEEDS, 3, case.guidances[-1])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for scale, seeds, steps in ((0.7, [5, 6], 3), (-1.25, [7, 8], 4)):
        model.active["mine"] = Band(scale)
        model.render(said(case)[::-1], seeds, steps, case.guidances[-1])
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.heavy
def test_the_real_compiler_makes_the_same_images_and_gradients() -> None:
    check_compiler("cpu")
    case = CASES["sd"]
    model = loaded(case)
    shaken(model)
    images, gradient = looked(model, case)
    found = looked(compiled(model), case)
    torch.testing.assert_close(found[0], images, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], gradient, rtol=1e-2, atol=1e-4 * float(gradient.abs().max()))
    torch._dynamo.reset()


def test_without_a_compiler_it_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.models.compiled.shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(cr.UserError, match=r"compile needs a C\+\+ compiler on the CPU"):
        cr.load("no/such-model", device="cpu", compile=True)
    monkeypatch.setattr("chainrule.models.compiled.find_spec", lambda name: None)
    with pytest.raises(cr.UserError, match="compile needs triton on a GPU"):
        check_compiler("cuda:0")
    with pytest.raises(cr.UserError, match="network is 'cpu' and compile is on"):
        cr.load("tiny-emoji", network="cpu", compile=True)
    with pytest.raises(cr.UserError, match="names no blocks"):
        compiled(loaded(CASES["ddpm"]))


def test_unets_are_opened_channels_last_and_a_pipeline_object_is_left_as_it_is(tmp_path: Any) -> None:
    pipe = CASES["sd"].pipe()
    own = cr.load(pipe)
    assert all(w.is_contiguous() for w in own.network.parameters())
    pipe.save_pretrained(tmp_path)
    model = cr.load(tmp_path)
    weights = [w for w in model.network.parameters() if w.ndim == 4 and w.shape[1] > 1 and w.shape[2] > 1]
    assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    torch.testing.assert_close(model.render(["a fox"], [0], 3), own.render(["a fox"], [0], 3), rtol=0, atol=1e-5)
