"""Image tensors as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Finished:
    """Finished images: their places among those that were asked for, their seeds, and (b, 3, h, w) in [0, 1] on the CPU."""

    at: range
    seeds: Sequence[int]
    images: Tensor

    @property
    def pictures(self) -> list[Image.Image]:
        """The images as PIL has them."""
        return pictures(self.images)


def pictures(images: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) in [0, 1] to PIL images, rounded as diffusers rounds; NaN is black."""
    arrays = (images.clamp(0, 1).nan_to_num(0).permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(array) for array in arrays]
