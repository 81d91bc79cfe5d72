"""Rewards: differentiable scores of images. `(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`, higher is better.

    10 * PickScore() + 2 * HPSv2() + 0.05 * Aesthetic()

The names below are imported on first use, so that listing the rewards loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from chainrule.rewards.registry import REGISTRY, Entry, parse

if TYPE_CHECKING:
    from chainrule.rewards.base import FunctionReward, Reward, RewardFunction, Sum, checked, probe, reward_of
    from chainrule.rewards.classifier import Classifier
    from chainrule.rewards.clip import load_clip
    from chainrule.rewards.detect import DetectedArea, Detection
    from chainrule.rewards.diversity import Diversity, Dropout
    from chainrule.rewards.external import FileSize, Program
    from chainrule.rewards.given import AnyReward, as_reward, as_rewards
    from chainrule.rewards.hpsv3 import HPSv3
    from chainrule.rewards.imagereward import ImageReward
    from chainrule.rewards.likeness import LPIPS, Identity
    from chainrule.rewards.loaded import release
    from chainrule.rewards.place import On
    from chainrule.rewards.reference import Directional, Perceptual, Style, perceptual
    from chainrule.rewards.safety import Concepts, Safe
    from chainrule.rewards.scorers import Aesthetic, CLIPScore, HPSv2, HPSv21, PickScore, aesthetic_head
    from chainrule.rewards.shaped import Hinge, Nearby, Steepness, Target
    from chainrule.rewards.siglip import SigLIP
    from chainrule.rewards.weightless import (
        JPEGCompressibility,
        JPEGIncompressibility,
        RotationalAnticorrelation,
        Symmetry,
    )

__all__ = [
    "LPIPS",
    "REGISTRY",
    "Aesthetic",
    "AnyReward",
    "CLIPScore",
    "Classifier",
    "Concepts",
    "DetectedArea",
    "Detection",
    "Directional",
    "Diversity",
    "Dropout",
    "Entry",
    "FileSize",
    "FunctionReward",
    "HPSv2",
    "HPSv3",
    "HPSv21",
    "Hinge",
    "Identity",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Nearby",
    "On",
    "Perceptual",
    "PickScore",
    "Program",
    "Reward",
    "RewardFunction",
    "RotationalAnticorrelation",
    "Safe",
    "SigLIP",
    "Steepness",
    "Style",
    "Sum",
    "Symmetry",
    "Target",
    "aesthetic_head",
    "as_reward",
    "as_rewards",
    "checked",
    "load_clip",
    "parse",
    "perceptual",
    "probe",
    "release",
    "reward_of",
]

_ROOMS = {
    "base": ("FunctionReward", "Reward", "RewardFunction", "Sum", "checked", "probe", "reward_of"),
    "classifier": ("Classifier",),
    "reference": ("Directional", "Perceptual", "Style", "perceptual"),
    "clip": ("load_clip",),
    "scorers": ("Aesthetic", "CLIPScore", "HPSv2", "HPSv21", "PickScore", "aesthetic_head"),
    "given": ("AnyReward", "as_reward", "as_rewards"),
    "detect": ("DetectedArea", "Detection"),
    "diversity": ("Diversity", "Dropout"),
    "external": ("FileSize", "Program"),
    "hpsv3": ("HPSv3",),
    "imagereward": ("ImageReward",),
    "likeness": ("LPIPS", "Identity"),
    "loaded": ("release",),
    "place": ("On",),
    "safety": ("Concepts", "Safe"),
    "shaped": ("Hinge", "Nearby", "Steepness", "Target"),
    "siglip": ("SigLIP",),
    "weightless": ("JPEGCompressibility", "JPEGIncompressibility", "RotationalAnticorrelation", "Symmetry"),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"chainrule.rewards.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
