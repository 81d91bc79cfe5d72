"""What ships with the package, by name."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

# The bundled models: their folder in the package, and one line for `chainrule models`.
BUNDLED = {
    "tiny-emoji": ("tiny/weights/emoji", "128x128 emoji scenes, ships with the package, runs on a laptop's CPU"),
    "tiny-faces": ("tiny/weights/faces", "64x64 emoji faces and animals by class, in pixel space, ships with the package"),
}
# Their four-step students, as LoRAs.
STUDENTS = {"tiny-emoji": "tiny/weights/student"}


def folder(name: str) -> Path:
    """The diffusers folder of a bundled model."""
    return Path(str(files("chainrule"))) / BUNDLED[name][0]


def best_steps(name: str) -> int:
    """Network calls a model is at its best with, known without loading it; 50 for one that is not bundled."""
    settings = folder(name) / "chainrule.json" if name in BUNDLED else None
    return int(json.loads(settings.read_text())["steps"]) if settings and settings.is_file() else 50


def student(name: str) -> Path:
    """The folder of a bundled model's student."""
    return Path(str(files("chainrule"))) / STUDENTS[name]
