"""Real images in: read, fitted to the model, and inverted to a latent on the chain."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from chainrule.chain import Chain
from chainrule.errors import UserError
from chainrule.plan import Grid, walk
from chainrule.size import Size

LARGEST = 100_000_000  # pixels; a picture above this is refused


def check_image(path: str | Path) -> None:
    """Everything about a picture file that can be told from its head. Raises UserError."""
    place = Path(path)
    if not place.is_file():
        raise UserError(f"no image {str(path)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(place) as image:
                width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {str(path)!r}: {' '.join(str(error).split())}") from error
    if width * height > LARGEST:
        raise UserError(f"the image {str(path)!r} has {width}x{height} pixels; make it smaller than {LARGEST // 10**6} megapixels")
    if min(width, height) < 8:
        raise UserError(f"the image {str(path)!r} has {width}x{height} pixels; 8x8 is the least")


def read_image(source: str | Path | Image.Image, size: Size) -> Tensor:
    """A picture as (3, height, width) in [0, 1], whatever its own size and aspect ratio.

    It is turned as its EXIF says, put on white where it is transparent, cropped around its middle to the aspect ratio of
    `size`, (height, width), and resized. Raises UserError for a file that cannot be read.
    """
    if not isinstance(source, Image.Image):
        check_image(source)
        try:
            with Image.open(source) as opened:
                opened.load()
                source = ImageOps.exif_transpose(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read the image {str(source)!r}: {' '.join(str(error).split())}") from error
    if source.mode.startswith("I"):  # 16 bits, which Pillow would cut at 255
        wide = np.asarray(source, np.float32)
        source = Image.fromarray((wide / (257 if wide.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    image = source.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    fitted = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 255).permute(2, 0, 1).contiguous()


@torch.no_grad()
def invert(chain: Chain, latents: Tensor, grid: Grid) -> Tensor:
    """DDIM inversion (arXiv:2010.02502, section 4.3): finished latents (b, c, h, w) to the first level of `grid`.

    A step up undoes x' = a x + b m for the m the network gives at x' instead of at the x that is sought.
    """
    x = latents
    for jump in reversed(walk(grid)):
        a, b = chain.solver.process.coefficients(jump.start, jump.stop, jump.finish)
        answer = chain.cast[jump.via](x, jump.start, chain.condition)
        chain.on_call()
        x = (x - b * answer) / a
    return x
