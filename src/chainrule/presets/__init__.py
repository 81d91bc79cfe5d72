"""Presets: named sets of options that `chainrule train --preset NAME` starts from, a YAML file each.

    about: one line for the list
    source: the paper's section and what it leaves open; or that it is a starting point
    family: the pipeline it is for
    card: gigabytes of the GPU that its batch is counted to fit in
    options: any of the options of `chainrule train`

The tests run each for an update on random weights of its family. None was run on published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from chainrule.config import read_yaml
from chainrule.errors import unknown

PLACE = Path(str(files("chainrule"))) / "presets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Options of `chainrule train`, which a config file and the command line go before."""

    about: str
    source: str
    family: str
    card: int
    options: Mapping[str, Any]


def names() -> list[str]:
    """The presets that ship, those of the papers first."""
    found = [path.stem for path in PLACE.glob("*.yaml")]
    return sorted(found, key=lambda name: (name.endswith("gb"), name))


def preset(name: str) -> Preset:
    """A preset by name. Raises UserError for an unknown one, with the nearest known."""
    if name not in names():
        raise unknown("preset", name, ["list", *names()])
    return Preset(**read_yaml(PLACE / f"{name}.yaml"))


def listed() -> str:
    """A line for each preset."""
    wide = max(map(len, names()))
    return "\n".join(f"{name.ljust(wide)}  {preset(name).about}" for name in names())
