"""The published methods: each a small value that draws a plan for a grid of levels.

`method.plan(grid, rng)` is all there is. Everything that tells the methods apart is where the gradient may flow, and
which adapters answer where.
"""

from __future__ import annotations

from chainrule.methods.method import Method
from chainrule.methods.plain import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.methods.registry import REGISTRY, describe, make, spelled
from chainrule.methods.shortft import ShortFT


def stages(method: Method) -> tuple[Method, ...]:
    """What is trained in turn: the stages of a method that has them, or the method itself."""
    own = getattr(method, "stages", None)
    return own() if own else (method,)


__all__ = [
    "REGISTRY", "SDO", "AlignProp", "DRTune", "DRaFT", "DRaFTLV", "Method", "ReFL", "ShortFT",
    "describe", "make", "spelled", "stages",
]  # fmt: skip
