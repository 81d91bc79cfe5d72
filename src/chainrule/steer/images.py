"""Real images in: read, fitted to the model, and inverted to a latent on the chain."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from chainrule.chain import Chain
from chainrule.errors import UserError
from chainrule.plan import Grid, walk
from chainrule.size import Size

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
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


def read_image(source: Picture, size: Size) -> Tensor:
    """A picture as (3, height, width) in [0, 1], whatever its own size and aspect ratio.

    It is turned as its EXIF says, put on white where it is transparent, cropped around its middle to the aspect ratio of
    `size`, (height, width), and resized. An array is (height, width) or (height, width, 1, 3 or 4), of bytes or of floats in
    [0, 1]; a tensor is (3, height, width), as models make them. Raises UserError for a file that cannot be read, and an array of
    another form.
    """
    if isinstance(source, Tensor):
        source = source.detach().float().cpu().movedim(0, -1).numpy()
    if isinstance(source, np.ndarray):
        source = _of_array(source)
    elif not isinstance(source, Image.Image):
        check_image(source)
        try:
            with Image.open(source) as opened:
                opened.load()
                source = ImageOps.exif_transpose(opened)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"cannot read the image {str(source)!r}: {' '.join(str(error).split())}") from error
    else:
        source = ImageOps.exif_transpose(source)
    if source.mode.startswith(("I", "F")):  # which Pillow would cut at 255
        source = _in_bytes(np.asarray(source, np.float32), source.mode)
    image = source.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    fitted = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, np.float32) / 255).permute(2, 0, 1).contiguous()


def _of_array(array: np.ndarray) -> Image.Image:
    kind = "f" if array.dtype.kind == "f" else str(array.dtype)
    gray = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if kind not in ("f", "uint8") or not (gray.ndim == 2 or (gray.ndim == 3 and gray.shape[-1] in (3, 4))) or not gray.size:
        said = f"{array.dtype} of shape {array.shape}"
        raise UserError(f"a picture is an array of {said}, but must be (height, width, 3) of bytes, or of floats in [0, 1]")
    if kind == "f":
        if not (gray.min() >= 0 and gray.max() <= 1):
            raise UserError(f"a picture has values in [{gray.min():g}, {gray.max():g}]; floats must be in [0, 1]")
        gray = (gray * 255).round().astype(np.uint8)
    return Image.fromarray(gray)


def _in_bytes(values: np.ndarray, mode: str) -> Image.Image:
    """A gray picture of 16 or 32 bits: floats end at 1 or at 255, 16 bits at 65535, and 32 bits wherever they seem to."""
    values = np.nan_to_num(values)
    if mode == "F":
        scale = 255.0 if values.max() <= 1 else 1.0
    else:
        scale = 1 / 257 if mode.startswith("I;16") or values.max() > 255 else 1.0
    return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))


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
