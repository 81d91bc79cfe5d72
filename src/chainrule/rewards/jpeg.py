"""A differentiable JPEG codec: baseline, 4:2:0, integer tables, every stage rounded where libjpeg rounds it.

Rounding is straight-through: the forward value is the rounded one, the derivative is that of no rounding at all. DRaFT
(arXiv:2309.17400, Appendix B.3) uses a differentiable codec for compressibility; polynomial rounding (arXiv:2309.06978)
is another choice, whose values agree less with real decoders.
"""

from __future__ import annotations

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from chainrule.errors import UserError
from chainrule.pictures import pictures

# ITU-T T.81, Annex K.1: quantization steps at quality 50, in row-major (not zigzag) order.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Compress and decompress images (b, 3, h, w) in [0, 1], of any size, at a quality from 1 (worst) to 100.

    Returns images of the same shape. Raises UserError for another quality.
    """
    if not 1 <= quality <= 100:
        raise UserError(f"JPEG quality must be from 1 to 100, got {quality!r}")
    height, width = images.shape[-2:]
    x = images if images.dtype == torch.float64 else images.float()
    x = F.pad(_round(x * 255), (0, -width % 16, 0, -height % 16), mode="replicate")
    luma, *chroma = _to_ycc(x)
    steps, coarse = _table(_LUMA, quality, x), _table(_CHROMA, quality, x)
    luma = _code(luma, steps)
    halved = [_code(_round(F.avg_pool2d(plane, 2)), coarse) for plane in chroma]
    doubled = [_round(F.interpolate(plane, scale_factor=2.0, mode="bilinear")) for plane in halved]
    decoded = _clip(_round(_to_rgb(luma, *doubled)))
    return (decoded[..., :height, :width] / 255).to(images.dtype)


def quality_of(images: Tensor, ratio: float) -> list[int]:
    """For each image, the highest quality at which its bytes, 3 a pixel, are at least `ratio` times those of Pillow's JPEG file.

    1 where no quality reaches it. A file has some 600 bytes beside the picture, which count in small ones.
    """
    return [_highest(picture, ratio) for picture in pictures(images.detach())]


def _highest(picture: Image.Image, ratio: float) -> int:
    low, high = 1, 100
    while low < high:
        middle, file = (low + high + 1) // 2, io.BytesIO()
        picture.save(file, "JPEG", quality=middle, subsampling="4:2:0")
        if 3 * picture.width * picture.height >= ratio * file.tell():
            low = middle
        else:
            high = middle - 1
    return low


def _table(base: tuple[tuple[int, ...], ...], quality: int, like: Tensor) -> Tensor:
    """libjpeg's scaling of the quality-50 steps, (8, 8), whole numbers from 1 to 255."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.tensor([[min(255, max(1, (s * scale + 50) // 100)) for s in row] for row in base]).to(like)


def _code(plane: Tensor, steps: Tensor) -> Tensor:
    """One (b, 1, h, w) plane through 8x8 DCT, quantization and back."""
    batch, _, height, width = plane.shape
    dct = _dct(plane)
    blocks = (plane - 128).reshape(batch, height // 8, 8, width // 8, 8).transpose(2, 3)
    quantized = _round(dct @ blocks @ dct.T / steps)
    blocks = dct.T @ (quantized * steps) @ dct
    return _clip(_round(blocks.transpose(2, 3).reshape(plane.shape) + 128))


def _dct(like: Tensor) -> Tensor:
    """The orthonormal 8-point DCT-II: row k is sqrt(c_k / 8) cos((2n + 1) k pi / 16), with c_0 = 1 and c_k = 2."""
    k = torch.arange(8, dtype=torch.float64)
    rows = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    rows[0] /= math.sqrt(2)
    return rows.to(like)


def _to_ycc(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """JFIF, in 0..255."""
    r, g, b = rgb[:, 0:1], rgb[:, 1:2], rgb[:, 2:3]
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return _round(y), _round((b - y) / 1.772 + 128), _round((r - y) / 1.402 + 128)


def _to_rgb(y: Tensor, blue: Tensor, red: Tensor) -> Tensor:
    blue, red = blue - 128, red - 128
    r, b = y + 1.402 * red, y + 1.772 * blue
    return torch.cat([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], dim=1)


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _clip(x: Tensor) -> Tensor:
    return x + (x.clamp(0, 255) - x).detach()
