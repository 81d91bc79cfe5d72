"""Rewards without a network: JPEG against Pillow, the others in closed form."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import PROMPTS, SIZE, brightness, pictures, random_images

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.rewards import reward_of
from chainrule.rewards.jpeg import jpeg, quality_of


def test_a_target_is_the_distance_to_a_value(models: Path) -> None:
    images = random_images(SIZE, SIZE, 3)
    enough = rewards.Hinge(reward_of(brightness), 0.5)
    images = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 4, 4).clone().requires_grad_()
    values = enough(images, [""] * 3)
    assert values.tolist() == pytest.approx([-0.3, 0, 0], abs=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert gradient[0].abs().min() > 0 and not gradient[2].any()
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


def test_a_jpeg_ratio_is_reached_by_the_highest_quality() -> None:
    """By Pillow's encoder: the next quality's file would be too large. The value is that of this quality."""
    images = torch.rand(3, 3, 64, 64) * torch.tensor([1.0, 0.3, 0.05])[:, None, None, None]
    found = quality_of(images, 4.0)
    for image, quality in zip(images, found, strict=True):
        sizes = []
        for each in (quality, quality + 1):
            file = io.BytesIO()
            pictures(image[None])[0].save(file, "JPEG", quality=each, subsampling=2)
            sizes.append(file.tell())
        assert 1 < quality < 100 and 3 * 64 * 64 / sizes[0] >= 4 > 3 * 64 * 64 / sizes[1]
    assert len(set(found)) == 3
    reward = rewards.parse("compressible:4x")
    expected = torch.cat(
        [rewards.JPEGCompressibility(quality)(image[None], [""]) for image, quality in zip(images, found, strict=True)]
    )
    assert torch.equal(reward(images, [""] * 3), expected) and reward.name == "compressible:4x"
    assert torch.equal(rewards.parse("incompressible:4x")(images, [""] * 3), -expected)


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
