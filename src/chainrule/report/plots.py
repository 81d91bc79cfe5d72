"""Draws a plot of a few curves with axes, for the folders that analyses write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from chainrule.report.charts import Scale, ticks
from chainrule.report.pictures import FAINT, INK, PAPER, font_of
from chainrule.report.words import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 560, 110, 40, 70, 80
Box = tuple[float, float, float, float]  # left, top, right, bottom
COLORS = ((27, 94, 160), (200, 80, 40), (60, 140, 70), (130, 70, 150), (110, 110, 110))


def scatter(points: Mapping[str, tuple[float, float]], title: str, across: str, up: str) -> Image.Image:
    """Draw named points (x, y). A name stands to the right of its point, a little lower or higher where others are."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(17)
    sides = []
    for axis, (start, end) in enumerate(((LEFT, WIDTH - RIGHT - 120), (HEIGHT - BOTTOM, TOP))):
        values = [point[axis] for point in points.values() if math.isfinite(point[axis])] or [0.0]
        room = (max(values) - min(values)) * 0.08 or 1.0
        sides.append(Scale(low=min(values) - room, high=max(values) + room, start=start, end=end))
    right, high = sides
    draw.text((LEFT, 22), f"{title}: {up} against {across}", INK, font_of(22))
    for y in ticks(high.low, high.high):
        draw.line([(LEFT, high(y)), (WIDTH - RIGHT, high(y))], (228, 228, 228))
        draw.text((LEFT - 12, high(y)), _plain(y), FAINT, font, anchor="rm")
    for x in ticks(right.low, right.high, 6):
        draw.text((right(x), HEIGHT - BOTTOM + 10), _plain(x), FAINT, font, anchor="ma")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 32), across, INK, font, anchor="mm")
    places = [(right(x), high(y)) for x, y in points.values()]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for i, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        at, color = (right(x), high(y)), COLORS[i % len(COLORS)]
        draw.ellipse([at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5], color)
        box = _free(draw.textbbox((at[0] + 12, at[1]), name, font, anchor="lm"), taken)
        taken.append(box)
        draw.text((box[0], (box[1] + box[3]) / 2), name, color, font, anchor="lm")
    return sheet


def _plain(value: float) -> str:
    """A number with a hyphen for its sign: Pillow's font has no minus."""
    return number(value).replace("\N{MINUS SIGN}", "-")


def _free(box: Box, taken: Sequence[Box]) -> Box:
    """The nearest place below or above for a label that lies on no other."""
    left, top, right, bottom = box
    for offset in sorted(range(-HEIGHT, HEIGHT, 4), key=abs):
        moved = (left, top + offset, right, bottom + offset)
        if not any(moved[0] < o[2] and o[0] < moved[2] and moved[1] < o[3] and o[1] < moved[3] for o in taken):
            return moved
    return box


def plot(curves: Mapping[str, Sequence[tuple[float, float]]], title: str, across: str, *, log: bool = False) -> Image.Image:
    """Draw named curves of points (x, y) with a legend. With `log` the y axis is logarithmic, and values up to 0 are left out."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1]) and (point[1] > 0 or not log)]
    level = (lambda y: math.log10(y)) if log else (lambda y: y)
    xs, ys = [x for x, _ in points] or [0.0], [level(y) for _, y in points] or [0.0]
    room = (max(ys) - min(ys)) * 0.06 or 1.0
    right = Scale(low=min(xs), high=max(max(xs), min(xs) + 1), start=LEFT, end=WIDTH - RIGHT)
    up = Scale(low=min(ys) - room, high=max(ys) + room, start=HEIGHT - BOTTOM, end=TOP)
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw, font = ImageDraw.Draw(sheet), font_of(18)
    draw.text((LEFT, 22), title, INK, font_of(22))
    for y in ticks(up.low, up.high, whole=log and up.high - up.low > 2):
        draw.line([(LEFT, up(y)), (WIDTH - RIGHT, up(y))], (228, 228, 228))
        draw.text((LEFT - 12, up(y)), _plain(10**y if log else y), FAINT, font, anchor="rm")
    for x in ticks(right.low, right.high, 6, whole=True):
        draw.text((right(x), HEIGHT - BOTTOM + 10), f"{x:g}", FAINT, font, anchor="ma")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 32), across, INK, font, anchor="mm")
    for i, (name, curve) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        line = [(right(x), up(level(y))) for x, y in curve if math.isfinite(y) and (y > 0 or not log)]
        if len(line) > 1:
            draw.line(line, color, 3, joint="curve")
        for x, y in line:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], color)
        draw.text((WIDTH - RIGHT - 10, TOP + 14 + 26 * i), name, color, font, anchor="rm")
    return sheet
