"""One contract for every reward, their algebra, and how words become rewards. Formulas: test_reward_*.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from reward_models import ALL, LEARNED, OF_A_BATCH, PROMPTS, SIZE, brightness, pil, random_images
from torch import Tensor, nn

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.offload import streamed
from chainrule.rewards import checked, parse, probe, reward_of
from chainrule.rewards.classifier import load_classifier
from chainrule.rewards.clip import MEAN, STD, load_clip
from chainrule.rewards.detect import load_owl
from chainrule.rewards.hpsv3 import load_hpsv3
from chainrule.rewards.imagereward import load_imagereward
from chainrule.rewards.likeness import load_encoder
from chainrule.rewards.loaded import release
from chainrule.rewards.registry import REGISTRY, described
from chainrule.rewards.safety import load_checker
from chainrule.rewards.siglip import load_siglip


@pytest.fixture(params=ALL)
def reward(request: pytest.FixtureRequest, models: Path) -> rewards.Reward:
    return ALL[request.param](models)


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


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_a_reward_of_the_batch_keeps_the_rest_of_the_contract(models: Path, name: str) -> None:
    reward, images = OF_A_BATCH[name](models), random_images(48, 48, 4).requires_grad_()
    values = checked(reward, images, [""] * 4)
    assert values.shape == (4,)
    assert values.dtype == torch.float32
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert all(image.abs().sum() > 0 for image in gradient)
    assert gradient.isfinite().all()
    step = (images + 1e-3 * gradient / gradient.norm()).detach()
    assert reward(step, [""] * 4).sum() > values.sum()
    assert probe(reward, 48).shape == (2,)
    assert parse(reward.name) == reward


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
    total = sum(weight * term(images, PROMPTS) for weight, term in reward.weighted())
    torch.testing.assert_close(total, reward(images, PROMPTS))
    assert reward.to("cpu") == reward
    if not {"brightness", "aesthetic", "dropout"} & set(re.split(r"\W", reward.name)):  # functions, and two sources
        assert parse(reward.name).weighted() == reward.weighted()


def test_reduced_precision_images_are_scored_in_float32(models: Path) -> None:
    images = random_images(48, 40, 2)
    for name in LEARNED:
        reward = ALL[name](models)
        low = reward(images.bfloat16(), PROMPTS[:2])
        assert low.dtype == torch.float32
        assert low.isfinite().all()


def _networks(models: Path, name: str) -> list[nn.Module]:
    """The networks of a reward, as its loader gives them once it is loaded."""
    source = {name: str(models / folder) for name, folder in LEARNED.items()}[name]
    if name in ("siglip", "imagereward"):
        found = load_siglip(source)[:1] if name == "siglip" else (lambda b: (b.vision, b.text, b.head))(load_imagereward(source))
    elif name == "hpsv3":
        found = [load_hpsv3(source).model, load_hpsv3(source).head]
    elif name == "identity":
        found = [load_encoder(source).model]
    elif name in ("detect", "area"):
        found = [load_owl(source).model]
    elif name in ("safe", "classifier"):
        found = [load_classifier(source).model]
    else:
        found = [load_checker(source).vision if name == "concepts" else load_clip(source, "hps").model]
    return list(found)


@pytest.mark.parametrize("name", LEARNED)
def test_weights_are_frozen_shared_and_left_alone(models: Path, name: str) -> None:
    images = random_images(SIZE, SIZE, 2).requires_grad_()
    ALL[name](models)(images, PROMPTS[:2]).sum().backward()
    for network, again in zip(_networks(models, name), _networks(models, name), strict=True):
        assert network is again
        assert not network.training
        assert all(p.dtype == torch.float32 and not p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", [*LEARNED, "style", "perceptual"])
def test_networks_go_when_they_are_released_and_come_back_when_they_are_needed(models: Path, name: str) -> None:
    reward, images = ALL[name](models), random_images(SIZE, SIZE, 2)
    expected = reward(images, PROMPTS[:2])
    gone = [weakref.ref(network) for network in _networks(models, name)] if name in LEARNED else []
    rewards.release()
    assert not [network for network in gone if network() is not None]
    assert torch.equal(reward(images, PROMPTS[:2]), expected)


def test_rewards_that_look_with_one_clip_load_it_once(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPModel

    source, loads, load = str(shutil.copytree(models / "clip", tmp_path / "one")), [], CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    both = rewards.CLIPScore(source) + rewards.CLIPScore(source, "a fox") + rewards.Perceptual(source)
    more = (
        rewards.Aesthetic(str(models / "aesthetic"), clip=source)
        + rewards.Diversity(source)
        + rewards.On(rewards.PickScore(source), "cpu")
    )
    (both + more).to("cpu")(random_images(SIZE, SIZE, 2), PROMPTS[:2])
    assert len(loads) == 1


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
    assert (10 * a - b).weighted() == ((10, a), (-1, b))
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
    tested = {*ALL, *OF_A_BATCH} - {"function", "sum", "target", "on", "diversity of features"}
    assert {*rewards.REGISTRY} - {"lpips", "filesize", "process"} == tested
    needs = {
        "detect": ":a person, people",
        "area": ":strawberries",
        "directional": ":a face to a sad face",
        "classifier": ":dog",
        "style": f":{models}/style.png",
        "process": ":python scorer.py",
    }
    for name, entry in rewards.REGISTRY.items():
        if name == "lpips":  # its package is not installed here
            continue
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
    assert parse("pickscore<=25") == rewards.Hinge(rewards.PickScore(), 25.0)
    assert parse("2*clip:tiny:an angry face<=0.3 - symmetry<=-0.5").name == "2*clip:tiny:an angry face<=0.3 - symmetry<=-0.5"
    assert parse("aesthetic->10") == rewards.Target(rewards.Aesthetic(), 10.0)
    assert parse("directional:a face to a sad face") == rewards.Directional(text="a face to a sad face")
    assert parse("siglip:an angry face") == rewards.SigLIP(text="an angry face")
    assert parse("detect:a person, people - area:tiny-lab/owl:a cat").weighted() == (
        (1.0, rewards.Detection("a person, people")),
        (-1.0, rewards.DetectedArea("a cat", "tiny-lab/owl")),
    )
    assert parse("dropout:0.5:tiny") == rewards.Dropout(0.5, source="tiny")
    assert parse("dropout:tiny-symmetry").weighted()[0][1] == rewards.Dropout(source="tiny")
    assert parse("dropout:0.25 + diversity:tiny") == rewards.Dropout(0.25) + rewards.Diversity("tiny")
    assert parse("hpsv2.1-hpsv2:tiny") == rewards.HPSv21() - rewards.HPSv2("tiny")
    assert parse("hpsv2 + siglip + detect:a cat", "tiny") == rewards.HPSv2("tiny") + rewards.SigLIP() + rewards.Detection("a cat")
    on = rewards.On(rewards.CLIPScore(text="a sad face"), "cuda:1")
    for written, wanted in (
        ("clip:a sad face@cuda:1", on),
        ("clip:a sad face@cuda:1->0.3", rewards.Target(on, 0.3)),
        (
            "2*pickscore:tiny@cpu/bfloat16+symmetry",
            2 * rewards.On(rewards.PickScore("tiny"), "cpu", "bfloat16") + rewards.Symmetry(),
        ),
        ("symmetry@cpu-rotation", rewards.On(rewards.Symmetry(), "cpu") - rewards.RotationalAnticorrelation()),
    ):
        assert parse(written) == wanted
        assert parse(wanted.name) == wanted
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
        ("compressible:30:tiny", "takes nothing after its quality"),
        ("compressible:0x", "a JPEG ratio must be from 1 to 1000, got 0"),
        ("dropout:high", "takes a number after the colon .rate., got 'high'"),
        ("dropout:1", "from 0 to less than 1, got 1"),
        ("detect", "'detect' needs a text after a colon"),
        ("detect:tiny:a cat", "there is no tiny detector"),
        ("imagereward:tiny", "there is no tiny imagereward"),
        ("hpsv2.1:nowhere/HPS.pt", "no file 'nowhere/HPS.pt'"),
        ("pickscore@gpu", "unknown reward 'pickscore@gpu'; did you mean 'pickscore'"),
        ("pickscore:tiny@cpu/int8", "dtype is float32, bfloat16, float16, not 'int8'"),
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


def test_the_page_of_rewards_has_every_name_and_class() -> None:
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    for name, entry in rewards.REGISTRY.items():
        assert f"| `{name}` `{entry.where.split('.')[1]}` |" in page
        assert f"`{name}`" in page.partition("## What was checked")[2]


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


def test_constants_are_those_of_the_processor() -> None:
    official = pil("CLIPImageProcessor")()
    assert tuple(official.image_mean) == MEAN and tuple(official.image_std) == STD


# ------------------------------------------------------------------------------------------------------------- CLIP's towers
TEXTS = ["a fox", "two bees", "an owl", "a cat", "a red dog"]


def test_a_text_is_read_once_and_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    release()
    clip, read = load_clip("tiny", "pick"), []
    hook = clip.model.text_model.register_forward_hook(lambda _, given, answer: read.append(answer))
    for prompts in (TEXTS[2:3], TEXTS, TEXTS[::-1], TEXTS[2:3] * 3):
        clip.text(prompts)
    hook.remove()
    assert len(read) == 2  # the first alone, then the four others
    together, alone = clip.text(TEXTS), []
    for prompt in TEXTS:
        release()
        alone.append(load_clip("tiny", "pick").text([prompt])[0])
    assert torch.equal(torch.stack(alone), together) and not together.requires_grad
    monkeypatch.setattr("chainrule.rewards.clip.MOST_TEXTS", 3)
    torch.testing.assert_close(clip.text(TEXTS), together, rtol=0, atol=0)
    length = clip.model.config.text_config.max_position_embeddings
    tokens = clip.tokenizer(TEXTS, padding="max_length", max_length=length, return_tensors="pt")
    given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    official = clip.model(pixel_values=torch.zeros(1, 3, clip.size, clip.size), **given)
    torch.testing.assert_close(together, official.text_embeds)


def test_in_half_precision_the_image_tower_takes_half_the_memory() -> None:
    release()
    half = parse("pickscore:tiny@cpu/bfloat16").to("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        clip = load_clip("tiny", "pick")
    towers = (clip.model.vision_model, clip.model.visual_projection)
    assert {w.dtype for part in towers for w in part.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in clip.model.text_model.parameters()} == {torch.float32}
    exact, images = parse("pickscore:tiny"), random_images(48, 48, 3)
    assert {w.dtype for w in load_clip("tiny", "pick").model.parameters()} == {torch.float32}
    values = exact(images, TEXTS[:3])
    torch.testing.assert_close(half(images, TEXTS[:3]), values, rtol=0.03, atol=0.3)
    assert torch.equal(exact(images, TEXTS[:3]), values)


def test_a_text_tower_that_stays_on_the_cpu_reads_the_same() -> None:
    release()
    expected = load_clip("tiny", "pick").text(TEXTS)
    release()
    clip = load_clip("tiny", "pick")
    streamed(clip.model.text_model, "cpu")
    assert {w.device.type for w in clip.model.text_model.parameters()} == {"meta"}
    assert torch.equal(clip.text(TEXTS), expected)
    release()


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("10*pickscore:tiny + 2*hpsv2.1 - detect:a safe person", ["pickscore", "hpsv2.1", "detect"]),
        ("style:x.png -aesthetic@cuda:1", ["style", "aesthetic"]),
        ("a/clip.py:clip + symmetry", ["symmetry"]),
        ("hpsv2", ["hpsv2"]),
        ("clipped", []),
    ],
)
def test_names_in_a_written_reward_are_found(written: str, names: list[str]) -> None:
    assert described(written) == {name: REGISTRY[name].about for name in names}
