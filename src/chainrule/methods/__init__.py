"""The published methods: each a small value that draws a plan for a grid of levels.

`method.plan(grid, rng)` is all there must be; a method may also say what it needs and in which stages it is trained (`Method`).
Everything that tells the methods apart is where the gradient may flow, and which adapters answer where.
"""

from __future__ import annotations

from chainrule.methods.method import Method, Needs, needs, stages
from chainrule.methods.plain import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.methods.registry import REGISTRY, as_method, describe, make, read, spelled
from chainrule.methods.shortft import ShortFT

__all__ = [
    "REGISTRY", "SDO", "AlignProp", "DRTune", "DRaFT", "DRaFTLV", "Method", "Needs", "ReFL", "ShortFT",
    "as_method", "describe", "make", "needs", "read", "spelled", "stages",
]  # fmt: skip
