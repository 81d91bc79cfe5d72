"""Weights that stay on the CPU: the same images and gradients, and one block's copies at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import CASES, SEEDS, Case, loaded, said, shaken
from torch import Tensor

import chainrule as cr
from chainrule import methods, offload
from chainrule.footprint import count
from chainrule.models.outline import outline
from chainrule.offload import away, blocks_of, is_lent, lend
from chainrule.rewards import reward_of
from chainrule.settings import Finetuning

bright = reward_of(lambda images, prompts: images.float().mean((1, 2, 3)), name="bright")
WITH_BLOCKS = [name for name in CASES if name not in ("ddpm", "ddim")]


def gradient_of(model: cr.Model, case: Case, memory: str) -> Tensor:
    adapter = shaken(model)
    plan = methods.DRaFT(2).plan(model.grid(3), Random(0))
    cr.gradient(model, plan, bright, said(case), SEEDS, guidance=case.guidances[-1], memory=memory)
    found = torch.cat([weight.grad.flatten() for weight in adapter.parameters() if weight.grad is not None])
    model.drop(adapter)
    return found


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_lent_blocks_change_no_number_and_are_there_one_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both places are the CPU a copy is made all the same, to see when it goes."""
    case = CASES[name]
    expected = loaded(case).render(said(case), SEEDS, 2), gradient_of(loaded(case), case, "blocks")
    model = loaded(case)
    blocks = blocks_of(model.network)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def copied(weight: Tensor, device: torch.device) -> Tensor:
        nonlocal most
        copy = weight if weight.requires_grad else weight.clone()
        if copy is not weight:
            alive.add(copy)
            most = max(most, sum(each.numel() for each in alive))
        return copy

    monkeypatch.setattr(offload, "copied", copied)
    lend(blocks, "cpu")
    assert all(map(is_lent, blocks)) and len(blocks) > 1
    assert torch.equal(model.render(said(case), SEEDS, 2), expected[0])
    torch.testing.assert_close(
        gradient_of(model, case, "blocks"), expected[1], rtol=1e-4, atol=1e-6 * float(expected[1].abs().max())
    )
    sizes = [sum(tensor.numel() for tensor in (*block.parameters(), *block.buffers())) for block in blocks]
    assert 0 < most <= 2.5 * max(sizes) and most < sum(sizes) and not len(alive)


def test_adapters_of_lent_blocks_are_where_the_network_computes() -> None:
    """Seen on the meta device: the blocks' weights are on the CPU, everything else is there."""
    model = loaded(CASES["sd3"])
    blocks = blocks_of(model.network)
    for block in blocks:
        block.forward = offload.partial(offload._lent, block, torch.device("meta"))  # type: ignore[method-assign]
    away(model.network, "meta", blocks)
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    places = {(weight.device.type, id(weight) in inside) for weight in model.network.parameters()}
    assert places == {("cpu", True), ("meta", False)}
    assert {weight.device.type for weight in model.adapt(rank=2).parameters()} == {"meta"}


def test_what_lending_saves_is_counted(tmp_path: Path) -> None:
    CASES["sd3"].pipe().save_pretrained(tmp_path)
    settings = Finetuning(sample_steps=2, rank=2, micro_batch=1, memory="blocks")
    found = {
        place: count(outline(tmp_path, size=(16, 16), network=place), methods.DRaFT(1), bright, settings, (1,))
        for place in ("device", "cpu")
    }
    blocks = blocks_of(outline(tmp_path, size=(16, 16)).network)
    sizes = [sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers())) for block in blocks]
    assert found["device"].fixed["network"] - found["cpu"].fixed["network"] == sum(sizes)
    assert found["cpu"].peaks[1] <= found["device"].peaks[1] + 2 * max(sizes)


def test_what_cannot_be_lent_is_said() -> None:
    with pytest.raises(
        cr.UserError, match="a UNet2DModel names no blocks, which alone could be elsewhere; leave network on the device"
    ):
        blocks_of(loaded(CASES["ddpm"]).network)
    with pytest.raises(cr.UserError, match="unknown network 'gpu'"):
        cr.load("tiny-emoji", network="gpu")


def test_a_model_opened_with_its_blocks_on_the_cpu_gives_the_same_image() -> None:
    here, there = cr.load("tiny-emoji"), cr.load("tiny-emoji", network="cpu")
    assert any(map(is_lent, there.network.modules()))
    assert torch.equal(there.render(["a fox"], [0], 3), here.render(["a fox"], [0], 3))
