"""Rewards without a gradient: the size of a file, and what another program says."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import chainrule as cr
from chainrule import rewards
from chainrule.named import refuse_code
from chainrule.pictures import pictures

SCORER = """
import base64, io, json, sys
from PIL import Image
for line in sys.stdin:
    told = json.loads(line)
    image = Image.open(io.BytesIO(base64.b64decode(told["image"])))
    print(sum(image.getpixel((0, 0))) + len(told["prompt"]), flush=True)
"""


def program(folder: Path, text: str = SCORER) -> str:
    (folder / "scorer.py").write_text(text)
    return f"process:{shlex.quote(sys.executable)} {folder / 'scorer.py'}"


def test_filesize_is_that_of_the_file_on_disk(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 24, 16)
    for reward, quality in (("filesize", 95), ("filesize:60", 60)):
        found = rewards.parse(reward)(images, ["", ""])
        for i, picture in enumerate(pictures(images)):
            picture.save(tmp_path / "a.jpg", quality=quality)
            assert float(found[i]) == pytest.approx((tmp_path / "a.jpg").stat().st_size / 1000)
        assert rewards.parse(reward).name == reward
    with pytest.raises(cr.UserError, match="from 1 to 100, got 0"):
        rewards.parse("filesize:0")


def test_a_program_is_asked_with_the_picture_and_the_prompt(tmp_path: Path) -> None:
    reward = rewards.parse(f"2*{program(tmp_path)} - filesize")
    images = torch.rand(3, 3, 8, 8)
    prompts = ["a fox", "two\nbees", "ein Bär"]
    told = [sum(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).getpixel((0, 0))) for image in images]  # type: ignore[arg-type]
    sizes = rewards.parse("filesize")(images, prompts)
    for _ in range(2):  # the same program goes on
        values = reward(images, prompts)
        torch.testing.assert_close(values, 2.0 * torch.tensor([a + len(p) for a, p in zip(told, prompts, strict=True)]) - sizes)
    assert rewards.parse(reward.name).name == reward.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit(3)", "ended with code 3"),
        ("print('hello', flush=True)\nimport sys\nsys.stdin.read()", "said 'hello'; it must write one number per line"),
        ("print('nan', flush=True)\nimport sys\nsys.stdin.read()", "said 'nan'"),
    ],
)
def test_a_program_that_does_not_answer_with_numbers_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(cr.UserError, match=said) as caught:
        rewards.parse(program(tmp_path, text))(torch.rand(1, 3, 8, 8), ["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reward", ["process:", "process:no-such-program", "process:echo '"])
def test_a_program_that_is_not_there_is_one_line(reward: str) -> None:
    with pytest.raises(cr.UserError, match=r"command|cannot be started"):
        rewards.parse(reward)(torch.rand(1, 3, 8, 8), ["a"])


def test_a_config_that_names_a_program_asks_for_leave() -> None:
    for text in ("process:python x", "symmetry + 2*process:python x", "-process:python x.py"):
        with pytest.raises(cr.UserError, match=r"names code to run, reward: .*--allow-code"):
            refuse_code({"reward": text}, "config.yaml", allowed=False)
        refuse_code({"reward": text}, "config.yaml", allowed=True)
    refuse_code({"prompts": "subprocess: a story", "reward": "clip:tiny:the process: it"}, "config.yaml", allowed=False)


def numbers(images: torch.Tensor, prompts: Any) -> list[float]:
    return images.mean((1, 2, 3)).tolist()


def test_a_list_of_numbers_is_a_reward_where_no_gradient_is_asked() -> None:
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(rewards.checked(rewards.reward_of(numbers), images, [""] * 3), images.mean((1, 2, 3)))
    assert rewards.probe(rewards.reward_of(numbers), 8, gradient=False).isfinite().all()
    with pytest.raises(cr.UserError, match="passes no gradient to the pixels"):
        rewards.probe(rewards.reward_of(numbers), 8)
