"""One contract for every model family: its own pipeline's samples, plain autograd's gradient, adapters there and back, dtypes."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from families import CASES, PROMPTS, SEEDS, TALL, Case, images_of, loaded, said, shaken
from torch import Tensor

import chainrule as cr
from chainrule import methods
from chainrule.adapters import save_bands, selected
from chainrule.adapters.select import layers_of
from chainrule.learner import gradients
from chainrule.meters import peak_bytes
from chainrule.models import attach
from chainrule.models.quantize import PACKAGES

TEXTS = [name for name, case in CASES.items() if case.texts]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=[*CASES.values(), *TALL.values()], ids=[*CASES, *(f"{name}-tall" for name in TALL)])
def shape(request: pytest.FixtureRequest) -> Case:
    """Every family, square and higher than wide."""
    case: Case = request.param
    return case


def test_images_are_those_of_the_pipeline(shape: Case) -> None:
    for guidance in shape.guidances:
        pipe = shape.pipe()
        theirs = images_of(shape.run(pipe, PROMPTS, SEEDS, guidance, shape.steps, output_type="np"))
        ours = loaded(shape, pipe).render(said(shape), SEEDS, shape.steps, guidance).permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - theirs).max() < 2e-5


def test_latents_are_those_of_the_pipeline_at_every_step(shape: Case) -> None:
    """What the scheduler's own step answers, with guidance and without."""
    for guidance in shape.guidances:
        pipe, theirs = shape.pipe(), []
        step = pipe.scheduler.step

        @functools.wraps(step)
        def keep(*arguments: Any, step: Any = step, theirs: list[Tensor] = theirs, **options: Any) -> Any:
            answer = step(*arguments, **options)
            theirs.append(answer[0] if isinstance(answer, tuple) else answer.prev_sample)
            return answer

        pipe.scheduler.step = keep
        shape.run(pipe, PROMPTS, SEEDS, guidance, shape.steps, output_type="np")
        model = loaded(shape, pipe)
        ours, grid = list(model.states(said(shape), SEEDS, shape.steps, guidance)), model.grid(shape.steps)
        assert len(ours) == len(theirs) == shape.steps
        for mine, other, level in zip(ours, theirs, grid[1:], strict=True):
            # Euler's states are in units of 1 / alpha.
            scale = model.solver.process.schedule(level)[0] if type(pipe.scheduler).__name__.startswith("Euler") else 1.0
            wanted = shape.latents(other) * scale
            # float32 keeps seven digits of the largest: an untrained PixArt's states reach hundreds.
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=max(1e-5, 1e-6 * float(wanted.abs().max())))


@pytest.mark.parametrize("name", TEXTS)
def test_the_gradient_of_two_steps_is_plain_autograds_through_the_pipeline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own code with its graph, then the VAE: nothing here is ours but the reward."""
    case = CASES[name]
    pipe, guidance = case.pipe(), case.guidances[-1]
    model = loaded(case, pipe)
    adapter = shaken(model)
    score = lambda images, prompts: -(images - 0.4).square().mean((1, 2, 3))
    plan = methods.DRaFT().plan(model.grid(2), Random(0))
    cr.gradient(model, plan, score, PROMPTS, SEEDS, guidance=guidance)
    ours = {key: weight.grad for key, weight in adapter.named_parameters().items()}
    monkeypatch.setattr(type(pipe), "__call__", type(pipe).__call__.__wrapped__)  # without its no_grad
    with selected(model.network, {"mine": 1.0}):
        latents = case.latents(case.run(pipe, PROMPTS, SEEDS, guidance, 2, output_type="latent").images)
    units = pipe.vae.config
    images = pipe.vae.decode(latents / units.scaling_factor + (getattr(units, "shift_factor", None) or 0)).sample / 2 + 0.5
    loss = -score(images.clamp(0, 1), PROMPTS).mean()
    theirs = torch.autograd.grad(loss, adapter.parameters(), allow_unused=True)
    largest = max(float(g.abs().max()) for g in theirs if g is not None)
    assert largest > 0
    for (key, mine), other in zip(ours.items(), theirs, strict=True):
        if other is None:  # the last block's text side has no way to the image
            assert mine is None or not mine.any(), key
            continue
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=2e-4 * largest, msg=lambda text, key=key: f"{key}: {text}")


def test_an_adapter_comes_back_in_the_plain_pipeline_and_goes_without_a_trace(case: Case, tmp_path: Path) -> None:
    pipe, guidance = case.pipe(), case.guidances[-1]
    model = loaded(case, pipe)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    bare = model.render(said(case), SEEDS, case.steps, guidance)
    adapter = shaken(model)
    tuned = model.render(said(case), SEEDS, case.steps, guidance)
    assert float((tuned - bare).abs().max()) > 1e-3
    adapter.save(tmp_path)
    model.drop(adapter)
    after = model.network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)

    fresh = case.pipe()
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    else:
        attach(fresh, tmp_path)
    theirs = images_of(case.run(fresh, PROMPTS, SEEDS, guidance, case.steps, output_type="np"))
    np.testing.assert_allclose(theirs, tuned.permute(0, 2, 3, 1).numpy(), atol=2e-5)
    again = loaded(case).using(tmp_path).render(said(case), SEEDS, case.steps, guidance)
    torch.testing.assert_close(again, tuned, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.heavy)])
def test_half_precision_weights_train_an_adapter_in_float32(case: Case, dtype: torch.dtype) -> None:
    model = loaded(case, case.pipe(dtype=dtype))
    adapter = shaken(model)
    assert model.noise(SEEDS).dtype == torch.float32 and {w.dtype for w in adapter.parameters()} == {torch.float32}
    plan = methods.DRaFT(1).plan(model.grid(2), Random(0))
    # A reward so small that its gradient is below the smallest number of float16; twice, to see that gradients add up.
    tiny = lambda images, _: 1e-4 * images.square().mean((1, 2, 3))
    exact = loaded(case, case.pipe())
    reference = shaken(exact)
    for network in (model, exact):
        for _ in range(2):
            cr.gradient(network, plan, tiny, said(case), SEEDS, guidance=1.0)
    pairs = [(w.grad, r.grad) for w, r in zip(adapter.parameters(), reference.parameters(), strict=True) if r.grad is not None]
    assert all(w is not None and w.dtype == torch.float32 for w, _ in pairs)
    ours, theirs = (torch.cat([g.flatten() for g in each]) for each in zip(*pairs, strict=True))
    assert torch.cosine_similarity(ours, theirs, dim=0, eps=1e-30) > 0.9 and 0.8 < float(ours.norm() / theirs.norm()) < 1.25


def let_bitsandbytes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks for a GPU, but bitsandbytes has kernels for a CPU; those for one with AVX-512 want larger layers."""
    from bitsandbytes.nn import Linear4bit
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
    make = Linear4bit.__init__

    def made(layer: Linear4bit, *args: object, **kwargs: object) -> None:
        make(layer, *args, **kwargs)
        layer.support_avx512bf16_for_cpu = False

    monkeypatch.setattr(Linear4bit, "__init__", made)


@pytest.mark.parametrize("quantize", PACKAGES)
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_an_adapter_trains_on_weights_in_fewer_bits(
    name: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(PACKAGES[quantize])
    if PACKAGES[quantize] == "bitsandbytes" and not torch.cuda.is_available():
        let_bitsandbytes_on_the_cpu(monkeypatch)
    case = CASES[name]
    case.pipe().save_pretrained(tmp_path)
    model = cr.load(tmp_path, dtype="bfloat16", size=case.size, quantize=quantize)
    adapter = shaken(model)
    held = {type(layer.get_base_layer().weight).__name__ for layer in layers_of(model.network)}
    assert held == {{"int8": "Int8Tensor", "8bit": "Int8Params", "4bit": "Params4bit"}[quantize]}
    bright = lambda images, _: images.mean((1, 2, 3))
    plan = methods.SDO().plan(model.grid(3), Random(0))
    cr.gradient(model, plan, bright, PROMPTS, SEEDS, guidance=case.guidances[-1])
    assert any(w.grad is not None and w.grad.any() and w.grad.dtype == torch.float32 for w in adapter.parameters())
    model.drop(adapter)
    exact = cr.load(tmp_path, dtype="bfloat16", size=case.size).render(PROMPTS, SEEDS, 3, case.guidances[-1])
    assert float((model.render(PROMPTS, SEEDS, 3, case.guidances[-1]) - exact).abs().mean()) < (0.1 if quantize == "4bit" else 0.05)


def test_quantization_that_is_not_there_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.models.quantize.find_spec", lambda name: None)
    with pytest.raises(cr.UserError, match="quantize is '4bit', which needs bitsandbytes; pip install bitsandbytes"):
        cr.load("tiny-emoji", quantize="4bit")
    with pytest.raises(cr.UserError, match="unknown quantize '3bit'"):
        cr.load("tiny-emoji", quantize="3bit")


def test_adapters_by_level_answer_in_the_plain_pipeline(case: Case, tmp_path: Path) -> None:
    """ShortFT's: another adapter for the last calls, at the same levels in plain diffusers."""
    pipe, guidance = case.pipe(), case.guidances[-1]
    model = loaded(case, pipe)
    grid = model.grid(case.steps)
    spans = {"early": ((grid[2], None),), "late": ((0, grid[2]),)}
    for i, (name, levels) in enumerate(spans.items()):
        adapter = model.adapt(name, rank=2, levels=levels)
        torch.manual_seed(i)
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.2)
        adapter.save(tmp_path / name)
    save_bands(tmp_path, spans)
    ours = model.render(said(case), SEEDS, case.steps, guidance)
    fresh = case.pipe()
    with attach(fresh, tmp_path):
        theirs = images_of(case.run(fresh, PROMPTS, SEEDS, guidance, case.steps, output_type="np"))
    np.testing.assert_allclose(theirs, ours.permute(0, 2, 3, 1).numpy(), atol=2e-5)


def test_blocks_made_again_change_no_gradient_and_hold_less(case: Case) -> None:
    """Network and VAE, under adapters by level: the second forward pass must see those of the first."""
    model, found, peaks = loaded(case), {}, {}
    grid = model.grid(3)
    adapters = [model.adapt("early", rank=2, levels=((grid[1], None),)), model.adapt("late", rank=2, levels=((0, grid[1]),))]
    for i, weight in enumerate(weight for adapter in adapters for weight in adapter.parameters()):
        torch.manual_seed(i)
        weight.data.normal_(0, 0.2)
    bright = lambda images, _: -(images - 0.3).square().mean((1, 2, 3))
    plan = methods.DRaFT().plan(grid, Random(0))
    for memory in ("recompute", "blocks"):
        run = lambda memory=memory: cr.gradient(model, plan, bright, said(case), SEEDS, guidance=case.guidances[-1], memory=memory)
        peaks[memory] = peak_bytes(run)
        found[memory] = gradients([weight for adapter in adapters for weight in adapter.parameters()]).clone()
        for weight in (weight for adapter in adapters for weight in adapter.parameters()):
            weight.grad = None
    scale = float(found["recompute"].abs().max())
    torch.testing.assert_close(found["blocks"], found["recompute"], rtol=1e-4, atol=1e-5 * scale)
    # Reading long prompts by T5 is what these small transformers need most memory for.
    even = model.component == "transformer" and peaks["blocks"] == peaks["recompute"]
    assert peaks["blocks"] < peaks["recompute"] or even, peaks
    assert not model.network.is_gradient_checkpointing


IMAGE_TO_IMAGE = {"flux": "Flux", "sd3": "StableDiffusion3", "sdxl": "StableDiffusionXL"}


@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_levels_are_the_networks_own_in_pipelines_for_other_things_too(name: str, tmp_path: Path) -> None:
    """Which adapter answered is seen in the layers that ran, call by call."""
    case = CASES[name]
    model = loaded(case)
    for part, levels in (("early", (500, None)), ("late", (0, 500))):
        model.adapt(part, rank=2, levels=(levels,)).save(tmp_path / part)
    save_bands(tmp_path, {"early": ((500, None),), "late": ((0, 500),)})
    pipe = getattr(diffusers, f"{IMAGE_TO_IMAGE[name]}Img2ImgPipeline")(**case.pipe().components)
    pipe.set_progress_bar_config(disable=True)
    ran: list[set[str]] = []
    with attach(pipe, tmp_path) as attached:
        network = attached.network
        for layer in layers_of(network):
            layer.register_forward_hook(lambda layer, *_: ran[-1].update(layer.active_adapters))
        answer = network.forward

        def call(*arguments: Any, **options: Any) -> Any:
            ran.append(set())
            return answer(*arguments, **options)

        network.forward = call
        image = torch.rand(1, 3, 16, 16)
        pipe(prompt="a fox", image=image, strength=0.8, num_inference_steps=10, guidance_scale=1.0)
    times = pipe.scheduler.timesteps.tolist()[-len(ran) :]
    assert len(ran) == 8 and ran == [{"attached0"} if time >= 500 else {"attached1"} for time in times]


def test_a_saved_folder_is_the_same_model(case: Case, tmp_path: Path) -> None:
    pipe = case.pipe()
    expected = loaded(case, pipe).render(said(case), SEEDS, 2, case.guidances[-1])
    pipe.save_pretrained(tmp_path)
    model = cr.load(tmp_path, size=case.size)
    torch.testing.assert_close(model.render(said(case), SEEDS, 2, case.guidances[-1]), expected, rtol=0, atol=2e-5)


def test_latents_there_and_back(shape: Case) -> None:
    """What the VAE's own encoder says, in the chain's units: decoding it again goes by the same scale and shift."""
    model = loaded(shape)
    codec = model.codec
    images: Tensor = torch.rand(2, 3, codec.height, codec.width)
    latents = codec.encode(images)
    assert latents.shape == (2, *codec.latent_shape) and codec.decode(latents).shape == images.shape
    vae = getattr(model.pipe, "vae", None)
    if vae is not None:
        mean = vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(codec.decode(latents), (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
