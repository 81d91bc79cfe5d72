"""Loading real formats, and sampling exactly as diffusers does."""

from __future__ import annotations

import errno
import itertools
import runpy
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler, StableDiffusionPipeline
from families import CASES
from pipelines import make_pipeline

import chainrule as cr
from chainrule import methods
from chainrule.adapters import selected

PROMPTS, SEEDS = ["a fox", "two bees", "a cat"], [3, 8, 1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_sampling_equals_the_diffusers_pipeline_at_every_step(prediction, guidance, set_alpha_to_one):
    pipe = make_pipeline(prediction, torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=set_alpha_to_one)
    theirs: list[torch.Tensor] = []

    def keep(pipe, i, t, kwargs):
        theirs.append(kwargs["latents"].clone())
        return kwargs

    images = pipe(
        PROMPTS, num_inference_steps=10, guidance_scale=guidance, callback_on_step_end=keep, output_type="np",
        generator=[torch.Generator().manual_seed(s) for s in SEEDS],
    ).images  # fmt: skip
    model = cr.load(pipe)
    ours = list(model.states(PROMPTS, SEEDS, 10, guidance))
    assert len(ours) == len(theirs) == 10
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    pictures = model.sample(PROMPTS, SEEDS, 10, guidance)
    for picture, image in zip(pictures, images, strict=True):
        assert np.abs(np.asarray(picture) / 255 - image).max() <= 0.5 / 255 + 1e-4


def test_a_local_folder_and_a_pipeline_object_give_the_same_model(sd_folder):
    from_folder = cr.load(sd_folder)
    from_object = cr.load(StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None))
    torch.testing.assert_close(
        from_folder.render(["a fox"], [0], 4, 3.0), from_object.render(["a fox"], [0], 4, 3.0), rtol=0, atol=1e-5
    )
    assert from_folder.name == str(sd_folder) and all(not p.requires_grad for p in from_folder.network.parameters())


def test_a_hub_id_goes_to_the_hub_and_says_so_when_it_cannot(monkeypatch):
    with pytest.raises(cr.UserError, match=r"nobody/nothing.*hub"):
        cr.load("nobody/nothing")


def test_a_hub_id_in_the_local_cache_is_loaded(sd_folder, tmp_path, monkeypatch):
    """What a download leaves behind: blobs and a snapshot in the hub's cache layout."""
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(sd_folder, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    try:
        model = cr.load("some/model")
    except cr.UserError:
        model = cr.load(str(snapshot))  # the cache constant moved: the layout itself still loads
    assert model.grid(4)[-1] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_the_weights_is_the_one_asked_for(sd_folder, dtype):
    model = cr.load(sd_folder, dtype=dtype)
    assert next(model.pipe.text_encoder.parameters()).dtype == getattr(torch, dtype)
    adapter = model.adapt(rank=2)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert model.render(["a fox"], [0], 3, 2.0).isfinite().all()


def test_a_scheduler_that_is_not_supported_is_sampled_by_the_nearest_solver_when_asked():
    pipe = make_pipeline(dtype=torch.float32)
    expected = list(cr.load(pipe).states(["a fox"], [0], 5, 2.0))[-1]
    pipe.scheduler = LMSDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(cr.UserError, match="LMSDiscreteScheduler is not supported; sample with the nearest solver, euler"):
        cr.load(pipe)
    torch.testing.assert_close(list(cr.load(pipe, solver="ddim").states(["a fox"], [0], 5, 2.0))[-1], expected)
    assert isinstance(pipe.scheduler, LMSDiscreteScheduler)


def test_grids_are_diffusers_levels():
    model = cr.load(make_pipeline(dtype=torch.float32))
    assert model.grid(50)[:3] == (982, 962, 942) and model.grid(50)[-2:] == (2, 0) and len(model.grid(50)) == 51


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tiny-emojy", "did you mean 'tiny-emoji'"),
        ("no/such/folder", "unknown model 'no/such/folder'"),
        ("./missing", "unknown model"),
    ],
)
def test_unknown_models_are_refused(source, message):
    with pytest.raises(cr.UserError, match=message):
        cr.load(source)


def test_broken_folders_are_refused_before_loading(sd_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(cr.UserError, match=r"no model_index\.json"):
        cr.load(empty)
    pickled = tmp_path / "pickled"
    shutil.copytree(sd_folder, pickled)
    weights = next((pickled / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(cr.UserError, match="is a pickle"):
        cr.load(pickled)
    shutil.rmtree(pickled / "unet")
    with pytest.raises(cr.UserError, match="no unet folder"):
        cr.load(pickled)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    with pytest.raises(cr.UserError, match="AudioLDMPipeline is not a supported model family"):
        cr.load(other)


def test_settings_that_cannot_be_differentiated_are_refused():
    pipe = make_pipeline(dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(cr.UserError, match="clip_sample"):
        cr.load(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert cr.load(pipe).grid(5)[-1] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2000}, "steps is 2000"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"seeds": [1, 2]}, "1 prompts but 2 seeds"),
    ],
)
def test_sampling_settings_out_of_range_are_refused(arguments, message):
    model = cr.load(make_pipeline(dtype=torch.float32))
    with pytest.raises(cr.UserError, match=message):
        model.sample(["a fox"], **arguments)


def test_a_model_of_ones_own_is_written_as_the_example_says():
    """The only network here that no family knows; its gradient is plain autograd's."""
    made = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_model.py"), run_name="example")["model"]()
    adapter = made.adapt(rank=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.1)
    bright = lambda images, prompts: images.mean((1, 2, 3))
    cr.gradient(made, methods.DRaFT().plan(made.grid(3), Random(0)), bright, PROMPTS, SEEDS, guidance=1.0)
    ours = [weight.grad.clone() for weight in adapter.parameters()]
    sigmas, x = made.pipe.scheduler, made.noise(SEEDS)
    sigmas.set_timesteps(3)
    with selected(made.network, {"default": 1.0}):
        for now, then in itertools.pairwise(sigmas.sigmas.tolist()):
            x = x + (then - now) * made.network(x, torch.full((3,), now))
    theirs = torch.autograd.grad(-bright((x / 2 + 0.5).clamp(0, 1), ()).mean(), adapter.parameters())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_a_part_that_prompts_need_is_missed_by_name():
    pipe = make_pipeline(dtype=torch.float32)
    pipe.text_encoder = None
    with pytest.raises(cr.UserError, match="the StableDiffusionPipeline has no text_encoder, which its prompts are read with"):
        cr.load(pipe)


def test_a_vae_in_tiles_is_refused_and_one_in_slices_changes_nothing():
    model = cr.load(make_pipeline(dtype=torch.float32))
    expected = model.render(PROMPTS, SEEDS, 3, 2.0)
    model.pipe.vae.enable_slicing()
    torch.testing.assert_close(model.render(PROMPTS, SEEDS, 3, 2.0), expected, rtol=0, atol=1e-5)
    model.pipe.vae.enable_tiling()
    with pytest.raises(cr.UserError, match=r"decodes in tiles.*disable_tiling"):
        model.render(PROMPTS, SEEDS, 3, 2.0)


def test_a_vae_that_overflows_in_half_precision_is_copied_to_float32():
    pipe = CASES["sdxl"].pipe(dtype=torch.float16)
    latents = torch.randn(1, 4, 8, 8)
    expected = pipe.vae.float().decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    pipe.vae.half()
    torch.testing.assert_close(cr.load(pipe, size=16).codec.decode(latents), expected.clamp(0, 1), rtol=0, atol=1e-6)
    assert {w.dtype for w in pipe.vae.parameters()} == {torch.float16}


@pytest.mark.parametrize(("size", "message"), [(17, "size is 17, but must be a multiple of 2"), (1, "size is 1")])
def test_a_size_the_latents_cannot_have_is_refused(size, message):
    with pytest.raises(cr.UserError, match=message):
        cr.load(make_pipeline(dtype=torch.float32), size=size)
    assert cr.load(make_pipeline(dtype=torch.float32), size=24).render(["a fox"], [0], 2, 1.0).shape == (1, 3, 24, 24)


def test_a_full_disk_is_named_when_a_model_is_downloaded(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", full)
    with pytest.raises(cr.UserError, match="the disk is full"):
        cr.load("some/model")


@pytest.mark.parametrize("device", ["cuda:7", "foo"])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(device):
    with pytest.raises(cr.UserError, match=f"device is '{device}', which torch does not find here"):
        cr.load("tiny-emoji", device=device)


def test_what_a_folder_lacks_is_said_before_loading(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    folder = tmp_path / "model"
    shutil.copytree(sd_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(cr.UserError, match="incomplete: it has no tokenizer folder"):
        cr.load(folder)
    shutil.copytree(sd_folder / "tokenizer", folder / "tokenizer")
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("DDIMScheduler", "LMSDiscreteScheduler"))
    with pytest.raises(cr.UserError, match="LMSDiscreteScheduler is not supported; sample with the nearest solver, euler"):
        cr.load(folder)
    (folder / "model_index.json").write_text("[1]")
    with pytest.raises(cr.UserError, match=r"model_index\.json is damaged"):
        cr.load(folder)


def test_a_folder_of_half_precision_weights_alone_is_loaded(tmp_path):
    pipe = make_pipeline(dtype=torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    expected = cr.load(pipe).render(PROMPTS, SEEDS, 2, 2.0)
    torch.testing.assert_close(cr.load(tmp_path, dtype="float16").render(PROMPTS, SEEDS, 2, 2.0), expected, rtol=0, atol=1e-2)


def test_latents_with_a_mean_and_deviation_of_their_own_are_those_of_the_pipeline():
    case = CASES["sdxl"]
    pipe = case.pipe()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    theirs = case.run(pipe, PROMPTS, SEEDS, 3.0, 3, output_type="np").images
    model = cr.load(pipe, size=16)
    assert np.abs(model.render(PROMPTS, SEEDS, 3, 3.0).permute(0, 2, 3, 1).numpy() - theirs).max() < 2e-5
    latents = model.codec.encode(torch.rand(2, 3, 16, 16))
    mean, deviation = (torch.tensor(pipe.vae.config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    expected = pipe.vae.decode(latents * deviation / 0.13025 + mean).sample / 2 + 0.5
    torch.testing.assert_close(model.codec.decode(latents), expected.clamp(0, 1))


def test_a_place_that_stable_diffusion_3_does_not_have_is_refused():
    with pytest.raises(cr.UserError, match="size is 80, but this model has places for images up to 64 pixels a side"):
        cr.load(CASES["sd3"].pipe(), size=80)
