"""Adapters: identity, exact removal, diffusers' format, mixes, and selection inside a chain."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import chainrule as cr
from chainrule.adapters import Active, Band, inject, recompute, selected
from chainrule.adapters.files import read

PROMPTS, SEEDS = ["a fox", "two bees"], [3, 8]


def shaken(model: cr.Model, name: str, rank: int = 2, seed: int = 0, alpha: float | None = None) -> cr.Adapter:
    """An adapter that does something."""
    adapter = model.adapt(name, rank=rank, alpha=alpha)
    torch.manual_seed(seed)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.15)
    return adapter


def latents(model: cr.Model) -> torch.Tensor:
    return list(model.states(PROMPTS, SEEDS, 3, 2.0))[-1]


def test_a_fresh_adapter_is_the_identity_and_removal_restores_the_bits():
    model = cr.load(make_pipeline(dtype=torch.float32))
    before, modules = latents(model), [type(m) for m in model.network.modules()]
    adapter = model.adapt("mine", rank=4)
    assert torch.equal(latents(model), before)
    for weight in adapter.parameters():
        weight.data.normal_()
    assert not torch.equal(latents(model), before)
    adapter.remove()
    assert torch.equal(latents(model), before) and [type(m) for m in model.network.modules()] == modules


def test_at_rest_the_pipeline_is_the_base_model():
    model = cr.load(make_pipeline(dtype=torch.float32))
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    generators = lambda: [torch.Generator().manual_seed(s) for s in SEEDS]
    before = model.pipe(PROMPTS, generator=generators(), **call).images
    shaken(model, "mine")
    assert torch.equal(model.pipe(PROMPTS, generator=generators(), **call).images, before)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_a_saved_adapter_gives_the_same_image_in_plain_diffusers(tmp_path, alpha):
    model = cr.load(make_pipeline(dtype=torch.float32))
    adapter = shaken(model, "mine", alpha=alpha)
    ours = latents(model)
    adapter.save(tmp_path / "lora")
    pipe = make_pipeline(dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    theirs = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=2.0, output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
    ).images  # fmt: skip
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    again = cr.load(make_pipeline(dtype=torch.float32)).using(tmp_path / "lora")
    torch.testing.assert_close(latents(again), ours, rtol=0, atol=0)


def test_a_mix_is_the_scaled_sum(tmp_path):
    model = cr.load(make_pipeline(dtype=torch.float64))
    first, second = shaken(model, "a", rank=2, seed=1), shaken(model, "b", rank=3, seed=2, alpha=6.0)
    first.save(tmp_path / "a"), second.save(tmp_path / "b")
    model.active.update(a=Band(0.6), b=Band(-0.5))
    expected = latents(model)
    mixed = cr.mix({tmp_path / "a": 0.6, tmp_path / "b": -0.5})
    assert mixed.rank == 5
    mixed.save(tmp_path / "both")
    alone = cr.load(make_pipeline(dtype=torch.float64)).using(tmp_path / "both")
    torch.testing.assert_close(latents(alone), expected, rtol=1e-10, atol=1e-10)


def test_scale_zero_is_the_base_and_steps_bound_where_an_adapter_is_on(tmp_path):
    model = cr.load(make_pipeline(dtype=torch.float32))
    base = list(model.states(PROMPTS, SEEDS, 5, 2.0))
    shaken(model, "mine").save(tmp_path)
    plain = cr.load(make_pipeline(dtype=torch.float32))
    assert torch.equal(list(plain.using(tmp_path, scale=0).states(PROMPTS, SEEDS, 5, 2.0))[-1], base[-1])
    late = list(plain.using(tmp_path, adapter_steps=(3, 5), steps=5).states(PROMPTS, SEEDS, 5, 2.0))
    assert torch.equal(late[2], base[2]) and not torch.equal(late[3], base[3])
    assert Band(0.5, ((4, 10),)).at(10) == 0.5 and Band(0.5, ((4, 10),)).at(4) == 0


def _net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double().requires_grad_(False)
    for name in ("early", "late"):
        for weight in inject(net, name, rank=2, targets=("0", "2")).parameters():
            weight.data.normal_(0, 0.4)
    return net


def _grads(net, inner) -> torch.Tensor:
    """Two calls under two adapters, then backward: what a chain does."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    for name in ("early", "late"):
        with selected(net, {name: 1.0}):
            x = x - 0.5 * inner(net, x)
    loss = x.square().sum()
    with ThreadPoolExecutor(1) as pool:  # CUDA runs backward, hence the second forward, on its own thread
        pool.submit(loss.backward).result()
    live = [p for p in net.parameters() if p.requires_grad]
    found = torch.cat([p.grad.flatten() for p in live])
    for p in live:
        p.grad = None
    return found


def test_selection_loses_no_gradient_and_survives_recomputation():
    """peft's set_adapter would drop the first adapter's gradient; torch's checkpoint would recompute with the wrong one."""
    net = _net()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
    by_hand, layers = x, [net[0], net[2]]
    for name in ("early", "late"):
        h = by_hand
        for i, layer in enumerate(layers):
            h = layer.base_layer(h) + h @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
            h = torch.tanh(h) if i == 0 else h
        by_hand = by_hand - 0.5 * h
    live = [p for p in net.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(by_hand.square().sum(), live)])
    assert len(live) == 8
    torch.testing.assert_close(_grads(net, lambda f, x: f(x)), expected)
    torch.testing.assert_close(_grads(net, recompute), expected)
    naive = lambda f, x: checkpoint(f, x, use_reentrant=False)
    with pytest.raises(Exception):  # noqa: B017  torch raises CheckpointError, or peft's layers give wrong numbers
        torch.testing.assert_close(_grads(net, naive), expected)


def test_a_unet_with_its_own_checkpointing_gives_the_same_gradient():
    from random import Random

    from chainrule.methods import DRaFT

    model = cr.load(make_pipeline())
    adapter = shaken(model, "mine")
    plan = DRaFT(2).plan(model.grid(4), Random(0))
    score = lambda images, prompts: -(images - 0.3).square().mean((1, 2, 3))
    found = []
    for blocks in (False, True):
        if blocks:
            model.pipe.unet.enable_gradient_checkpointing(recompute)
        cr.gradient(model, plan, score, PROMPTS, SEEDS, guidance=2.0, memory="keep")
        found.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))
        for p in adapter.parameters():
            p.grad = None
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)


def test_selecting_restores_and_does_not_touch_requires_grad():
    net = _net()
    frozen = [p for n, p in net.named_parameters() if ".early." in n]
    for p in frozen:
        p.requires_grad_(False)
    with selected(net, {"early": 0.5, "late": 2.0}):
        with selected(net, {}):
            assert net[0]._active_adapter == []
        assert net[0].scaling == {"early": 0.5, "late": 2.0}
    assert net[0]._active_adapter == [] and net[0].scaling == {"early": 1.0, "late": 1.0}
    assert not any(p.requires_grad for p in frozen)
    assert Active({"late": Band(2.0, ((0, 5),))}).at(6) == {}


def test_bad_adapters_are_refused(tmp_path):
    model = cr.load(make_pipeline(dtype=torch.float32))
    with pytest.raises(cr.UserError, match="rank is 0"):
        model.adapt("mine", rank=0)
    with pytest.raises(cr.UserError, match="no adapter at"):
        model.using(tmp_path / "nothing")
    (tmp_path / "lora.bin").write_bytes(b"x")
    with pytest.raises(cr.UserError, match="pickled weights are refused"):
        read(tmp_path / "lora.bin")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not a file")
    with pytest.raises(cr.UserError, match="damaged"):
        read(tmp_path)
    key = "unet.some.other.to_q"
    other = {f"{key}.lora_A.weight": torch.zeros(2, 8), f"{key}.lora_B.weight": torch.zeros(8, 2)}
    save_file(other, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(cr.UserError, match="made for another model"):
        model.using(tmp_path)
    with pytest.raises(cr.UserError, match="nothing to mix"):
        cr.mix({})
