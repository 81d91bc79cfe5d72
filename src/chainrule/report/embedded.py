"""Puts pictures of a run's folder into the page."""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path

from PIL import Image

PICTURE_BYTES = 1_500_000  # a larger picture file is shrunk before it is put into the page
PICTURE_SIDE, THUMBNAIL_SIDE = 1800, 520
MOST_FRAMES = 12  # of the filmstrip


def figure(path: Path, caption: str, side: int = PICTURE_SIDE) -> str:
    """A picture with what stands below it; "" if the file is missing or is no picture."""
    source = _embedded(path, side)
    if not source:
        return ""
    text = escape(caption, quote=True)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def strip(folder: Path) -> str:
    """The grids of the updates in a row, at most `MOST_FRAMES` of them, with the first and the last."""
    frames = []
    for path in folder.glob("step-*.png"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            frames.append((int(match[1]), path))
    shown = [figure(path, f"After {step} updates", THUMBNAIL_SIDE) for step, path in _spread(sorted(frames), MOST_FRAMES)]
    return f'<div class="strip">{"".join(shown)}</div>' if any(shown) else ""


def _embedded(path: Path, side: int) -> str:
    try:
        with Image.open(path) as image:
            image.load()
            small = max(image.size) <= side and path.stat().st_size <= PICTURE_BYTES
            if small and image.format in ("PNG", "JPEG", "WEBP"):
                kind, data = image.format.lower(), path.read_bytes()
            else:
                kind, data = "jpeg", _shrunk(image, side)
    except (OSError, ValueError, SyntaxError):
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _shrunk(image: Image.Image, side: int) -> bytes:
    layers = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(layers, mask=layers.getchannel("A"))
    paper.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    paper.save(file, "JPEG", quality=90)
    return file.getvalue()


def _spread(items: list[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
