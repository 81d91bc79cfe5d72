"""What a model does when it is not told otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from chainrule.size import Size


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling settings a model is at its best with."""

    steps: int = 50
    guidance: float = 7.5
    labels: tuple[str, ...] = ()  # names of the classes of a class-conditional model
    size: Size | None = None  # height and width of its images in pixels; None: the pipeline's own
