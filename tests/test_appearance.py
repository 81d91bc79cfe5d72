"""What images look like, against scipy, Pillow and colorsys, and where the answer is known."""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from chainrule.appearance import EDGE, STATISTICS, apart, brightness, colors, edges, luminance, saturation, sharpness
from chainrule.evaluate import diversity

IMAGES = torch.rand(3, 3, 40, 24, generator=torch.Generator().manual_seed(0))
IMAGES[1] = torch.linspace(0.1, 0.9, 24)  # a gray ramp
IMAGES[2, :, :, :12] *= 0.2


def gray(image: torch.Tensor) -> np.ndarray:
    return np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), 1)


def test_brightness_is_pillows() -> None:
    for image in IMAGES:
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        assert float(brightness(image[None])) == pytest.approx(
            np.asarray(Image.fromarray(pixels).convert("L")).mean() / 255, abs=4e-3
        )


def test_edges_and_sharpness_are_scipys() -> None:
    for image in IMAGES:
        y = gray(image)
        steps = np.hypot(ndimage.sobel(y, 0), ndimage.sobel(y, 1))[1:-1, 1:-1] / 8
        assert float(edges(image[None])) == pytest.approx((steps >= EDGE).mean(), abs=2e-3)
        assert float(sharpness(image[None])) == pytest.approx(ndimage.laplace(y)[1:-1, 1:-1].std(), rel=1e-4, abs=1e-6)
    assert float(luminance(IMAGES)[1, 0, 0, 0]) == pytest.approx(0.1)


def test_saturation_is_colorsys() -> None:
    for image in IMAGES:
        own = [colorsys.rgb_to_hsv(*pixel)[1] for pixel in image.flatten(1).T.tolist()]
        assert float(saturation(image[None])) == pytest.approx(np.mean(own), abs=1e-5)


def test_colors_are_the_entropy_of_numpys_histogram() -> None:
    for image in IMAGES:
        counts, _ = np.histogramdd(image.flatten(1).T.numpy(), bins=8, range=[(0, 1)] * 3)
        assert float(colors(image[None])) == pytest.approx(stats.entropy(counts.flatten(), base=2), abs=1e-3)
    half = torch.zeros(1, 3, 8, 8)
    half[:, :, :4] = 1
    assert float(colors(half)) == pytest.approx(1.0) and float(colors(half * 0)) == 0


def test_the_distances_of_images_are_the_diversity_that_evaluate_prints() -> None:
    cells = lambda side: [slice(i * side // 16, -(-(i + 1) * side // 16)) for i in range(16)]
    small = np.array([[float(c[y, x].mean()) for c in image for y in cells(40) for x in cells(24)] for image in IMAGES])
    pairs = [float(np.sqrt(np.square(a - b).mean())) for a, b in itertools.combinations(small, 2)]
    assert float(apart(IMAGES).mean()) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert float(apart(IMAGES).mean()) == diversity(IMAGES)
    assert float(apart(IMAGES[:1].repeat(3, 1, 1, 1)).abs().max()) == 0
    assert math.isnan(float(apart(IMAGES[:1])))


def test_every_statistic_is_one_number_for_each_image_and_none_of_its_neighbours_but_one() -> None:
    for name, measure in STATISTICS.items():
        together = measure(IMAGES)
        assert together.shape == (3,) and bool(together.isfinite().all())
        if name != "diversity":
            torch.testing.assert_close(together[:1], measure(IMAGES[:1]))
