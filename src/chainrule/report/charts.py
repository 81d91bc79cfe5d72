"""Draws charts as inline SVG in the page's colors: a curve over steps, and means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from chainrule.report.words import measured, number

MOST_POINTS = 800  # a longer raw line is thinned: the chart has no more pixels
MOST_ENLARGED = 1.25  # how much larger than drawn a chart is shown, so that its letters stay letters
CHARACTER = 6.6  # width of a digit at the charts' font size


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) inside [low, high]; only integers if `whole`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def smooth(values: Sequence[float]) -> list[float]:
    """A centered Gaussian mean over about a fifteenth of the line, so that it does not lag behind the raw one."""
    width = max(len(values) / 30, 1.0)
    reach = min(math.ceil(3 * width), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    # full minus its ends, not mode="same": that would return the kernel's length where it is the longer one
    inside = slice(reach, reach + len(values))
    total = np.convolve(values, kernel)[inside]
    weight = np.convolve(np.ones(len(values)), kernel)[inside]
    return [float(value) for value in total / weight]


def line(
    points: Sequence[tuple[float, float | None]],
    *,
    title: str,
    width: int = 720,
    height: int = 260,
    reference: float | None = None,
    reference_label: str = "",
    smoothed: bool = True,
) -> str:
    """Draw a curve over steps: the raw line is light, its running mean is on top, and the mean's last value is at the end.

    Without `smoothed` there is the line alone.
    Values that are missing or not finite are skipped; "" if none is left. `reference` is the height of a dashed horizontal line.
    """
    kept = [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(y)]
    if not kept:
        return ""
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    mean = smooth(ys) if smoothed and len(ys) >= 12 else ys
    low, high = widened([*ys, *([reference] if reference is not None else [])])
    heights = ticks(low, high, 4 if height > 200 else 3)
    left = 14 + CHARACTER * max(len(label) for label in tick_labels(heights))
    end = number(mean[-1])
    right = width - 12 - CHARACTER * len(end)
    across = Scale(low=min(xs), high=max(xs) if max(xs) > min(xs) else min(xs) + 1, start=left, end=right)
    up = Scale(low=low, high=high, start=height - 30, end=10)
    elements = axes(across, up, heights, width)
    if reference is not None:
        y, label = up(reference), escape(reference_label)
        elements.append(f'<line class="reference" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(f'<text class="tick" x="{right:.1f}" y="{y - 5:.1f}" text-anchor="end">{label}</text>')
    if mean is not ys:
        elements.append(f'<path class="raw" d="{_path(xs, ys, across, up)}"/>')
    elements.append(f'<path class="mean" d="{_path(xs, mean, across, up)}"/>')
    x, y = across(xs[-1]), up(mean[-1])
    elements.append(f'<circle class="end" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    elements.append(f'<text class="value" x="{x + 8:.1f}" y="{y + 4:.1f}">{end}</text>')
    return svg(elements, width, height, f"{title}: {number(mean[0])} to {end} over steps {xs[0]:g} to {xs[-1]:g}")


def intervals(
    rows: Sequence[tuple[str, Mapping[str, tuple[float, float]]]],
    gains: Mapping[str, tuple[float, float]] | None = None,
    *,
    width: int = 720,
) -> str:
    """Draw means as dots and their 95% intervals as bars: one panel per metric, each on its own scale.

    `rows` are (name, {metric: (mean, half-width)}), the last one in the accent color. "" if there is no metric.
    """
    metrics = list(dict.fromkeys(metric for _, values in rows for metric in values))
    if not metrics:
        return ""
    left = 16 + CHARACTER * max(len(name) for name, _ in rows)
    elements: list[str] = []
    top = 0.0
    for metric in metrics:
        shown = [(name, *values[metric]) for name, values in rows if metric in values]
        low, high = widened([mean + sign * half for _, mean, half in shown for sign in (-1, 1)])
        across = Scale(low=low, high=high, start=left, end=width - 130)
        elements.append(f'<text class="name" x="0" y="{top + 18:.1f}">{escape(metric)}</text>')
        gain = (gains or {}).get(metric)
        if gain:
            text = f"change {measured(*gain, signed=True)}"
            elements.append(f'<text class="value" x="{width}" y="{top + 18:.1f}" text-anchor="end">{text}</text>')
        for index, (name, mean, half) in enumerate(shown):
            style = "after" if name == rows[-1][0] and len(rows) > 1 else "before"
            elements += _bar(name, mean, half, across, top + 44 + 26 * index, width, style)
        top += 44 + 26 * len(shown) + 14
    return svg(elements, width, top - 14, "; ".join(_spoken(metric, rows) for metric in metrics))


def _bar(name: str, mean: float, half: float, across: Scale, y: float, width: int, style: str) -> list[str]:
    track = f'<line class="track" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    ends = across(mean - half), across(mean + half)
    return [
        track,
        f'<text class="tick" x="0" y="{y + 4:.1f}">{escape(name)}</text>',
        f'<line class="bar {style}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<circle class="dot {style}" cx="{across(mean):.1f}" cy="{y:.1f}" r="5"/>',
        f'<text class="tick" x="{width}" y="{y + 4:.1f}" text-anchor="end">{measured(mean, half)}</text>',
    ]


def axes(across: Scale, up: Scale, heights: Sequence[float], width: int) -> list[str]:
    """Horizontal lines with their labels at the left, and whole numbers below."""
    elements = []
    for value, label in zip(heights, tick_labels(heights), strict=True):
        y = up(value)
        elements.append(f'<line class="grid" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(f'<text class="tick" x="{across.start - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value in ticks(across.low, across.high, 6 if width > 500 else 4, whole=True):
        y = up.start + 19
        elements.append(f'<text class="tick" x="{across(value):.1f}" y="{y:.1f}" text-anchor="middle">{value:g}</text>')
    return elements


def tick_labels(values: Sequence[float]) -> list[str]:
    """All ticks of one axis with the same number of decimals."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    if step < 1e-4 or max(abs(value) for value in values) >= 1e6:
        return ["0" if value == 0 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for value in values]


def widened(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, a little widened; never empty."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    return low - (0 if low == 0 and high > 0 else air), high + air


def _path(xs: Sequence[float], ys: Sequence[float], across: Scale, up: Scale) -> str:
    stride = math.ceil(len(xs) / MOST_POINTS)
    kept = sorted({*range(0, len(xs), stride), len(xs) - 1})
    return "M" + "L".join(f"{across(xs[index]):.1f} {up(ys[index]):.1f}" for index in kept)


def _spoken(metric: str, rows: Sequence[tuple[str, Mapping[str, tuple[float, float]]]]) -> str:
    return f"{metric}: " + ", ".join(f"{name} {measured(*values[metric])}" for name, values in rows if metric in values)


def svg(elements: Sequence[str], width: float, height: float, label: str) -> str:
    """The drawing, with its description for who cannot see it."""
    frame = f'viewBox="0 0 {width:g} {height:g}" style="max-width: {width * MOST_ENLARGED:.0f}px"'
    head = f'<svg {frame} role="img" aria-label="{escape(label, quote=True)}">'
    return "\n".join([head, *elements, "</svg>"])
