"""A pipeline as its owner has it: equal to the plain pipeline, or refused in one line that says what to do."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.utils import convert_state_dict_to_diffusers
from families import BETAS, CASES, PROMPTS, SEEDS, images_of, said, shaken
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from pipelines import make_pipeline, score
from safetensors.torch import save_file

import chainrule as cr
from chainrule import methods
from chainrule.errors import Note
from chainrule.models.solvers import REPLACED

LORA = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


MODEL = cr.load(make_pipeline(dtype=torch.float32))
PLAN = methods.DRaFT(1).plan(MODEL.grid(2), Random(0))


def pipeline() -> Any:
    return make_pipeline(dtype=torch.float32)


def styled(folder: Path) -> Any:
    """A pipeline with a LoRA of its owner's, switched on."""
    pipe = pipeline()
    torch.manual_seed(1)
    pipe.unet.add_adapter(LORA, "style")
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    type(pipe).save_lora_weights(folder, unet_lora_layers=state)
    fresh = pipeline()
    fresh.load_lora_weights(folder, adapter_name="style")
    return fresh


def fused(folder: Path, unload: bool) -> Any:
    pipe = styled(folder)
    pipe.fuse_lora()
    if unload:
        pipe.unload_lora_weights()
    return pipe


def changed(change: Callable[[Any], object]) -> Callable[[Path], Any]:
    def made(folder: Path) -> Any:
        pipe = pipeline()
        change(pipe)
        return pipe

    return made


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def wrapped(pipe: Any) -> None:
    pipe.unet = get_peft_model(pipe.unet, LORA)


def pictured(pipe: Any) -> None:
    """An IP-Adapter, of random weights, by the call that `load_ip_adapter` makes."""
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    keys = {f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(16, 16) for i in range(len(layers)) for kind in "kv"}
    shapes = {"proj.weight": (64, 16), "proj.bias": (64,), "norm.weight": (16,), "norm.bias": (16,)}
    picture = {name: torch.randn(shape) for name, shape in shapes.items()}
    pipe.unet._load_ip_adapter_weights([{"image_proj": picture, "ip_adapter": keys}])


def offloaded(pipe: Any) -> None:
    """The hook of accelerate by which diffusers offloads a model."""
    add_hook_to_module(pipe.unet, ModelHook())


def grouped(pipe: Any) -> None:
    here = torch.device("cpu")
    pipe.unet.enable_group_offload(here, here, offload_type="block_level", num_blocks_per_group=1)


def cached(folder: Path) -> Any:
    pipe = CASES["flux"].pipe()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    return pipe


def guided_xl(folder: Path) -> Any:
    """LCM-SDXL: the network reads its guidance in the ordinary SDXL pipeline."""
    pipe = CASES["sdxl"].pipe()
    torch.manual_seed(2)
    network = diffusers.UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=16).eval()
    pipe.register_modules(unet=network, scheduler=diffusers.LCMScheduler(**BETAS))
    return pipe


EQUAL = {
    "as it is": changed(lambda pipe: None),
    "fused and unloaded": lambda folder: fused(folder, unload=True),
    "compiled in place": changed(lambda pipe: pipe.unet.compile(backend="eager")),
    "in training mode": changed(lambda pipe: pipe.unet.train()),
    "checkpointing": changed(lambda pipe: pipe.unet.enable_gradient_checkpointing()),
    "LCM-SDXL": guided_xl,
}
REFUSED = {
    "an active LoRA": (styled, r"has active LoRAs \(style\); call fuse_lora"),
    "fused, not unloaded": (lambda folder: fused(folder, unload=False), r"call pipe\.unload_lora_weights\(\) after fuse_lora"),
    "peft's wrapper": (changed(wrapped), "wrapped by peft; .*merge_and_unload"),
    "compiled": (changed(compiled), r"wrapped by torch.compile; .*pipe\.unet\.compile"),
    "fused projections": (changed(lambda pipe: pipe.fuse_qkv_projections()), "call unfuse_qkv_projections"),
    "an IP-Adapter": (changed(pictured), "call pipe.unload_ip_adapter"),
    "a cache": (cached, "without layerwise casting, caches"),
    "offloading": (changed(offloaded), r"has offloading hooks; call pipe\.remove_all_hooks"),
    "group offloading": (changed(grouped), r"hooks \(group_offloading\)"),
    "no network": (changed(lambda pipe: setattr(pipe, "unet", None)), "has no unet"),
    "layerwise casting": (
        changed(lambda pipe: pipe.unet.enable_layerwise_casting(torch.bfloat16, torch.float32)), "without layerwise casting"
    ),
}  # fmt: skip


SLOW = {"compiled in place": pytest.mark.heavy}  # dynamo traces the network four times


@pytest.mark.parametrize("make", [pytest.param(make, marks=SLOW.get(name, ()), id=name) for name, make in EQUAL.items()])
def test_it_answers_as_the_plain_pipeline_and_a_fresh_adapter_changes_nothing(make, tmp_path):
    case = CASES["sdxl" if make is guided_xl else "sd"]
    pipe = make(tmp_path)
    theirs = images_of(case.run(pipe, PROMPTS, SEEDS, 3.0, 3, output_type="np"))
    model = cr.load(pipe, size=16)
    ours = lambda: model.render(PROMPTS, SEEDS, 3, 3.0).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours(), theirs, atol=2e-5)
    adapter = model.adapt("mine", rank=2)
    np.testing.assert_allclose(ours(), theirs, atol=2e-5)
    model.drop(adapter)
    np.testing.assert_array_equal(images_of(case.run(pipe, PROMPTS, SEEDS, 3.0, 3, output_type="np")), theirs)


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=list(REFUSED))
def test_what_would_be_lost_is_refused_in_one_line(make, said, tmp_path):
    with pytest.raises(cr.UserError, match=said) as caught:
        cr.load(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_lcm_sdxls_network_is_told_its_guidance_as_a_student_too(tmp_path):
    pipe = guided_xl(tmp_path)
    pipe.unet.save_pretrained(tmp_path / "unet")
    model = cr.load(CASES["sdxl"].pipe(), size=16).guided(3.0).with_student(tmp_path / "unet")
    x, condition, w = model.noise(SEEDS), model.embed(PROMPTS), torch.full((len(SEEDS),), model.defaults.guidance - 1)
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]]).float().expand(len(SEEDS), -1)
    with torch.no_grad():
        theirs = pipe.unet(
            x, torch.tensor(500), condition.positive.states, timestep_cond=pipe.get_guidance_scale_embedding(w, 16),
            added_cond_kwargs={"text_embeds": condition.positive.pooled, "time_ids": sizes},
        ).sample  # fmt: skip
        torch.testing.assert_close(model.cast()["student"](x, 501, condition), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("memory", ["recompute", "blocks"])
def test_a_network_that_checkpoints_its_gradients_has_the_same_ones(memory):
    found = []
    for on in (False, True):
        pipe = pipeline()
        if on:
            pipe.unet.enable_gradient_checkpointing()
        model = cr.load(pipe)
        adapter = shaken(model)
        cr.gradient(model, PLAN, score, PROMPTS, SEEDS, guidance=2.0, memory=memory)
        found.append(torch.cat([weight.grad.flatten() for weight in adapter.parameters()]))
    torch.testing.assert_close(found[0], found[1])


# Schedulers


def test_stable_diffusion_as_it_ships_is_sampled_by_ddim_and_says_so():
    pipe = pipeline()
    pipe.scheduler = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    with pytest.warns(Note, match="PNDMScheduler is replaced: sampled by ddim over the same number of steps"):
        ours = cr.load(pipe).render(PROMPTS, SEEDS, 4, 3.0)
    torch.testing.assert_close(ours, cr.load(pipeline()).render(PROMPTS, SEEDS, 4, 3.0))
    assert set(REPLACED) == {"PNDMScheduler"}


def test_settings_that_a_pipeline_mends_are_kept():
    """Old configurations have no steps_offset; the pipeline sets it to 1."""
    parts = {name: value for name, value in pipeline().components.items() if name != "scheduler"}
    scheduler = diffusers.DDIMScheduler(**BETAS, set_alpha_to_one=False)
    pipe = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1
    theirs = images_of(CASES["sd"].run(pipe, PROMPTS, SEEDS, 3.0, 4, output_type="np"))
    for model in (cr.load(pipe), cr.load(pipe).solving(None, {"timestep_spacing": "leading"})):
        ours = model.render(PROMPTS, SEEDS, 4, 3.0)
        np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)


# Folders


def shards(folder: Path) -> None:
    pipeline().save_pretrained(folder, variant="fp16", max_shard_size="40KB")


def mixed(folder: Path) -> None:
    """The network whole, the other parts as the variant alone."""
    pipe = pipeline()
    pipe.save_pretrained(folder)
    for part in ("vae", "text_encoder"):
        shutil.rmtree(folder / part)
        getattr(pipe, part).save_pretrained(folder / part, variant="fp16")


def lacking(folder: Path) -> None:
    """Parts that a pipeline names and a chain never asks, not downloaded."""
    pipeline().save_pretrained(folder)
    place = folder / "model_index.json"
    unused = {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": ["x", "StableDiffusionSafetyChecker"]}
    place.write_text(json.dumps(json.loads(place.read_text()) | unused))


@pytest.mark.parametrize("save", [shards, mixed, lacking])
def test_folders_as_people_have_them_are_loaded(save, tmp_path):
    save(tmp_path)
    expected = MODEL.render(PROMPTS, SEEDS, 2, 3.0)
    torch.testing.assert_close(cr.load(tmp_path).render(PROMPTS, SEEDS, 2, 3.0), expected, rtol=0, atol=2e-5)


# LoRA files


def test_alphas_of_a_flux_file_are_its_scale(tmp_path):
    torch.manual_seed(2)
    case, tensors = CASES["flux"], {}
    pipe = case.pipe()
    for layer in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q"):
        rows, columns = pipe.transformer.get_submodule(layer).weight.shape
        tensors |= {
            f"transformer.{layer}.lora_A.weight": torch.randn(4, columns),
            f"transformer.{layer}.lora_B.weight": torch.randn(rows, 4), f"transformer.{layer}.alpha": torch.tensor(0.4),
        }  # fmt: skip
    equal_to_plain(case, tensors, tmp_path)


def test_kohyas_names_of_sdxls_blocks_are_read(tmp_path):
    torch.manual_seed(3)
    case, tensors = CASES["sdxl"], {}
    pipe = case.pipe()
    for name, layer in (
        ("lora_unet_input_blocks_3_1", "down_blocks.1.attentions.0"), ("lora_unet_middle_block_1", "mid_block.attentions.0"),
    ):  # fmt: skip
        rows, columns = pipe.unet.get_submodule(f"{layer}.transformer_blocks.0.attn1.to_q").weight.shape
        key = f"{name}_transformer_blocks_0_attn1_to_q"
        tensors |= {
            f"{key}.lora_down.weight": torch.randn(4, columns), f"{key}.lora_up.weight": torch.randn(rows, 4),
            f"{key}.alpha": torch.tensor(2.0),
        }  # fmt: skip
    equal_to_plain(case, tensors, tmp_path)


def equal_to_plain(case: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """The file's images here are those of `load_lora_weights`, and others than without it."""
    save_file(tensors, folder / "lora.safetensors")
    pipe = case.pipe()
    bare = cr.load(case.pipe(), size=case.size)
    pipe.load_lora_weights(folder, weight_name="lora.safetensors")
    theirs = images_of(case.run(pipe, PROMPTS, SEEDS, 3.0, 2, output_type="np"))
    ours = bare.using(folder / "lora.safetensors").render(PROMPTS, SEEDS, 2, 3.0)
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=2e-5)
    assert not torch.allclose(bare.render(PROMPTS, SEEDS, 2, 3.0), ours, atol=1e-3)


# Words and numbers as people write them


@pytest.mark.parametrize("word", [torch.bfloat16, "torch.bfloat16", "bfloat16", "bf16"], ids=str)
def test_a_type_may_be_written_in_every_way(word, sd_folder):
    assert cr.load(sd_folder, dtype=word).network.dtype == torch.bfloat16


def test_one_seed_one_prompt_and_one_reward_need_no_list(tmp_path):
    model = cr.load(pipeline())
    assert np.array_equal(model.sample("a fox", 3, 2)[0], model.sample(["a fox"], [3], 2)[0])
    table = cr.evaluate(model, ["a fox"], "symmetry", seeds=0, steps=2)
    assert list(table.rows) == [model.name] and list(table.rows[model.name]) == ["symmetry"]
    one, several = (cr.gradient(model, PLAN, "symmetry", *given).rewards for given in (("a fox", 3), (["a fox"], np.array([3]))))
    assert torch.equal(one, several)
    small = {"updates": 1, "batch": 1, "sample_steps": 2, "rank": 1, "sample_every": 0}
    run = cr.finetune(model, "draft-1", "symmetry", ["a fox"], out=tmp_path / "run", **small)
    assert run.config.method == {"name": "draft", "k": 1} and run.config.reward == "symmetry"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.sample([None]), "prompt 1 is None"),
        (lambda model: model.sample(5), "prompt 1 is 5"),
        (lambda model: model.render(["a", None], [0, 1]), "prompt 2 is None"),
        (lambda model: model.noise([2**64]), "a seed is 18446744073709551616"),
        (lambda model: model.sample(["a fox"], ["x"]), "a seed is 'x'"),
        (lambda model: cr.gradient(model, PLAN, "symmetry", [None], 0), "prompt 1 is None"),
        (lambda model: cr.gradient(model, PLAN, "symmetry", ["a", "b"], 0), "2 prompts but 1 seeds"),
        (lambda model: model.sample(["a fox"], [2**64]), "a seed is 18446744073709551616"),
        (lambda model: model.sample(["a fox"], [-1]), "a seed is -1"),
        (lambda model: cr.steer(model, [b"a cat"], "symmetry"), "prompt 1 is b'a cat'"),
        (lambda model: cr.finetune(model, methods.SDO, "symmetry", ["a"], out="unused"), r"the class SDO; give an object, SDO\(\)"),
        (lambda model: cr.finetune(model, "sdoo", "symmetry", ["a"], out="unused"), "did you mean 'sdo'"),
        (lambda model: cr.finetune(model, "sdo", "symetry", ["a"], out="unused"), "did you mean 'symmetry'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line(call, said):
    with pytest.raises(cr.UserError, match=said):
        call(MODEL)


@pytest.mark.parametrize("wrong", [None, math.nan, b"a cat", ["a dog", "a pup"]], ids=str)
def test_a_list_of_prompts_holds_text(wrong):
    with pytest.raises(cr.UserError, match=r"prompt 2 is .*, but must be text"):
        cr.prompts(["a fox", wrong])


def test_a_table_by_tabs_may_have_quotes_or_none(tmp_path):
    """PartiPrompts' own file has prompts that begin with a quotation mark of their own."""
    (tmp_path / "parti.tsv").write_text('Prompt\tNote\na fox\t\n"Hello" on a wall\t\n')
    assert cr.prompts(tmp_path / "parti.tsv") == ["a fox", '"Hello" on a wall']
    (tmp_path / "quoted.tsv").write_text('Prompt\tNote\n"a ""big"" fox"\t\n')
    assert cr.prompts(tmp_path / "quoted.tsv") == ['a "big" fox']
    (tmp_path / "lines.txt").write_text("# animals\na fox\n#1 dad\n")
    assert cr.prompts(tmp_path / "lines.txt") == ["a fox", "#1 dad"]


def test_a_size_of_two_numbers_or_none_at_all():
    """As a list it is height and width; where there is none, one has to be given."""
    pipe = CASES["sd"].pipe()
    side = pipe.unet.config.sample_size
    expected = cr.load(pipe).render(PROMPTS, SEEDS, 2, 2.0)
    pipe.unet.register_to_config(sample_size=[side, side])
    assert torch.equal(cr.load(pipe).render(PROMPTS, SEEDS, 2, 2.0), expected)
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(cr.UserError, match="does not say its size; pass size"):
        cr.load(pipe)
    assert torch.equal(cr.load(pipe, size=side * pipe.vae_scale_factor).render(PROMPTS, SEEDS, 2, 2.0), expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "ddpm"])
def test_a_programs_default_type_changes_no_image(name):
    case = CASES[name]
    model = cr.load(case.pipe(dtype=torch.float32), size=case.size)
    seen = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            seen.append(model.render(said(case), SEEDS, 2, case.guidances[-1]))
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*seen, rtol=0, atol=2e-5, check_dtype=False)
    assert seen[1].dtype == torch.float32


def test_a_network_of_a_class_of_ones_own_is_the_network_it_is():
    pipe = CASES["sd"].pipe()
    expected = cr.load(pipe).render(PROMPTS, SEEDS, 2, 2.0)
    pipe.unet.__class__ = type("Mine", (type(pipe.unet),), {})
    model = cr.load(pipe)
    adapter = model.adapt("mine", rank=2)
    assert torch.equal(model.render(PROMPTS, SEEDS, 2, 2.0), expected)
    model.drop(adapter)


def test_steering_from_a_picture_with_a_tiny_autoencoder(tmp_path):
    """The latents are those of diffusers' own way from a picture: the scaling factor times what its encoder gives."""
    pipe = CASES["sd"].pipe(dtype=torch.float32)
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    factor = pipe.vae_scale_factor
    count = factor.bit_length() - 1
    layers = {"num_encoder_blocks": (1,) * (count + 1), "num_decoder_blocks": (1,) * (count + 1)}
    blocks = dict.fromkeys(blocks, (8,) * (count + 1))
    pipe.vae = diffusers.AutoencoderTiny(latent_channels=4, upsampling_scaling_factor=2, **blocks, **layers).eval()
    model = cr.load(pipe)
    images = torch.rand(1, 3, *model.size)
    with torch.no_grad():
        expected = pipe.vae.config.scaling_factor * pipe.vae.encode(images * 2 - 1).latents
    torch.testing.assert_close(model.codec.encode(images), expected)
    assert model.codec.decode(expected).shape == images.shape
    score = lambda images, prompts: images.mean((1, 2, 3))
    found = cr.steer(model, [""], score, images=[np.float32(images[0].permute(1, 2, 0))], steps=2, updates=1)
    assert len(found.images) == 1
