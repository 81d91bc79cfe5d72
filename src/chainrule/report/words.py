"""Writes numbers and config values as text for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"


def number(value: float | None) -> str:
    """A number in three to four significant digits, with a true minus sign; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e7 or size < 1e-3:
        text = f"{value:.2e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3}f}"
    return text.replace("-", MINUS)


def measured(mean: float | None, interval: float | None = None, *, signed: bool = False) -> str:
    """A mean and its 95% half-width, "1.20 ± 0.05", to the digits that the interval leaves meaningful."""
    if mean is None or not math.isfinite(mean) or not interval or not math.isfinite(interval):
        text = number(mean)
        return f"+{text}" if signed and mean and mean > 0 else text
    digits = min(max(1 - math.floor(math.log10(abs(interval))), 0), 6)
    text = f"{mean:{'+' if signed else ''},.{digits}f} ± {abs(interval):,.{digits}f}"
    return text.replace("-", MINUS)


def signed(value: float | None) -> str:
    """A number as `number` writes it, with its sign."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def duration(seconds: float) -> str:
    """A duration in seconds as text: "42 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def phrase(value: Any) -> str:
    """A config value as text: {"name": "DRaFTLV", "n": 2} is "DRaFTLV(n=2)"; long lists are cut."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, Mapping):
        rest = {key: item for key, item in value.items() if key != "name"}
        if "name" in value:
            inside = ", ".join(f"{key}={phrase(item)}" for key, item in rest.items())
            return f"{value['name']}({inside})" if inside else str(value["name"])
        return ", ".join(f"{key}: {phrase(item)}" for key, item in rest.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(phrase(item) for item in value[:8])
        return f"{shown}, … ({len(value)} in all)" if len(value) > 8 else shown
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as one level of dotted keys, with values as text."""
    rows: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = phrase(value)
    return rows
