"""Draws several curves with their bands in one chart, as inline SVG in the page's colors. Labels keep clear of each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from chainrule.report.charts import CHARACTER, Scale, axes, svg, tick_labels, ticks, widened
from chainrule.report.words import number

LINE = 15.0  # pixels between labels


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points (x, mean, half-width of the band), by rising x. `color` is the page's, counted from 0."""

    points: Sequence[tuple[float, float, float]]
    name: str = ""
    color: int = 0


def bands(
    curves: Sequence[Curve], *, title: str, width: int = 420, height: int = 210, start: bool = True, across: str = "update"
) -> str:  # fmt: skip
    """Draw curves with their bands. A dashed line is where the first one starts, if `start`; the last values are at the ends.

    "" if no curve has a point.
    """
    shown = [curve for curve in curves if curve.points]
    if not shown:
        return ""
    xs = [x for curve in shown for x, _, _ in curve.points]
    low, high = widened([mean + sign * half for curve in shown for _, mean, half in curve.points for sign in (-1, 1)])
    heights = ticks(low, high, 4)
    left = 14 + CHARACTER * max(len(label) for label in tick_labels(heights))
    ends = [number(curve.points[-1][1]) for curve in shown]
    x = Scale(
        low=min(xs),
        high=max(xs) if max(xs) > min(xs) else min(xs) + 1,
        start=left,
        end=width - 14 - CHARACTER * max(map(len, ends)),
    )
    y = Scale(low=low, high=high, start=height - 30, end=12)
    elements = axes(x, y, heights, width)
    if start:
        at = y(shown[0].points[0][1])
        elements.append(f'<line class="reference" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
    elements += [f'<path class="band c{curve.color}" d="{_band(curve, x, y)}"/>' for curve in shown if _wide(curve)]
    for curve in shown:
        path = "M" + "L".join(f"{x(px):.1f} {y(mean):.1f}" for px, mean, _ in curve.points)
        elements.append(f'<path class="c{curve.color}" d="{path}"/>')
        elements += [
            f'<circle class="c{curve.color}" cx="{x(px):.1f}" cy="{y(mean):.1f}" r="2.5"/>' for px, mean, _ in curve.points
        ]
    places = apart([y(curve.points[-1][1]) + 4 for curve in shown], 12, height - 26)
    for curve, text, place in zip(shown, ends, places, strict=True):
        elements.append(
            f'<text class="value c{curve.color}" x="{x(curve.points[-1][0]) + 8:.1f}" y="{place:.1f}">{escape(text)}</text>'
        )
    said = "; ".join(f"{c.name or title} from {number(c.points[0][1])} to {number(c.points[-1][1])}" for c in shown)
    return svg(elements, width, height, f"{title} by {across}: {said}")


def apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """Labels' heights, moved so that none is nearer than `LINE` to the next: in their order, inside [low, high] if they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found = list(places)
    for before, i in zip([None, *order], order, strict=False):
        found[i] = max(found[i], low if before is None else found[before] + LINE)
    limit = high
    for i in reversed(order):
        found[i] = min(found[i], limit)
        limit = found[i] - LINE
    return found


def _wide(curve: Curve) -> bool:
    return len(curve.points) > 1 and any(half > 0 and math.isfinite(half) for _, _, half in curve.points)


def _band(curve: Curve, x: Scale, y: Scale) -> str:
    above = [f"{x(px):.1f} {y(mean + half):.1f}" for px, mean, half in curve.points]
    below = [f"{x(px):.1f} {y(mean - half):.1f}" for px, mean, half in reversed(curve.points)]
    return f"M{'L'.join([*above, *below])}Z"
