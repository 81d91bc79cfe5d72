"""Draws contact sheets: labelled grids of images, and pairs of before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from chainrule.errors import UserError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, FAINT = (255, 255, 255), (28, 30, 33), (122, 126, 132)
SMALLEST, LARGEST = 160, 512  # a cell's longer side, pixels
CAPTION_LINES = 2
MOST_COLUMNS = 6  # pairs side by side before a new band begins


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """Draw a contact sheet on white, row by row, each image with its caption (two lines at most) underneath.

    Every cell has the size of the largest image, brought between 160 and 512 pixels on its longer side: small images
    grow by a whole factor without smoothing. Raises UserError for no images, or a caption too many or too few.
    """
    if not images or columns < 1:
        raise UserError(f"a grid needs images and at least one column, not {len(images)} and {columns}")
    if captions is not None and len(captions) != len(images):
        raise UserError(f"{len(captions)} captions for {len(images)} images; give one each")
    cell = cell_size(images)
    font, gap = _font(cell), _gap(cell)
    corners, size = _corners(len(images), columns, cell, captioned=captions is not None)
    sheet = _sheet(*size)
    for index, (image, (x, y)) in enumerate(zip(images, corners, strict=True)):
        _place(sheet, image, cell, x, y)
        if captions is not None:
            _write(sheet, captions[index], font, cell[0], x, y + cell[1] + gap // 2)
    return sheet


def cells(sheet: Image.Image, like: Sequence[Image.Image], columns: int, *, captioned: bool) -> list[Image.Image]:
    """The images of a contact sheet again, as large as they are on it; `like` are as many images of the same sizes."""
    width, height = cell_size(like)
    corners, _ = _corners(len(like), columns, (width, height), captioned=captioned)
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def _corners(
    count: int, columns: int, cell: tuple[int, int], *, captioned: bool
) -> tuple[list[tuple[int, int]], tuple[int, int]]:  # fmt: skip
    """The upper left corner of every cell of a contact sheet, and the size of the sheet."""
    columns, gap = min(columns, count), _gap(cell)
    below = _line_height(_font(cell)) * CAPTION_LINES + gap // 2 if captioned else 0
    across, down = cell[0] + gap, cell[1] + below + gap
    corners = [(gap + i % columns * across, gap + i // columns * down) for i in range(count)]
    return corners, (columns * across + gap, math.ceil(count / columns) * down + gap)


def before_after(before: Sequence[Image.Image], after: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """Draw pairs of images: a column per prompt, before above after, the prompt underneath; six columns, then a new band.

    Raises UserError unless the three are equally many, and at least one.
    """
    if not before or not len(before) == len(after) == len(prompts):
        counts = f"{len(before)} before, {len(after)} after, {len(prompts)} prompts"
        raise UserError(f"before and after need one image each per prompt, not {counts}")
    bands = math.ceil(len(prompts) / MOST_COLUMNS)
    columns = math.ceil(len(prompts) / bands)
    cell = cell_size([*before, *after])
    font, gap = _font(cell), _gap(cell)
    near = max(gap // 3, 2)  # a pair stands closer together than its neighbours
    side = gap + math.ceil(max(font.getlength(word) for word in ("before", "after")))
    band = 2 * cell[1] + near + gap // 2 + _line_height(font) * CAPTION_LINES + gap
    sheet = _sheet(side + columns * (cell[0] + gap) + gap, bands * band + gap)
    draw = ImageDraw.Draw(sheet)
    for index, (first, second, prompt) in enumerate(zip(before, after, prompts, strict=True)):
        x = side + gap + index % columns * (cell[0] + gap)
        y = gap + index // columns * band
        for word, image, top in (("before", first, y), ("after", second, y + cell[1] + near)):
            if index % columns == 0:
                draw.text((gap, top + cell[1] // 2), word, INK if word == "after" else FAINT, font, anchor="lm")
            _place(sheet, image, cell, x, top)
        _write(sheet, prompt, font, cell[0], x, y + 2 * cell[1] + near + gap // 2)
    return sheet


def cell_size(images: Sequence[Image.Image]) -> tuple[int, int]:
    """(width, height) of a cell that holds each of the images."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    factor = _factor(width, height)
    return max(round(width * factor), 1), max(round(height * factor), 1)


def wrapped(text: str, width: int, font: Font, lines: int = CAPTION_LINES) -> list[str]:
    """Break a text into at most `lines` lines of `width` pixels. The last one ends in an ellipsis if it is cut."""
    words, found = text.split(), [""]
    for index, word in enumerate(words):
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= width or not found[-1]:
            found[-1] = longer
        elif len(found) < lines:
            found.append(word)
        else:
            found[-1] = " ".join([found[-1], *words[index:]])
            break
    return [_cut(entry, width, font) for entry in found]


def _factor(width: int, height: int) -> float:
    """How much images of this size grow or shrink on a sheet."""
    longer = max(width, height)
    return float(math.ceil(SMALLEST / longer)) if longer < SMALLEST else min(1.0, LARGEST / longer)


def _place(sheet: Image.Image, image: Image.Image, cell: tuple[int, int], x: int, y: int) -> None:
    """Paste the image in the middle of its cell; it keeps its shape, and transparency shows the paper."""
    factor = min(cell[0] / image.width, cell[1] / image.height)
    if factor > 1:
        factor = math.floor(factor)
    size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
    kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    drawn = image.convert("RGBA").resize(size, kind)
    sheet.paste(drawn, (x + (cell[0] - size[0]) // 2, y + (cell[1] - size[1]) // 2), drawn)


def _write(sheet: Image.Image, text: str, font: Font, width: int, x: int, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    for index, entry in enumerate(wrapped(text, width, font)):
        draw.text((x, y + index * _line_height(font)), entry, FAINT, font)


def _cut(text: str, width: int, font: Font) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def _font(cell: tuple[int, int]) -> Font:
    return font_of(min(max(round(max(cell) / 14), 12), 24))


def font_of(size: int) -> Font:
    """The font that comes with Pillow, in a size in pixels."""
    return ImageFont.load_default(size)


def _line_height(font: Font) -> int:
    box = font.getbbox("Ágj")
    return math.ceil((box[3] - box[1]) * 1.25)


def _gap(cell: tuple[int, int]) -> int:
    return max(round(max(cell) / 14), 8)
