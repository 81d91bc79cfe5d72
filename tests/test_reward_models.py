"""Each learned reward's own formula, computed another way: by transformers' models after their own processors."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import ALL, PROMPTS, SIZE, brightness, pictures, pil, random_images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.rewards import parse
from chainrule.rewards.clip import normalize, resize_and_crop
from chainrule.rewards.detect import load_owl, pad_and_shrink
from chainrule.rewards.safety import load_checker
from chainrule.rewards.siglip import load_siglip


def _official_embeddings(folder: Path, images: Tensor, said: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text embeddings as a user of transformers computes them, from PIL images."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = pil("CLIPImageProcessor")(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(images=pictures(images), return_tensors="pt")["pixel_values"]
    tokens = CLIPTokenizer.from_pretrained(folder)(list(said), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp()


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 64), (64, 80)])
def test_clip_scores_equal_the_official_formulas(models: Path, size: tuple[int, int]) -> None:
    images = random_images(*size, batch=3)
    image, text, _ = _official_embeddings(models / "clip", images)
    close = {"rtol": 0.0, "atol": 4e-3}  # a few pixels differ by one 8-bit level
    torch.testing.assert_close(ALL["clip"](models)(images, PROMPTS), F.cosine_similarity(image, text), **close)
    image, text, scale = _official_embeddings(models / "pick", images)
    torch.testing.assert_close(ALL["pickscore"](models)(images, PROMPTS) / scale, (image @ text.T).diagonal(), **close)
    if size[0] == size[1]:  # elsewhere HPSv2 pads
        image, text, _ = _official_embeddings(models / "hps", images)
        torch.testing.assert_close(ALL["hpsv2"](models)(images, PROMPTS), (image @ text.T).diagonal(), **close)


def test_aesthetic_equals_the_hand_written_head(models: Path) -> None:
    images = random_images(SIZE, SIZE, 3)
    x, _, _ = _official_embeddings(models / "clip", images)
    x = x / x.norm(dim=-1, keepdim=True)
    state = load_file(models / "aesthetic" / "head.safetensors")
    for index in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    torch.testing.assert_close(ALL["aesthetic"](models)(images, ["", "", ""]), x[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 80)])
def test_a_classifier_is_its_model_after_its_own_processor(models: Path, size: tuple[int, int]) -> None:
    from transformers import ResNetForImageClassification

    images, folder = random_images(*size, batch=3), models / "classifier"
    network = ResNetForImageClassification.from_pretrained(folder).eval()
    official = pil("ConvNextImageProcessor").from_pretrained(folder, resample=3)(images=pictures(images), return_tensors="pt")
    with torch.no_grad():
        wanted = network(**official).logits.log_softmax(-1)[:, 1]
    ours = rewards.Classifier("domestic dog", str(folder))(images, PROMPTS)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-2)  # a few pixels differ by one 8-bit level
    with pytest.raises(UserError, match=r"unknown class 'dgo'.*dog"):
        rewards.Classifier("dgo", str(folder)).to("cpu")


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 80)])
def test_siglip_is_its_model_after_its_own_processor(models: Path, size: tuple[int, int]) -> None:

    model, tokenizer = load_siglip(str(models / "siglip"))
    images = random_images(*size, batch=3)
    pixels = pil("SiglipImageProcessor")(size={"height": SIZE, "width": SIZE})(images=pictures(images), return_tensors="pt")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    logits = model(input_ids=ids, **pixels).logits_per_image.diagonal()
    ours = rewards.SigLIP(str(models / "siglip"))(images, PROMPTS)
    torch.testing.assert_close(ours * model.logit_scale.exp() + model.logit_bias, logits, rtol=0, atol=1e-2)
    said = rewards.SigLIP(str(models / "siglip"), "a fox")(images, PROMPTS)
    torch.testing.assert_close(said, rewards.SigLIP(str(models / "siglip"))(images, ["a fox"] * 3))


@pytest.mark.parametrize("folder", ["detector", "owlv2"])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 64), (48, 80)])
def test_detection_is_the_sum_of_the_detectors_scores(models: Path, folder: str, size: tuple[int, int]) -> None:

    owl, images, queries = load_owl(str(models / folder)), random_images(*size, batch=2), ["a cat", "small dogs"]
    if folder == "owlv2":
        pixels = normalize(pad_and_shrink(images, SIZE))
    else:
        square = {"height": SIZE, "width": SIZE}
        pixels = pil("OwlViTImageProcessor")(size=square)(images=pictures(images), return_tensors="pt")["pixel_values"]
    tokens = owl.tokenizer(queries * 2, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = owl.model(pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    scores = out.logits.sigmoid()
    close = {"rtol": 2e-3, "atol": 1e-3}
    ours = rewards.Detection("a cat, small dogs", str(models / folder))(images, ["", ""])
    torch.testing.assert_close(ours, scores.sum((1, 2)), **close)
    area = out.pred_boxes[..., 2] * out.pred_boxes[..., 3]
    ours = rewards.DetectedArea("a cat", str(models / folder))(images, ["", ""])
    torch.testing.assert_close(ours, (scores[..., 0] * area).sum(1), **close)
    with pytest.raises(UserError, match="say what to detect"):
        rewards.Detection(" , ", str(models / folder))


@pytest.mark.parametrize("size", [(SIZE, SIZE), (64, 80), (90, 50)])
def test_safe_is_its_classifier_after_its_own_processor(models: Path, size: tuple[int, int]) -> None:
    from transformers import AutoModelForImageClassification

    images, folder = random_images(*size, batch=3), models / "nsfw"
    pixels = pil("ViTImageProcessor").from_pretrained(folder)(images=pictures(images), return_tensors="pt")
    with torch.no_grad():
        wanted = AutoModelForImageClassification.from_pretrained(folder).eval()(**pixels).logits.log_softmax(-1)[:, 0]
    torch.testing.assert_close(rewards.Safe(str(folder))(images, PROMPTS), wanted, rtol=0, atol=1e-2)
    torch.testing.assert_close(rewards.Classifier("normal", str(folder))(images, PROMPTS), wanted, rtol=0, atol=1e-2)
    with pytest.raises(UserError, match="unknown class 'normal'"):
        rewards.Safe(str(models / "classifier")).to("cpu")


def test_concepts_are_negative_where_the_safety_checker_would_black_out(models: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    folder, images = models / "safety-checker", random_images(SIZE, SIZE, 24, noise=0.2)
    checker = StableDiffusionSafetyChecker.from_pretrained(folder).eval()
    pixels = normalize(resize_and_crop(images, SIZE))
    _, flagged = checker(pixels, list(np.ones((24, 2, 2, 3), np.float32)))
    ours = rewards.Concepts(str(folder))(images, [""] * 24)
    assert 4 < sum(flagged) < 20
    assert ((ours < 0) == torch.tensor(flagged))[ours.abs() > 6e-4].all()  # the checker rounds to three decimals
    x = checker.visual_projection(checker.vision_model(pixels)[1])
    margins = [F.cosine_similarity(x, c[None]) - t for c, t in zip(checker.concept_embeds, checker.concept_embeds_weights)]  # noqa: B905
    special = zip(checker.special_care_embeds, checker.special_care_embeds_weights, strict=True)
    care = torch.stack([F.cosine_similarity(x, c[None]) > t for c, t in special]).any(0)
    assert 0 < care.sum() < 24
    torch.testing.assert_close(ours, -(torch.stack(margins).amax(0) + 0.01 * care), rtol=0, atol=1e-5)


def test_a_safety_checker_of_transformers_4_is_read_too(models: Path, tmp_path: Path) -> None:
    """There the vision tower's tensors are named twice, vision_model.vision_model., with their positions among them."""
    folder = Path(shutil.copytree(models / "safety-checker", tmp_path / "checker"))
    state = load_file(folder / "model.safetensors")
    bare = {key: "vision_model." + key.replace("vision_model.", "") for key in state if key.startswith("vision_model.")}
    old = {("vision_model." + bare[key] if key in bare else key): value for key, value in state.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(old, folder / "model.safetensors")
    images = random_images(SIZE, SIZE, 2)
    torch.testing.assert_close(rewards.Concepts(str(folder))(images, ["", ""]), ALL["concepts"](models)(images, ["", ""]))
    (folder / "model.safetensors").unlink()
    save_file({key: value for key, value in old.items() if key != "concept_embeds"}, folder / "model.safetensors")
    with pytest.raises(UserError, match="not a safety checker: it has no 'concept_embeds'"):
        load_checker(str(shutil.copytree(folder, tmp_path / "half")))


def test_diversity_is_the_distance_to_the_batch_reversed(models: Path) -> None:
    images = random_images(24, 40, 4, noise=0.2)
    ours = rewards.Diversity()(images, [""] * 4)
    wanted = torch.stack([(images[k] - images[3 - k]).square().mean().sqrt() for k in range(4)])
    torch.testing.assert_close(ours, wanted)
    assert rewards.Diversity()(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), ["", ""]).tolist() == [1.0, 1.0]
    seen = rewards.Diversity(str(models / "clip"))(images, [""] * 4)
    torch.testing.assert_close(seen, rewards.perceptual(images, images.flip(0), str(models / "clip")))
    same = images[:1].expand(5, -1, -1, -1).clone().requires_grad_()
    for features in ("pixels", str(models / "clip")):
        values = rewards.Diversity(features)(same, [""] * 5)
        assert values.tolist() == [0.0] * 5
        (gradient,) = torch.autograd.grad(values.sum(), same)
        assert gradient.isfinite().all()
    assert rewards.Diversity()(images[:1], [""]).tolist() == [0.0]


def test_dropout_keeps_the_reward_in_expectation_and_its_masks_with_the_image(models: Path) -> None:
    images = random_images(SIZE, SIZE, 8, seed=4)
    plain = ALL["aesthetic"](models)(images, [""] * 8)

    def dropped(rate: float, seed: int, shown: Tensor = images) -> Tensor:
        return rewards.Dropout(rate, seed, str(models / "aesthetic"), clip=str(models / "clip"))(shown, [""] * len(shown))

    torch.testing.assert_close(dropped(0.0, 1), plain)
    assert plain.abs().max() > 5
    many = torch.stack([dropped(0.1, seed) for seed in range(200)])
    assert ((many.mean(0) - plain).abs() < 4 * many.std(0) / 200**0.5).all()
    assert (many.std(0) > 0.1).all()
    assert torch.equal(dropped(0.5, 1), dropped(0.5, 1))
    torch.testing.assert_close(dropped(0.5, 1)[1:], dropped(0.5, 1, images[1:]))
    torch.testing.assert_close(dropped(0.5, 1, images + 1e-4), dropped(0.5, 1), rtol=0, atol=0.05)  # the masks stay
    other = images.clone()
    other[:, :, 0, 0] = 1 - other[:, :, 0, 0]  # one pixel: hardly another rating, but other masks
    moved = (ALL["aesthetic"](models)(other, [""] * 8) - plain).abs()
    assert (dropped(0.5, 1, other) - dropped(0.5, 1)).abs().mean() > 4 * moved.mean()
    with pytest.raises(UserError, match=r"from 0 to less than 1, got 1\.0"):
        rewards.Dropout(1.0)


def test_a_reward_on_another_device_or_in_another_precision(models: Path) -> None:
    inner = ALL["hpsv2"](models)
    images = random_images(SIZE, SIZE, 2).requires_grad_()
    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    (wanted,) = torch.autograd.grad(inner(images, PROMPTS[:2]).sum(), images)
    for place in places:
        for dtype, close in (("float32", 1e-4), ("bfloat16", 5e-2)):
            there = rewards.On(inner, place, dtype).to("cpu")
            values = there(images, PROMPTS[:2])
            assert (values.device, values.dtype) == (images.device, torch.float32)
            torch.testing.assert_close(values, inner(images, PROMPTS[:2]), rtol=0, atol=close)
            (gradient,) = torch.autograd.grad(values.sum(), images)
            assert (gradient.device, gradient.dtype) == (images.device, images.dtype)
            assert F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > (0.9999 if dtype == "float32" else 0.98)


def test_style_is_the_distance_of_gram_matrices(models: Path) -> None:
    """Written out with transformers' own hidden states."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(models / "clip", dtype=torch.float32)
    images, grams = random_images(SIZE, SIZE, 2), []
    picture = torch.from_numpy(np.array(Image.open(models / "style.png"))).permute(2, 0, 1)[None] / 255
    for shown in (picture, images[:1], images[1:]):
        pixels = normalize(resize_and_crop(shown, SIZE))
        with torch.no_grad():
            states = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[2][0, 1:]
        grams.append(sum(torch.outer(state, state) for state in states) / len(states))
    ours = rewards.Style(str(models / "style.png"), 2, str(models / "clip"))(images, ["", ""])
    torch.testing.assert_close(ours, -torch.stack([(grams[0] - g).square().sum() for g in grams[1:]]), rtol=1e-4, atol=1e-4)


def test_rewards_beside_the_image_as_it_was(models: Path) -> None:
    before, after = random_images(SIZE, SIZE, 2), random_images(SIZE, SIZE, 2, seed=1)
    source = str(models / "clip")
    alike = rewards.Perceptual(source).with_reference(before)
    assert alike(before, ["", ""]).tolist() == [0.0, 0.0]
    assert (alike(after, ["", ""]) < -1e-3).all()
    one = (2 * rewards.Perceptual(source) + brightness).with_reference(before[1:])
    torch.testing.assert_close(one(after[1:], [""]), 2 * alike(after, ["", ""])[1:] + brightness(after[1:], [""]))
    now, text, _ = _official_embeddings(models / "clip", after, ["a face", "an angry face"])
    was, _, _ = _official_embeddings(models / "clip", before, ["a face", "an angry face"])
    wanted = F.cosine_similarity(now - was, text[1:] - text[:1])
    ours = rewards.Directional(source, text="a face to an angry face").with_reference(before)(after, ["", ""])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-3)
    with pytest.raises(UserError, match="2 images but 1 references"):
        rewards.Perceptual(source).with_reference(before[:1])(after, ["", ""])


def test_identity_is_the_cosine_of_class_tokens_by_its_own_processor(models: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Model

    source = str(models / "dino")
    images, before = random_images(48, 64, 3), random_images(48, 64, 3, seed=1)
    found = rewards.Identity(source).with_reference(before)(images, PROMPTS)
    network = Dinov2Model.from_pretrained(source).eval()
    tokens = []
    for batch in (images, before):
        pixels = BitImageProcessor.from_pretrained(source)(pictures(batch), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            tokens.append(network(pixels).last_hidden_state[:, 0])
    torch.testing.assert_close(found, F.cosine_similarity(*tokens), rtol=0, atol=2e-3)
    torch.testing.assert_close(rewards.Identity(source).with_reference(images)(images, PROMPTS), torch.ones(3))
    flat = rewards.Identity(encoder=lambda x: x.mean((2, 3))).with_reference(before)(images, PROMPTS)
    torch.testing.assert_close(flat, F.cosine_similarity(images.mean((2, 3)), before.mean((2, 3))))


def test_lpips_is_its_package_and_missing_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.rewards.likeness.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package lpips; pip install 'chainrule\[lpips\]', or take 'perceptual'"):
        rewards.LPIPS()
    monkeypatch.undo()

    class Package(nn.Module):
        """Looks as the real one does: images in [-1, 1], answers (b, 1, 1, 1)."""

        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor({"alex": 1.0, "vgg": 2.0}[net]))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Package, __spec__=object()))
    monkeypatch.setattr("chainrule.rewards.likeness.importlib.util.find_spec", lambda name: object())
    images, before = random_images(32, 32, 2).requires_grad_(), random_images(32, 32, 2, seed=1)
    found = parse("lpips:vgg").with_reference(before)(images, PROMPTS[:2])
    torch.testing.assert_close(found, -2 * ((images - before) * 2).square().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.abs().sum() > 0
    with pytest.raises(UserError, match="unknown LPIPS network 'vgh'; did you mean 'vgg'"):
        parse("lpips:vgh")
