"""What ships with the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# The bundled models: their folder in the package, and one line for `chainrule models`.
BUNDLED = {"tiny-emoji": ("tiny/weights/emoji", "128x128 emoji scenes, ships with the package, runs on a laptop's CPU")}
# Their four-step students, as LoRAs.
STUDENTS = {"tiny-emoji": "tiny/weights/student"}


def folder(name: str) -> Path:
    """The diffusers folder of a bundled model."""
    return Path(str(files("chainrule"))) / BUNDLED[name][0]


def student(name: str) -> Path:
    """The folder of a bundled model's student."""
    return Path(str(files("chainrule"))) / STUDENTS[name]
