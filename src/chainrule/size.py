"""The size of an image: height and width in pixels, always two numbers, in this order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from chainrule.errors import UserError

Size: TypeAlias = tuple[int, int]
SMALLEST = 8  # pixels a side


def size_of(value: int | str | Sequence[int]) -> Size:
    """(height, width) of 512 or "512", a square; of "768x1024", HEIGHTxWIDTH; and of (768, 1024).

    Raises UserError for anything else, and for a side below 8 pixels.
    """
    sides: Sequence[object] = ()
    if isinstance(value, str):
        sides = [int(side) for side in value.split("x")] if re.fullmatch(r"\d{1,6}(x\d{1,6})?", value) else ()
    elif isinstance(value, int):
        sides = (value,)
    elif isinstance(value, Sequence) and len(value) == 2:
        sides = value
    height, width = (sides[0], sides[-1]) if sides else (None, None)
    if not (isinstance(height, int) and isinstance(width, int)) or isinstance(height, bool) or min(height, width) < SMALLEST:
        raise UserError(f"size is {value!r}, but must be pixels a side, at least {SMALLEST}, or HEIGHTxWIDTH as 768x1024")
    return height, width


def config_size(size: Size) -> int | str:
    """A size as configurations write it: 512 for a square, otherwise "768x1024". `size_of` reads it back."""
    height, width = size
    return height if height == width else f"{height}x{width}"
