"""The published methods: each a small value that draws a plan for a grid of levels.

`method.plan(grid, rng)` is all there must be; a method may also say what it needs and in which stages it is trained (`Method`).
Everything that tells the methods apart is where the gradient may flow, and which adapters answer where.
"""

from __future__ import annotations

from chainrule.methods.method import Critic, Estimator, LikelihoodRatio, Method, Needs, Pathwise, needs, stages
from chainrule.methods.plain import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.methods.policy import DDPO, DPG, GRPO
from chainrule.methods.registry import REGISTRY, as_method, describe, make, read, spelled
from chainrule.methods.shortft import ShortFT
from chainrule.methods.surrogates import FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign

__all__ = [
    "DDPO", "DPG", "GRPO", "REGISTRY", "SDO", "AlignProp", "Critic", "DRTune", "DRaFT", "DRaFTLV", "Estimator", "FlowBPBridge",
    "FlowBPLagrange", "FlowBPSparse", "LeapAlign", "LikelihoodRatio", "Method", "Needs", "Pathwise", "ReFL", "ShortFT", "as_method",
    "describe", "make", "needs", "read", "spelled", "stages",
]  # fmt: skip
