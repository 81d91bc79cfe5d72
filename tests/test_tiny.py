"""The bundled models: they ship, load through the ordinary code, and can do what their card says."""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

import chainrule as cr
from chainrule import rewards
from chainrule.methods import DRaFTLV
from chainrule.rewards.classifier import load_classifier
from chainrule.rewards.clip import load_clip, normalize
from chainrule.tiny import preferences, scenes, text

WEIGHTS = Path(str(files("chainrule"))) / "tiny" / "weights"
BUNDLED_REWARDS = [rewards.PickScore("tiny"), rewards.HPSv2("tiny"), rewards.Aesthetic("tiny"), rewards.CLIPScore("tiny")]


@pytest.fixture(scope="module")
def model() -> cr.Model:
    return cr.load("tiny-emoji")


def test_all_weights_together_are_at_most_30_mb_and_safetensors():
    every = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in every) <= 30e6
    assert {path.suffix for path in every} <= {".safetensors", ".json", ".txt"}


def test_the_bundled_model_is_an_ordinary_pipeline_and_samples_as_diffusers_does(model):
    prompts, seeds = ["a painting of a fox", "a turtle, pink background"], [0, 1]
    theirs = model.pipe(
        prompts, num_inference_steps=8, guidance_scale=2.0, output_type="latent",
        generator=[torch.Generator().manual_seed(s) for s in seeds],
    ).images  # fmt: skip
    *_, ours = model.states(prompts, seeds, 8, 2.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert type(model.pipe).__name__ == "StableDiffusionPipeline" and model.size == (128, 128)
    assert model.pipe.scheduler.config.prediction_type == "v_prediction"


def test_what_is_asked_for_is_drawn(model):
    """The bundled CLIP, trained apart from the generator, finds the right one of all 111 things in most pictures."""
    asked = random.Random(0).sample(list(scenes.ANIMALS), 16)
    images = model.render([f"a painting of {scenes.article(name)}" for name in asked], list(range(16)), 12, 2.0)
    names = list(scenes.THINGS)
    seen, texts = load_clip("tiny").embed(normalize(images), [f"a picture of {scenes.article(name)}" for name in names])
    right = sum(names[int(i)] == name for i, name in zip((seen @ texts.T).argmax(1), asked, strict=True))
    assert right >= 12


@pytest.mark.parametrize("reward", BUNDLED_REWARDS, ids=lambda r: r.name)
def test_bundled_rewards_are_the_real_classes_on_small_weights(reward):
    assert reward.name.endswith(":tiny")
    rewards.probe(reward, 128)


def test_bundled_clips_load_in_plain_transformers():
    for kind in ("clip", "pick", "hps"):
        loaded = CLIPModel.from_pretrained(WEIGHTS / kind)
        assert loaded.config.vision_config.image_size == 128
        assert CLIPProcessor.from_pretrained(WEIGHTS / kind).tokenizer.model_max_length == text.LENGTH


def caption_words() -> set[str]:
    """Every word of the caption grammar."""
    phrases = [*scenes.TEMPLATES, *scenes.PLACES, *scenes.BACKGROUNDS, *scenes.NUMBERS.values(), "an and small"]
    phrases += [form for name in scenes.THINGS for form in (name, scenes.plural(name))]
    return {word for phrase in phrases for word in phrase.replace("{}", " ").replace(",", " , ").split()}


def test_every_caption_word_is_one_token_and_the_same_in_all_bundled_models(model):
    words = caption_words()
    assert len(words) > 200 and all(len(model.pipe.tokenizer(word).input_ids) == 3 for word in words)
    vocabulary = text.tokenizer().get_vocab()
    assert model.pipe.tokenizer.get_vocab() == vocabulary
    for kind in ("clip", "pick", "hps"):
        assert CLIPTokenizer.from_pretrained(WEIGHTS / kind).get_vocab() == vocabulary


def test_the_preference_rules_like_the_true_and_the_undamaged():
    rng = random.Random(0)
    scene = scenes.Scene((scenes.Thing("fox", 96, 64, 64),), "sunset", named=True)
    assert preferences.truth(scene, scene) == 1
    other = scenes.Scene((scenes.Thing("cat", 96, 64, 64),), "sunset", named=True)
    plain = scenes.Scene(scene.things, "gray", named=True)
    assert preferences.truth(scene, other) == 0 and 0.5 < preferences.truth(scene, plain) < 1
    caption, first, second, chosen = preferences.pair(rng, preferences.PICK)
    assert caption and first.damage >= 0 and second.damage >= 0 and isinstance(chosen, bool)
    assert preferences.PICK != preferences.HPS


@pytest.mark.parametrize("name", scenes.THINGS)
def test_every_thing_has_a_drawing_of_its_own_cropped_to_its_ink(name):
    with np.load(scenes.GLYPHS) as drawings:
        assert list(drawings) == list(scenes.THINGS)
        ink = drawings[name]
        assert ink.dtype == np.uint8 and ink.shape[2] == 4 and 100 <= max(ink.shape) <= 128
        assert all(edge.any() for edge in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
        assert [other for other in drawings if np.array_equal(drawings[other], ink)] == [name]


def test_captions_are_english():
    assert scenes.plural("mouse") == "mice" and scenes.plural("butterfly") == "butterflies" and scenes.plural("monkey") == "monkeys"
    assert scenes.plural("fox") == "foxes" and scenes.plural("smiling face") == "smiling faces"
    assert scenes.article("ant") == "an ant" and scenes.article("fox") == "a fox"
    assert len(scenes.ANIMALS) == 45 and 100 <= len(scenes.THINGS) <= 150 and len(scenes.BACKGROUNDS) >= 10


def test_a_few_updates_on_the_bundled_model_leave_an_adapter_that_plain_diffusers_loads(model, tmp_path):
    reward = rewards.PickScore("tiny")
    run = cr.finetune(
        model, DRaFTLV(1), reward, "animals:train", out=tmp_path / "run", steps=2, batch=2, sample_steps=4, sample_every=0,
        watch=["a painting of a fox"],
    )  # fmt: skip
    *_, ours = model.using(run.adapter).states(["a painting of a fox"], [3], 4, 2.0)
    pipe = cr.load("tiny-emoji").pipe
    pipe.load_lora_weights(run.adapter, weight_name="pytorch_lora_weights.safetensors")
    theirs = pipe(
        ["a painting of a fox"], num_inference_steps=4, guidance_scale=2.0, output_type="latent",
        generator=[torch.Generator().manual_seed(3)],
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_unpacked_checkpoints_hold_the_shipped_weights_to_train_on_from(tmp_path):
    from chainrule.tiny import generator
    from chainrule.tiny.__main__ import STAGES, main
    from chainrule.tiny.loop import restore

    assert main(["unpack", "--out", str(tmp_path)]) == 0
    made, model = generator.Generator(), cr.load("tiny-emoji")
    assert restore("unet", made, tmp_path) == STAGES["unet"].steps
    for mine, shipped in ((made.unet, model.pipe.unet), (made.text_encoder, model.pipe.text_encoder)):
        expected = dict(shipped.named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in mine.named_parameters())
    assert main(["unpack", "--out", str(tmp_path)]) == 0  # finished: what was trained since is not overwritten


def test_the_bundled_student_keeps_to_the_trajectory_better_than_ddim_with_as_many_passes():
    """ShortFT's Fig. 3 on six unseen animals; a guided DDIM call is two passes of the network, a student's is one."""
    from chainrule.analyze import shortcut

    net = cr.load("tiny-emoji").with_student()
    found = shortcut(net, cr.prompts("animals:test")[:6], [rewards.PickScore("tiny")], seeds=1, steps=20, points=2)
    for ways in found.rows.values():
        for measure in ("latent", "pixels", "perceptual"):
            assert ways["shortcut"][measure].mean < 0.75 * ways["ddim, half the calls"][measure].mean
            assert ways["shortcut"][measure].mean < 0.75 * ways["one step"][measure].mean


def test_tiny_faces_is_an_ordinary_pixel_pipeline_and_its_classifier_knows_what_it_draws():
    model, judge = cr.load("tiny-faces"), load_classifier("tiny")
    assert model.pipe.unet.config.num_class_embeds == len(model.defaults.labels) + 1 == len(judge.labels) + 1
    assert list(model.defaults.labels) == judge.labels
    said = [*list(scenes.FACES)[:6], "cat", "fox", "lion", "turtle", "bee", "pig"]
    images = model.render(said, range(len(said)), 10)
    assert images.shape == (12, 3, 64, 64)
    right = [judge.labels[i] == name for i, name in zip(judge(images).argmax(1).tolist(), said, strict=True)]
    assert sum(right) >= 10, right
