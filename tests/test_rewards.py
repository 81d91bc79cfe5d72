"""One contract for every reward, then each reward's own formula, computed another way."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.rewards import checked, parse, probe, reward_of
from chainrule.rewards.clip import MEAN, STD, load_clip, normalize, resize_and_crop, resize_and_pad
from chainrule.rewards.jpeg import jpeg

SIZE = 32
PROMPTS = ["a cat", "two small dogs on a beach", "a fox"]


# -------------------------------------------------------------------------------------------------- tiny models on disk
def _save_clip(folder: Path, seed: int) -> None:
    """A random CLIP of 30k weights in the format of the real ones."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=40).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    text = {**tower, **ends, "vocab_size": len(pieces), "max_position_embeddings": 40}
    vision = {**tower, "image_size": SIZE, "patch_size": 8, "initializer_factor": 5.0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).half().save_pretrained(folder)


def _save_head(folder: Path, prefix: str) -> None:
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    state = rewards.aesthetic_head(16).state_dict()
    save_file({prefix + key: 3 * value for key, value in state.items()}, folder / "head.safetensors")


def _save_classifier(folder: Path) -> None:
    """A random ResNet with ResNet-50's own processor settings at a smaller size."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(3)
    names = {0: "cat", 1: "dog, domestic dog", 2: "fox"}
    numbers = {name: i for i, name in names.items()}
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, id2label=names, label2id=numbers
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    facts = {"size": {"shortest_edge": SIZE}, "crop_pct": 0.875, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ConvNextImageProcessor", **facts}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reward-models")
    for seed, name in enumerate(("clip", "pick", "hps")):
        _save_clip(root / name, seed)
    _save_head(root / "aesthetic", "layers.")
    _save_classifier(root / "classifier")
    pictures(random_images(40, 56, seed=5))[0].save(root / "style.png")
    return root


Make = Callable[[Path], rewards.Reward]
ALL: dict[str, Make] = {
    "clip": lambda root: rewards.CLIPScore(str(root / "clip")),
    "pickscore": lambda root: rewards.PickScore(str(root / "pick")),
    "hpsv2": lambda root: rewards.HPSv2(str(root / "hps")),
    "aesthetic": lambda root: rewards.Aesthetic(str(root / "aesthetic"), clip=str(root / "clip")),
    "symmetry": lambda root: rewards.Symmetry(),
    "rotation": lambda root: rewards.RotationalAnticorrelation(),
    "compressible": lambda root: rewards.JPEGCompressibility(),
    "incompressible": lambda root: rewards.JPEGIncompressibility(quality=30),
    "classifier": lambda root: rewards.Classifier("dog", str(root / "classifier")),
    "style": lambda root: 1e-3 * rewards.Style(str(root / "style.png"), source=str(root / "clip")),
    "perceptual": lambda root: rewards.Perceptual(str(root / "clip")),
    "directional": lambda root: rewards.Directional(str(root / "clip"), text="a face to an angry face"),
    "target": lambda root: rewards.Target(rewards.PickScore(str(root / "pick")), 50.0),
    "function": lambda root: reward_of(brightness),
    "sum": lambda root: 10 * rewards.PickScore(str(root / "pick")) - 0.5 * rewards.Symmetry() + brightness,
}


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.fixture(params=ALL)
def reward(request: pytest.FixtureRequest, models: Path) -> rewards.Reward:
    return ALL[request.param](models)


def random_images(height: int, width: int, batch: int = 1, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Smooth images with a little noise, already on 8-bit values: (b, 3, h, w) in [0, 1]."""
    torch.manual_seed(seed)
    coarse = torch.rand(batch, 3, max(2, height // 16), max(2, width // 16))
    x = F.interpolate(coarse, size=(height, width), mode="bicubic") + noise * torch.randn(batch, 3, height, width)
    return (x.clamp(0, 1) * 255).round() / 255


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


# --------------------------------------------------------------------------------------------------------- the contract
@pytest.mark.parametrize("size", [SIZE, 48])
def test_one_finite_value_per_image(reward: rewards.Reward, size: int) -> None:
    values = checked(reward, random_images(size, size, 3), PROMPTS)
    assert values.shape == (3,)
    assert values.isfinite().all()
    assert values.dtype == torch.float32


def test_the_gradient_reaches_the_pixels(reward: rewards.Reward) -> None:
    images = random_images(48, 48, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS).sum(), images)
    assert gradient.isfinite().all()
    assert all(image.abs().sum() > 0 for image in gradient)
    assert probe(reward, 48).shape == (2,)


def test_a_value_is_independent_of_its_batch_neighbors(reward: rewards.Reward) -> None:
    images = random_images(48, 48, 3).requires_grad_()
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(together[0], images)
    assert not gradient[1:].any()


def test_a_step_along_the_gradient_raises_the_reward(reward: rewards.Reward) -> None:
    images = random_images(SIZE, SIZE, 1, seed=3).requires_grad_()
    before = reward(images, PROMPTS[:1])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = reward((images + 1e-3 * gradient / gradient.norm()).detach(), PROMPTS[:1])
    assert after > before


def test_terms_combine_to_the_reward_and_the_name_reads_back(reward: rewards.Reward) -> None:
    images = random_images(SIZE, SIZE, 3)
    terms = reward.terms(images, PROMPTS)
    torch.testing.assert_close(reward.combine(terms), reward(images, PROMPTS))
    assert reward.to("cpu") == reward == reward.load()
    if "brightness" not in reward.name and "aesthetic" not in reward.name:
        assert parse(reward.name).weighted() == reward.weighted()


def test_reduced_precision_images_are_scored_in_float32(models: Path) -> None:
    images = random_images(48, 40, 2)
    for make in list(ALL.values())[:4]:
        low = make(models)(images.bfloat16(), PROMPTS[:2])
        assert low.dtype == torch.float32
        assert low.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic"])
def test_weights_are_frozen_shared_and_left_alone(models: Path, name: str) -> None:
    judge = load_clip(str(models / {"clip": "clip", "pickscore": "pick", "hpsv2": "hps", "aesthetic": "clip"}[name]))
    assert judge is load_clip(str(judge.model.name_or_path))
    assert not judge.model.training
    assert judge.model.dtype == torch.float32
    images = random_images(SIZE, SIZE, 2).requires_grad_()
    ALL[name](models)(images, PROMPTS[:2]).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in judge.model.parameters())


# ------------------------------------------------------------------------------------------- preprocessing and formulas
@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 225), (225, 300), (64, 64), (256, 771), (224, 333)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_preprocessing_equals_the_official_processor(size: tuple[int, int], noise: float) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = random_images(*size, noise=noise)
    official = CLIPImageProcessorPil()(images=pictures(images), return_tensors="pt")["pixel_values"]
    ours = normalize(resize_and_crop(images, 224))
    assert ours.shape == official.shape
    assert (ours - official).abs().mean() < 5e-4
    if 224 in size and max(size) == 224:
        torch.testing.assert_close(ours, official, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 225), (225, 300), (100, 224)])
def test_padding_equals_pillow(size: tuple[int, int]) -> None:
    images = random_images(*size)
    scale = 224 / max(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    small = pictures(images)[0].resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (224, 224))
    square.paste(small, ((224 - width) // 2, (224 - height) // 2))
    official = torch.tensor(np.array(square)).permute(2, 0, 1)[None] / 255
    assert (resize_and_pad(images, 224) - official).abs().mean() < 1e-4


def test_images_of_the_right_size_keep_their_values_and_dtype() -> None:
    images = torch.rand(1, 3, 224, 224, dtype=torch.float64)
    assert torch.equal(resize_and_crop(images, 224), images)
    assert torch.equal(resize_and_pad(images, 224), images)
    assert resize_and_crop(images, 100).dtype == torch.float64
    assert resize_and_crop(images.half(), 100).dtype == torch.float32


def _official_embeddings(folder: Path, images: Tensor, said: Sequence[str] = PROMPTS) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text embeddings as a user of transformers computes them, from PIL images."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
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
    from transformers import ConvNextImageProcessorPil, ResNetForImageClassification

    images, folder = random_images(*size, batch=3), models / "classifier"
    network = ResNetForImageClassification.from_pretrained(folder).eval()
    official = ConvNextImageProcessorPil.from_pretrained(folder, resample=3)(images=pictures(images), return_tensors="pt")
    with torch.no_grad():
        wanted = network(**official).logits.log_softmax(-1)[:, 1]
    ours = rewards.Classifier("domestic dog", str(folder))(images, PROMPTS)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-2)  # a few pixels differ by one 8-bit level
    with pytest.raises(UserError, match=r"unknown class 'dgo'.*dog"):
        rewards.Classifier("dgo", str(folder)).load()


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
    alike = rewards.Perceptual(source).beside(before)
    assert alike(before, ["", ""]).tolist() == [0.0, 0.0]
    assert (alike(after, ["", ""]) < -1e-3).all()
    one = (2 * rewards.Perceptual(source) + brightness).beside(before[1:])
    torch.testing.assert_close(one(after[1:], [""]), 2 * alike(after, ["", ""])[1:] + brightness(after[1:], [""]))
    now, text, _ = _official_embeddings(models / "clip", after, ["a face", "an angry face"])
    was, _, _ = _official_embeddings(models / "clip", before, ["a face", "an angry face"])
    wanted = F.cosine_similarity(now - was, text[1:] - text[:1])
    ours = rewards.Directional(source, text="a face to an angry face").beside(before)(after, ["", ""])
    torch.testing.assert_close(ours, wanted, rtol=0, atol=5e-3)
    with pytest.raises(UserError, match="2 images but 1 references"):
        rewards.Perceptual(source).beside(before[:1])(after, ["", ""])


def test_a_target_is_the_distance_to_a_value(models: Path) -> None:
    images = random_images(SIZE, SIZE, 3)
    aim = rewards.Target(reward_of(brightness), 0.5)
    torch.testing.assert_close(aim(images, PROMPTS), -(images.mean((1, 2, 3)) - 0.5).abs())


@pytest.mark.parametrize("quality", [30, 50, 75, 90])
@pytest.mark.parametrize("size", [(128, 128), (96, 150)])
def test_jpeg_equals_pillow(quality: int, size: tuple[int, int]) -> None:
    images = random_images(*size, noise=0.01)
    file = io.BytesIO()
    pictures(images)[0].save(file, "JPEG", quality=quality, subsampling=2)
    official = torch.tensor(np.array(Image.open(file))).permute(2, 0, 1)[None] / 255
    ours = jpeg(images, quality)
    assert ours.shape == images.shape
    assert -10 * torch.log10((ours - official).square().mean()) >= 40
    by_reward = rewards.JPEGCompressibility(quality)(images, [""])
    torch.testing.assert_close(by_reward, -(images - official).square().mean((1, 2, 3)), rtol=0.05, atol=0)
    assert torch.equal(by_reward, -rewards.JPEGIncompressibility(quality)(images, [""]))


def test_jpeg_passes_gradients_and_the_reward_passes_the_exact_one() -> None:
    images = random_images(40, 40).requires_grad_()
    (through,) = torch.autograd.grad(jpeg(images, 50).square().sum(), images)
    assert through.isfinite().all()
    assert (through != 0).float().mean() > 0.9
    (exact,) = torch.autograd.grad(rewards.JPEGCompressibility()(images, [""]).sum(), images)
    torch.testing.assert_close(exact, (-2 * (images - jpeg(images, 50)) / images.numel()).detach())


def test_noise_hurts_compressibility() -> None:
    amount = torch.tensor(0.1, requires_grad=True)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = random_images(64, 64, noise=0.0) * 0.5 + 0.25 + amount * noise
    for reward, sign in ((rewards.JPEGCompressibility(), -1), (rewards.JPEGIncompressibility(), 1)):
        (gradient,) = torch.autograd.grad(reward(images, [""]).sum(), amount, retain_graph=True)
        assert gradient.sign() == sign


def test_symmetry_in_closed_form() -> None:
    left = torch.rand(2, 3, 16, 8)
    assert torch.equal(rewards.Symmetry()(torch.cat([left, left.flip(-1)], -1), ["", ""]), torch.zeros(2))
    split = torch.cat([torch.zeros(1, 3, 16, 8), torch.full((1, 3, 16, 8), 0.25)], -1)
    assert rewards.Symmetry()(split, [""]).item() == -0.25


def test_rotation_in_closed_form() -> None:
    reward = rewards.RotationalAnticorrelation()
    assert torch.equal(reward(torch.full((1, 3, 8, 8), 0.3), [""]), torch.zeros(1))
    corner = torch.zeros(1, 3, 8, 8)
    corner[..., :4, :4] = 1  # each rotation moves a quarter of the pixels in and a quarter out
    assert reward(corner, [""]).item() == pytest.approx(0.5)
    with pytest.raises(UserError, match=r"rotation.*square.*8x9"):
        reward(torch.rand(1, 3, 8, 9), [""])


# -------------------------------------------------------------------------------------------------------------- algebra
def test_weighted_sums_add_scale_and_name_themselves() -> None:
    a, b = rewards.Symmetry(), rewards.RotationalAnticorrelation()
    images = torch.rand(3, 3, 16, 16)
    va, vb = a(images, PROMPTS), b(images, PROMPTS)
    cases = {
        "10*symmetry + 2*rotation": (10 * a + b * 2, 10 * va + 2 * vb),
        "symmetry - rotation": (a - b, va - vb),
        "-symmetry - 0.05*rotation": (-a - 0.05 * b, -va - 0.05 * vb),
        "2.5*symmetry + 0.5*rotation": ((5 * a + b) / 2, 2.5 * va + 0.5 * vb),
        "3*symmetry": (a + a + sum([a]), 3 * va),
        "brightness - symmetry": (brightness - a, brightness(images, PROMPTS) - va),
    }
    for name, (reward, values) in cases.items():
        assert reward.name == name
        torch.testing.assert_close(reward(images, PROMPTS), values)
    terms = (10 * a - b).terms(images, PROMPTS)
    assert list(terms) == ["symmetry", "rotation"]
    torch.testing.assert_close(terms["rotation"], vb)
    with pytest.raises(UserError, match=r"multiplied by a number"):
        a * "2"  # type: ignore[operator]
    with pytest.raises(UserError, match=r"two different rewards .* 'brightness'"):
        reward_of(brightness) + reward_of(lambda images, prompts: images.sum(), name="brightness")


def test_rewards_of_functions_and_modules() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return self.layer(images.mean((2, 3)))[:, 0]

    judge = Judge()
    reward = reward_of(judge)
    assert reward.name == "Judge"
    assert reward_of(reward) is reward
    assert reward.to("cpu") is reward
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())
    assert probe(reward, (8, 12)).shape == (2,)
    with pytest.raises(UserError, match=r"reward 'flat' passes no gradient"):
        probe(reward + reward_of(lambda images, prompts: images.detach().mean((1, 2, 3)), name="flat"), 8)
    with pytest.raises(UserError, match=r"must take \(images, prompts\)"):
        reward_of(lambda images: images)  # type: ignore[arg-type, misc]
    with pytest.raises(UserError, match=r"not 3"):
        reward_of(3)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- words to rewards
def test_parse_reads_weighted_sums(models: Path) -> None:
    both = 10 * rewards.PickScore() + 2 * rewards.HPSv2() - 0.05 * rewards.Aesthetic()
    for text in ("10*pickscore + 2*hpsv2 - 0.05*aesthetic", " 10 * pickscore+2*hpsv2-5e-2*aesthetic "):
        assert parse(text) == both
    assert parse("symmetry") == rewards.Symmetry()
    name = "-clip:some-lab/a-clip + incompressible:30 - symmetry"
    assert parse(name.replace(":30 - s", ":30-s")).name == name
    assert set(rewards.REGISTRY) == {*ALL} - {"function", "sum", "target"}
    needs = {"directional": ":a face to a sad face", "classifier": ":dog", "style": f":{models}/style.png"}
    for name, entry in rewards.REGISTRY.items():
        name += needs.get(name, "")
        assert parse(name).name == name
        assert isinstance(parse(name), entry.load())
        assert entry.about


def test_parse_reads_what_a_reward_says() -> None:
    text = "0.5*clip:tiny:an angry face + 2*aesthetic->10 - classifier:tiny:cat"
    said = rewards.CLIPScore("tiny", "an angry face")
    assert [reward for _, reward in parse("0.5*clip:tiny:an angry face - symmetry").weighted()] == [said, rewards.Symmetry()]
    assert parse("clip:an angry face") == rewards.CLIPScore(text="an angry face")
    assert parse("clip:sad") == rewards.CLIPScore(text="sad")
    assert parse("clip:tiny") == rewards.CLIPScore("tiny")
    assert parse("clip:some-lab/a-clip:two cats - symmetry").weighted()[0][1] == rewards.CLIPScore("some-lab/a-clip", "two cats")
    assert parse("aesthetic->10") == rewards.Target(rewards.Aesthetic(), 10.0)
    assert parse("directional:a face to a sad face") == rewards.Directional(text="a face to a sad face")
    if (rewards.clip.BUNDLED / "classifier").is_dir():
        assert parse(text).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pikscore", "unknown reward 'pikscore'; did you mean 'pickscore'"),
        ("symmetry + 2*sharpness", "unknown reward 'sharpness'"),
        ("sharpness+symmetry", "unknown reward 'sharpness'"),
        ("", "cannot read the reward ''"),
        ("symmetry + ", "cannot read the reward"),
        ("symmetry rotation", "cannot read the reward 'symmetry rotation'"),
        ("symmetry + symmetry rotation", "at '[+] symmetry rotation'"),
        ("2**symmetry", "cannot read the reward"),
        ("symmetry:tiny", "takes nothing after a colon"),
        ("compressible:high", "whole number after the colon .quality., got 'high'"),
        ("compressible:0", "from 1 to 100, got 0"),
        ("pickscore:./nowhere/at/all", "no folder './nowhere/at/all'"),
        ("pickscore:tinny", "no folder 'tinny'"),
        ("classifier", "'classifier' needs a label after a colon"),
        ("style:gone.png", "no style picture 'gone.png'"),
        ("directional:an angry face", "say from what to what"),
        ("missing.py:reward", "no reward file 'missing.py'"),
        ("missing.py", "say which function"),
    ],
)
def test_parse_errors_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_parse_reads_functions_from_files(tmp_path: Path) -> None:
    file = tmp_path / "my-rewards.py"
    file.write_text("def redness(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    reward = parse(f"2*{file}:redness + symmetry")
    assert reward.name == f"2*{file}:redness + symmetry"
    images = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(parse(f"{file}:redness")(images, [""]), images[:, 0].mean((1, 2)))
    with pytest.raises(UserError, match=r"did you mean 'redness'"):
        parse(f"{file}:rednes")
    file.write_text("import nothing_like_this\n")
    with pytest.raises(UserError, match=r"failed to run: ModuleNotFoundError"):
        parse(f"{file}:redness")


def test_listing_rewards_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys
from chainrule import rewards
assert not {"torch", "transformers"} & {*sys.modules}
print(rewards.PickScore().name)
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("pickscore\n", "")
    assert all(getattr(rewards, name) is not None for name in rewards.__all__)


# --------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean((2, 3)), r"'bad' must return .* \(2,\), but it returned shape \(2, 3\)"),
        (lambda images, prompts: images.mean(), r"returned shape \(\)"),
        (lambda images, prompts: 0.5, "returned 0.5"),
        (lambda images, prompts: images.sum((1, 2, 3)).long(), "returned torch.int64"),
        (lambda images, prompts: images.sum((1, 2, 3)) / 0, "'bad' returned .*inf.*; it must be finite"),
        (lambda images, prompts: (images.sum((1, 2, 3)) * -1).log(), "'bad' returned .*nan"),
        (lambda images, prompts: images.detach().mean((1, 2, 3)), "no gradient to the pixels; compute it from"),
        (lambda images, prompts: images.round().mean((1, 2, 3)), "no gradient to the pixels"),
        (lambda images, prompts: (images * 0).sqrt().sum((1, 2, 3)) + images.mean(), "is not finite; look for sqrt"),
        (lambda images, prompts: images @ torch.ones(7), "'bad' fails on 16x16 images: RuntimeError"),
    ],
)
def test_probe_refuses_broken_rewards(function: rewards.RewardFunction, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        probe(reward_of(function, name="bad"), 16)
    assert "\n" not in str(caught.value)


def test_checked_wants_a_prompt_per_image() -> None:
    with pytest.raises(UserError, match=r"2 images but 1 prompts"):
        checked(rewards.Symmetry(), torch.rand(2, 3, 8, 8), [""])


def test_bad_sources_are_refused_before_anything_is_loaded(models: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no safetensors weights in"):
        rewards.PickScore(str(pickled))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for make in (rewards.CLIPScore, rewards.PickScore, rewards.HPSv2, rewards.Aesthetic):
        with pytest.raises(UserError, match=r"refusing.*pickled weights.*convert them to safetensors"):
            make(str(pickled))
        with pytest.raises(UserError, match=r"refusing .*HPS_v2_compressed.pt"):
            make("HPS_v2_compressed.pt")
        with pytest.raises(UserError, match=r"no folder '.*absent'"):
            make(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"is a file; give the folder"):
        rewards.CLIPScore(str(models / "clip" / "model.safetensors"))
    with pytest.raises(UserError, match=r"no config\.json in"):
        rewards.CLIPScore(str(models / "aesthetic"))
    with pytest.raises(UserError, match=r"is not an aesthetic head"):
        rewards.Aesthetic(str(models / "clip"), clip=str(models / "clip")).load()


def test_tiny_means_the_bundled_folders(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("chainrule.rewards.clip.BUNDLED", tmp_path)
    with pytest.raises(UserError, match=r"bundled reward weights are missing"):
        rewards.PickScore("tiny")
    monkeypatch.setattr("chainrule.rewards.clip.BUNDLED", models)
    images = random_images(SIZE, SIZE, 3)
    for name in ("pickscore", "hpsv2", "aesthetic", "clip"):
        reward = parse(f"{name}:tiny")
        assert reward.name == f"{name}:tiny"
        torch.testing.assert_close(reward(images, PROMPTS), ALL[name](models)(images, PROMPTS))


def test_constants_are_those_of_the_processor() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert tuple(CLIPImageProcessorPil().image_mean) == MEAN
    assert tuple(CLIPImageProcessorPil().image_std) == STD
