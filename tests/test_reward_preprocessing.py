"""The rewards' preprocessing against Pillow and transformers' processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from reward_models import pictures, pil, random_images

from chainrule.errors import UserError
from chainrule.rewards.classifier import preprocessing_of
from chainrule.rewards.clip import normalize, resize, resize_and_crop, resize_and_pad, resize_shortest
from chainrule.rewards.detect import pad_and_shrink
from chainrule.rewards.imagereward import crop
from chainrule.rewards.siglip import HALF

SIZES = [(224, 224), (512, 512), (300, 225), (225, 300), (64, 64), (224, 333), (100, 31)]


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 225), (225, 300), (64, 64), (256, 771), (224, 333)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_preprocessing_equals_the_official_processor(size: tuple[int, int], noise: float) -> None:
    images = random_images(*size, noise=noise)
    official = pil("CLIPImageProcessor")()(images=pictures(images), return_tensors="pt")["pixel_values"]
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
    assert resize_and_pad(torch.rand(1, 3, 2, 900), 224).shape == images.shape
    assert resize_and_crop(images, 100).dtype == torch.float64
    assert resize_and_crop(images.half(), 100).dtype == torch.float32


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_squashing_equals_the_processors_of_siglip_owlvit_and_vit(
    size: tuple[int, int], noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:

    resized = Image.Image.resize

    def width_first(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        """As Pillow did everywhere before 13, which takes the height first where that shrinks much more."""
        return resized(resized(self, (size[0], self.height), *args, **kwargs), size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", width_first)
    images = random_images(*size, noise=noise)
    square = {"size": {"height": 224, "width": 224}}
    vit = preprocessing_of({"image_processor_type": "ViTImageProcessor", **square, "image_mean": HALF, "image_std": HALF})
    pairs = {
        pil("SiglipImageProcessor"): normalize(resize(images, (224, 224)), HALF, HALF),
        pil("OwlViTImageProcessor"): normalize(resize(images, (224, 224))),
        pil("ViTImageProcessor"): vit(images),
    }
    for processor, ours in pairs.items():
        official = processor(**square)(images=pictures(images), return_tensors="pt")["pixel_values"]
        assert ours.shape == official.shape
        halves = processor is pil("ViTImageProcessor") and size == (
            64,
            64,
        )  # linear weights here give exact halves, rounded either way
        assert (ours - official).abs().mean() < (1e-3 if halves else 5e-4)


def test_the_order_of_pillows_passes_is_less_than_a_level_on_average() -> None:
    images = random_images(300, 225)
    official = np.array(pictures(images)[0].resize((224, 224), Image.Resampling.BICUBIC))
    ours = (resize(images, (224, 224))[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(ours - official).mean() < 0.7


@pytest.mark.parametrize("size", [(96, 96), (64, 64), (40, 64), (150, 97), (97, 150), (20, 33)])
def test_owlv2_is_padded_and_blurred_as_by_its_processor(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pad = pil("Owlv2ImageProcessor").pad
    if size[0] != size[1] and int(transformers.__version__.split(".")[0]) > 4:  # pads with black, the model's authors with gray
        monkeypatch.setattr(pil("Owlv2ImageProcessor"), "pad", lambda self, image: pad(self, image, constant_value=0.5))
    images = random_images(*size, noise=0.3)
    official = pil("Owlv2ImageProcessor")(size={"height": 64, "width": 64})(images=pictures(images), return_tensors="pt")
    assert (normalize(pad_and_shrink(images, 64)) - official["pixel_values"]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(224, 224), (512, 512), (300, 225), (225, 300), (227, 224), (64, 91), (224, 333)])
def test_imagereward_sees_what_its_own_preprocessing_shows(size: tuple[int, int]) -> None:
    """Pillow's resize to the shortest side, then a center crop whose margins are rounded as torchvision rounds them."""
    images = random_images(*size)
    scale = 224 / min(size)
    height, width = (224 if side == min(size) else int(224 * max(size) / min(size)) for side in size)
    assert scale * max(size) == pytest.approx(max(height, width), abs=1)
    whole = pictures(images)[0].resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 224) / 2.0), round((width - 224) / 2.0)
    official = np.array(whole.crop((left, top, left + 224, top + 224)), np.float32) / 255
    ours = crop(resize_shortest(images, 224), 224)
    assert (ours - torch.tensor(official).permute(2, 0, 1)).abs().mean() < 1e-4


def test_a_classifier_is_shown_what_its_settings_say() -> None:
    vit, convnext = {"image_processor_type": "ViTFeatureExtractor"}, {"feature_extractor_type": "ConvNextFeatureExtractor"}
    cases: list[tuple[dict[str, Any], tuple[int, int], int | None, str]] = [
        ({}, (224, 224), 224, "bicubic"),
        ({**vit, "size": 224}, (224, 224), None, "bilinear"),
        ({**vit, "size": {"height": 200, "width": 100}, "resample": 3}, (200, 100), None, "bicubic"),
        ({**convnext, "size": 224, "crop_pct": 0.875, "resample": 3}, (224, 224), 256, "bicubic"),
        ({**convnext, "size": {"shortest_edge": 224}}, (224, 224), 256, "bicubic"),
        ({**convnext, "size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), None, "bicubic"),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "resample": 2},
         (224, 224), 256, "bilinear"),
    ]  # fmt: skip
    for facts, size, whole, mode in cases:
        look = preprocessing_of(facts)
        assert (look.size, look.whole, look.mode) == (size, whole, mode)
        assert look(torch.rand(1, 3, 300, 260)).shape[-2:] == size
    with pytest.raises(UserError, match=r"resample is 5 .* must be 2"):
        preprocessing_of({"resample": 5})
