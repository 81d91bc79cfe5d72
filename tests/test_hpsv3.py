"""HPSv3 beside transformers' own Qwen2-VL: pixels, tokens, scores and gradients, on random weights in the published format."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reward_models import PROMPTS, pictures, pil, random_images
from safetensors.torch import load_file, save_file
from torch import Tensor

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.rewards import hpsv3
from chainrule.rewards.hpsv3 import fitted, instruction, load_hpsv3

AREA = 256 * 28 * 28  # HPSv3's smallest and largest, in pixels


@pytest.fixture
def folder(models: Path) -> Path:
    return models / "hpsv3"


def processor() -> Any:
    return pil("Qwen2VLImageProcessor")(min_pixels=AREA, max_pixels=AREA)


class Official:
    """HPSv3 as its authors' forward has it: one padded batch, embeddings without positions, every token rated, one picked."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

        state = load_file(folder / hpsv3.FILE)
        self.head = {key: state.pop(key) for key in list(state) if key.startswith("rm_head")}
        config = Qwen2VLConfig.from_pretrained(folder)
        # transformers itself renames what older versions of it have saved
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
        self.asked = (folder / "instruction.txt").read_text()

    def ids(self, shapes: Tensor, prompts: Sequence[str], side: str = "right") -> dict[str, Tensor]:
        texts = [
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * (int(shape.prod()) // 4)}<|vision_end|>"
            f"{self.asked.format(text_prompt=prompt)}<|im_end|>\n<|im_start|>assistant\n"
            for shape, prompt in zip(shapes, prompts, strict=True)
        ]
        return dict(self.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))

    def score(self, pixels: Tensor, shapes: Tensor, prompts: Sequence[str], side: str = "right", places: Any = None) -> Tensor:
        """mu and sigma, (b, 2)."""
        said = self.ids(shapes, prompts, side)
        seen = self.model.get_image_features(pixels, shapes)
        seen = torch.cat(tuple(getattr(seen, "pooler_output", seen)))
        words = self.model.get_input_embeddings()(said["input_ids"])
        hole = (said["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|image_pad|>"))[..., None].expand_as(words)
        words = words.masked_scatter(hole, seen)
        mask = said["attention_mask"]
        read = self.model.model(inputs_embeds=words, attention_mask=mask, position_ids=places).last_hidden_state
        for layer in (0, 3, 5):
            read = read @ self.head[f"rm_head.{layer}.weight"].T + self.head[f"rm_head.{layer}.bias"]
            read = read.relu() if layer < 5 else read
        return read[said["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|Reward|>")]


# ------------------------------------------------------------------------------------------------------------- pictures
def test_sizes_are_qwens_own() -> None:
    room = importlib.import_module(type(processor()).__module__)
    draw = np.random.default_rng(0)
    sizes = [(448, 448), (512, 512), (1024, 1024), (768, 1360), (10, 2000), *draw.integers(1, 3000, (300, 2)).tolist()]
    for height, width in sizes:
        if max(height, width) <= 200 * min(height, width):
            assert fitted(height, width) == room.smart_resize(height, width, 28, AREA, AREA), (height, width)
    with pytest.raises(UserError, match=r"at most 200 to 1, not 3x601"):
        fitted(3, 601)


@pytest.mark.parametrize("size", [(448, 448), (224, 896), (512, 512), (256, 384), (300, 200), (40, 88)])
def test_pixels_are_the_processors(folder: Path, size: tuple[int, int]) -> None:
    image = random_images(*size)
    official = processor()(images=pictures(image), return_tensors="pt")
    judge = load_hpsv3(str(folder))
    ours = judge.pixels(image)
    height, width = judge.size(image)
    assert official["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    apart = (ours - official["pixel_values"]).abs()
    if size == (height, width):
        assert apart.max() < 1e-5
    else:
        assert apart.mean() < 5e-4 and apart.max() < 0.05  # a level of 8 bits is 0.015


def test_patches_stand_where_the_processor_puts_them() -> None:
    """Every number of a picture is another one."""
    picture = torch.arange(3 * 56 * 84, dtype=torch.float32).view(3, 56, 84)
    plain = pil("Qwen2VLImageProcessor")(do_rescale=False, do_normalize=False, do_resize=False)
    official = plain(images=[picture.numpy()], return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    assert torch.equal(hpsv3.patches(picture, 14, 2, 2), official)


# --------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_transformers_model_and_the_head(folder: Path, side: str) -> None:
    official, judge = Official(folder), load_hpsv3(str(folder))
    images = random_images(224, 896, 3)
    given = processor()(images=pictures(images), return_tensors="pt")
    said = official.ids(given["image_grid_thw"], PROMPTS)
    for k, prompt in enumerate(PROMPTS):
        assert judge.tokens(prompt, (224, 896)).tolist() == said["input_ids"][k][said["attention_mask"][k] == 1].tolist()
    with torch.no_grad():
        wanted = official.score(given["pixel_values"], given["image_grid_thw"], PROMPTS, side)[:, 0]
        ours = rewards.HPSv3(str(folder))(images, PROMPTS)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.01  # pictures and prompts are told apart
    asked = rewards.HPSv3(str(folder))(images[:1].expand(3, -1, -1, -1), PROMPTS)
    assert asked.std() > 0.01


def test_qwens_own_positions_would_give_other_scores(folder: Path) -> None:
    """What a plain call of transformers' model with token numbers does, and HPSv3's forward does not."""
    official, image = Official(folder), random_images(448, 448)
    given = processor()(images=pictures(image), return_tensors="pt")
    ids = official.ids(given["image_grid_thw"], PROMPTS[:1])["input_ids"][0]
    hole = (ids == official.tokenizer.convert_tokens_to_ids("<|image_pad|>")).nonzero()[:, 0]
    flat = torch.arange(len(ids)).expand(3, 1, -1)
    places, cell = flat.clone(), torch.arange(256)
    places[:, 0, hole] = int(hole[0]) + torch.stack([torch.zeros(256, dtype=torch.long), cell // 16, cell % 16])
    places[:, 0, hole[-1] + 1 :] -= 256 - 16
    with torch.no_grad():
        one, two = (
            official.score(given["pixel_values"], given["image_grid_thw"], PROMPTS[:1], places=p)[0, 0] for p in (flat, places)
        )
        ours = rewards.HPSv3(str(folder))(image, PROMPTS[:1])[0]
    torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-4)
    assert (one - two).abs() > 100 * (ours - one).abs()


# ------------------------------------------------------------------------------------------------------------ gradients
def test_the_gradient_is_that_of_transformers_model(folder: Path) -> None:
    """By its pixel_values, put back into a picture one patch after the other."""
    official, image = Official(folder), random_images(448, 448).requires_grad_()
    (ours,) = torch.autograd.grad(rewards.HPSv3(str(folder))(image, PROMPTS[:1]).sum(), image)
    given = processor()(images=pictures(image.detach()), return_tensors="pt")
    pixels = given["pixel_values"].requires_grad_()
    (flat,) = torch.autograd.grad(official.score(pixels, given["image_grid_thw"], PROMPTS[:1])[0, 0], pixels)
    back, std = torch.zeros(3, 448, 448), torch.tensor(processor().image_std).view(3, 1, 1)
    corners = [(2 * r + i, 2 * c + j) for r in range(16) for c in range(16) for i in range(2) for j in range(2)]
    for row, (y, x) in zip(flat.view(-1, 3, 2, 14, 14), corners, strict=True):
        back[:, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14] = row.sum(1) / std
    torch.testing.assert_close(ours[0], back, rtol=1e-3, atol=1e-4 * float(back.abs().max()))


def test_the_gradient_is_that_of_finite_differences(folder: Path) -> None:
    """In float32: Qwen2-VL's norms compute in it whatever they are given. Along the gradient, and along smooth directions."""
    reward, image = rewards.HPSv3(str(folder)), random_images(448, 448).clamp(0.1, 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(image, PROMPTS[:1]).sum(), image)
    for seed in range(3):
        way = gradient if seed == 0 else random_images(448, 448, seed=seed) - 0.5
        step = 0.05 * way / way.norm()
        with torch.no_grad():
            ends = [float(reward(image + sign * step, PROMPTS[:1])) for sign in (1, -1)]
        expected = 2 * float((gradient * step).sum())
        assert abs(ends[0] - ends[1] - expected) < 0.02 * 2 * 0.05 * float(gradient.norm())


def test_an_image_is_read_alone_to_the_last_bit(folder: Path) -> None:
    reward, images = rewards.HPSv3(str(folder)), random_images(200, 300, 3).requires_grad_()
    values = reward(images, PROMPTS)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    for k in range(3):
        one = images[k : k + 1].detach().requires_grad_()
        value = reward(one, PROMPTS[k : k + 1])
        assert torch.equal(value, values[k : k + 1])
        assert torch.equal(torch.autograd.grad(value.sum(), one)[0], gradient[k : k + 1])


def test_in_bfloat16_the_network_is_held_in_it_and_the_head_is_not(folder: Path) -> None:
    reward, images = rewards.On(rewards.HPSv3(str(folder)), "cpu", "bfloat16"), random_images(64, 64, 2).requires_grad_()
    values = reward.to("cpu")(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert gradient.isfinite().all() and all(each.any() for each in gradient)
    torch.testing.assert_close(values, rewards.HPSv3(str(folder))(images, PROMPTS[:2]), rtol=0, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        judge = load_hpsv3(str(folder))
    assert {p.dtype for p in judge.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in judge.head.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # the autocast says the type and changes nothing else
        within = judge(images, PROMPTS[:2])
    with torch.no_grad():
        assert torch.equal(within, judge(images, PROMPTS[:2]))


# ---------------------------------------------------------------------------------------------------------------- files
@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "other"))


def test_newer_names_several_files_and_a_path_are_the_same_model(folder: Path, other: Path) -> None:
    image, wanted = random_images(64, 64), rewards.HPSv3(str(folder))(random_images(64, 64), ["a fox"])
    file = rewards.HPSv3(str(folder / hpsv3.FILE))
    assert torch.equal(file(image, ["a fox"]), wanted)
    assert rewards.parse(file.name) == file
    state = load_file(other / hpsv3.FILE)
    (other / hpsv3.FILE).unlink()
    new = {key.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): state[key] for key in state}
    new = {key.replace("model.language_model.model.visual", "model.visual"): value for key, value in new.items()}
    del new["lm_head.weight"]  # which nothing reads
    keys = sorted(new)
    save_file({key: new[key] for key in keys[::2]}, other / "model-00001-of-00002.safetensors")
    save_file({key: new[key] for key in keys[1::2]}, other / "model-00002-of-00002.safetensors")
    assert torch.equal(rewards.HPSv3(str(other))(image, ["a fox"]), wanted)


def refused(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        rewards.HPSv3(str(source)).to("cpu")
    rewards.release()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_with_other_tensors_is_refused(other: Path) -> None:
    state = load_file(other / hpsv3.FILE)

    def changed(**tensors: Tensor | None) -> str:
        now = {key: value for key, value in {**state, **tensors}.items() if value is not None}
        save_file(now, other / hpsv3.FILE)
        return refused(other)

    assert "it has no 'language_model.norm.weight'" in changed(**{"model.norm.weight": None})
    assert "it should have no 'visual.more'" in changed(**{"visual.more": torch.zeros(1)})
    assert "it has no 'model.embed_tokens.weight'" in changed(**{"model.embed_tokens.weight": None})
    wrong = changed(**{"model.norm.weight": torch.zeros(5)})
    assert "'language_model.norm.weight' is (5,), and by its configuration it is (32,)" in wrong
    assert "does not fit" in changed(**{"rm_head.5.bias": None})
    assert "does not fit" in changed(**{"rm_head.7.bias": torch.zeros(2)})
    short = state["model.embed_tokens.weight"][:-1].clone()
    assert "no row for <|Reward|>, token 263" in changed(**{"model.embed_tokens.weight": short})
    (other / hpsv3.FILE).unlink()
    assert "no safetensors weights" in refused(other)
    with pytest.raises(UserError, match=r"refusing .*HPSv3\.pth"):
        rewards.HPSv3("HPSv3.pth")
    with pytest.raises(UserError, match="there is no tiny hpsv3"):
        rewards.HPSv3("tiny")


def test_a_tokenizer_without_a_chat_is_refused(other: Path) -> None:
    for file in other.glob("chat_template*"):
        file.unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    assert "has no chat template" in refused(other)


def test_a_prompt_with_a_word_of_the_template_is_refused(folder: Path) -> None:
    for word in ("<|Reward|>", "<|image_pad|>"):
        with pytest.raises(UserError, match=f"cannot read the prompt .*{word[2:-2]}"):
            rewards.HPSv3(str(folder))(random_images(64, 64), [f"a cat {word}"])
    assert rewards.HPSv3(str(folder))(random_images(64, 64), ["a {cat} {0} {text_prompt}"]).isfinite().all()


def test_the_instruction_is_a_file_or_read_from_the_authors_source(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert instruction(other) == (other / "instruction.txt").read_text()
    (other / "instruction.txt").write_text("{text_prompt} <|Reward|> <|Reward|>")
    assert "must have <|Reward|> in it once, but has it 2 times" in refused(other)
    (other / "instruction.txt").unlink()
    assert "instruction.txt', and no package hpsv3" in refused(other)
    package = tmp_path / "site" / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('this was run')\n")
    source = 'raise RuntimeError\nINSTRUCTION = """\nRate {text_prompt}  \n"""\nINSTRUCTION_debug = "no"\n'
    (package / "data_collator_qwen.py").write_text(source + 'prompt_with_special_token = """\nIt is: <|Reward|>\n"""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert instruction(other) == "\nRate {text_prompt}  \n\nIt is: <|Reward|>\n"
    assert rewards.HPSv3(str(other))(random_images(64, 64), ["a fox"]).isfinite().all()
