"""Height and width are two numbers: how a size is written, what does not fit, and everything on images higher than wide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CASES, TALL
from PIL import Image
from pipelines import make_pipeline
from reward_models import ALL
from torch import Tensor

import chainrule as cr
from chainrule.doctor import examine
from chainrule.errors import UserError
from chainrule.methods import DRaFTLV
from chainrule.rewards import probe
from chainrule.settings import Opening
from chainrule.size import config_size, size_of
from chainrule.steer.images import read_image

SIZE = (24, 16)


def dark(images: Tensor, prompts: list[str]) -> Tensor:
    return -images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("given", "size", "text"),
    [
        (512, (512, 512), 512), ("512", (512, 512), 512), ("768x1024", (768, 1024), "768x1024"),
        ((768, 1024), (768, 1024), "768x1024"), ([64, 64], (64, 64), 64),
    ],
)  # fmt: skip
def test_a_size_is_read_as_it_is_written(given: Any, size: tuple[int, int], text: int | str) -> None:
    assert size_of(given) == size and config_size(size) == text and size_of(config_size(size)) == size
    assert Opening(size=given).size == text


@pytest.mark.parametrize("given", ["big", "512x", "x512", "1x2x3", 4, "512x4", -512, True, (512,), (512, 512.5), (1, 2, 3), 0.5])
def test_what_is_no_size_is_refused(given: Any) -> None:
    for read in (size_of, lambda value: Opening(size=value), lambda value: cr.load("tiny-emoji", size=value)):
        with pytest.raises(UserError, match=r"^size is .*, but must be pixels a side, at least 8, or HEIGHTxWIDTH as 768x1024$"):
            read(given)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd", (24, 17), "size is 24x17, but both must be multiples of 2 for StableDiffusionPipeline"),
        ("flux", (24, 18), "size is 24x18, but both must be multiples of 4 for FluxPipeline"),
        ("sd3", (16, 80), "size is 16x80, but this model has places for images up to 64 pixels a side"),
        ("ddpm", (24, 16), "size is 24x16, but DDPMPipeline is a model of 16 pixels"),
    ],
)
def test_a_size_that_does_not_fit_a_family_is_refused(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cr.load(CASES[name].pipe(), size=size)


def test_a_model_is_opened_again_at_its_size(sd_folder: Path, tmp_path: Path, chainrule: Callable[..., SimpleNamespace]) -> None:
    model = cr.load(sd_folder, size=SIZE)
    assert (model.size, model.codec.latent_shape) == (SIZE, (4, 12, 8))
    again = cr.load(sd_folder, **{key: value for key, value in model.opening.items() if value is not None})
    pictures = model.sample(["a fox"], seeds=[3], steps=2)
    assert pictures[0].size == (16, 24) and pictures[0].tobytes() == again.sample(["a fox"], seeds=[3], steps=2)[0].tobytes()
    out = tmp_path / "images"
    found = chainrule("sample", sd_folder, "--prompts", "a fox", "--seeds", "3", "--steps", "2", "--size", "24x16", "--out", out)
    assert found.code == 0, found.err
    assert {Image.open(path).size for path in out.glob("*.png") if path.name != "grid.png"} == {(16, 24)}


def test_large_images_are_scored_fewer_at_a_time_whatever_their_shape() -> None:
    wide, square = (cr.load(make_pipeline(), size=size) for size in ((256, 2048), (1024, 1024)))
    assert wide.micro_batch == 2 and square.micro_batch == 1


def test_a_picture_is_cropped_around_its_middle_and_resized() -> None:
    """Three bands of color, 60 wide and 20 high: of height 20 and width 10 only the middle one is left."""
    picture = Image.new("RGB", (60, 20), "red")
    picture.paste((0, 255, 0), (20, 0, 40, 20))
    seen = read_image(picture, (16, 8))
    torch.testing.assert_close(seen, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 16, 8))
    assert read_image(picture, (8, 24)).shape == (3, 8, 24)
    torch.testing.assert_close(read_image(picture, (20, 60))[:, 0, ::20], torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]]))


def test_training_and_steering_and_the_doctor_on_images_higher_than_wide(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32), size=SIZE)
    run = cr.finetune(model, DRaFTLV(), dark, ["a fox", "two bees"], out=tmp_path / "run", steps=1, batch=2, sample_steps=2, rank=2)
    assert run.config.opening.size == "24x16"
    assert cr.report(run.folder).is_file()
    found = cr.steer(model, ["a fox"], reward=dark, images=[Image.new("RGB", (30, 30), "teal")], updates=2, steps=2, guidance=1.0)
    assert [image.size for image in (*found.images, *found.before)] == [(16, 24)] * 2
    assert found.rewards[0] > found.rewards_before[0]
    checks = list(examine(model, steps=2))
    untrained = ("autoencoder", "prediction")  # random weights bring nothing back
    assert not [check for check in checks if check.fine is False and check.name not in untrained], checks


@pytest.mark.parametrize("name", TALL)
def test_the_doctor_compares_with_the_pipeline_at_the_same_size(name: str) -> None:
    model = cr.load(TALL[name].pipe(), size=TALL[name].size)
    (samples,) = [check for check in examine(model, steps=2) if check.name == "samples"]
    assert samples.fine


@pytest.mark.parametrize("name", ALL)
def test_a_reward_reads_images_of_any_shape_or_says_so(name: str, models: Path) -> None:
    reward = ALL[name](models)
    if name == "rotation":
        with pytest.raises(UserError, match="reward 'rotation' needs square images, got 72x56"):
            probe(reward, (72, 56))
        return
    assert probe(reward, (72, 56)).shape == (2,) and probe(reward, (40, 88)).isfinite().all()
