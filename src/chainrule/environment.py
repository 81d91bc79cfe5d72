"""The environment a run is made in."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from typing import Any

PACKAGES = ("chainrule", "torch", "diffusers", "transformers", "peft", "accelerate")


def environment() -> dict[str, Any]:
    """Python, platform, date and the versions of the packages that matter (null: not installed), none imported."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {"date": date, "python": platform.python_version(), "platform": platform.platform(), **versions}
