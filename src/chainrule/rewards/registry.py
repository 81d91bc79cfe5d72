"""Rewards by name, for the command line and configuration files: "10*pickscore + 2*hpsv2:tiny - 0.05*aesthetic".

Nothing here imports torch, so that listing the names is instant; a class is imported when a reward is made.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainrule.errors import UserError, unknown
from chainrule.named import from_file, is_place

if TYPE_CHECKING:
    from chainrule.rewards.base import Reward


@dataclass(frozen=True)
class Entry:
    """A named reward: its class, written "module.Class" within `chainrule.rewards`, and one line about it."""

    where: str
    about: str

    def load(self) -> type[Reward]:
        """Import the class. This may import torch and transformers."""
        module, _, name = self.where.rpartition(".")
        return getattr(importlib.import_module(f"chainrule.rewards.{module}"), name)


REGISTRY: Mapping[str, Entry] = {
    "pickscore": Entry("scorers.PickScore", "which of two images people pick for a prompt (Pick-a-Pic, CLIP-H)"),
    "hpsv2": Entry("scorers.HPSv2", "human preference for an image given its prompt (HPD v2, CLIP-H)"),
    "hpsv2.1": Entry("scorers.HPSv21", "HPSv2 with its authors' newer weights: hpsv2.1:HPS_v2.1_compressed.pt"),
    "hpsv3": Entry("hpsv3.HPSv3", "human preference for an image given its prompt (HPD v3, Qwen2-VL 7B and a head)"),
    "imagereward": Entry("imagereward.ImageReward", "human preference for an image given its prompt (BLIP and a head)"),
    "aesthetic": Entry("scorers.Aesthetic", "LAION aesthetic rating, 1 to 10, of the image alone (CLIP-L and a head)"),
    "clip": Entry("scorers.CLIPScore", "agreement of image and prompt, or of image and text: clip:an angry face"),
    "siglip": Entry("siglip.SigLIP", "agreement of image and prompt, or text, by SigLIP: siglip:an angry face"),
    "directional": Entry("reference.Directional", "change of the image along that of a text: directional:a face to a sad face"),
    "classifier": Entry("classifier.Classifier", "log-probability of a class: classifier:dog; subtracted, away from it"),
    "detect": Entry("detect.Detection", "how much of a thing a detector finds (OWL-ViT): detect:a person, people"),
    "area": Entry("detect.DetectedArea", "how much of the picture is a thing (OWL-ViT): area:strawberries"),
    "safe": Entry("safety.Safe", "log-probability of being safe for work (a ViT classifier)"),
    "concepts": Entry("safety.Concepts", "distance from what Stable Diffusion's safety checker refuses; above 0 it passes"),
    "style": Entry("reference.Style", "closeness to a picture's style (Gram matrices of CLIP features): style:picture.png"),
    "perceptual": Entry("reference.Perceptual", "closeness to the image as it was before steering (CLIP's layers)"),
    "identity": Entry("likeness.Identity", "likeness to the image as it was before steering (DINOv2's class token)"),
    "lpips": Entry("likeness.LPIPS", "closeness to the image as it was by LPIPS; lpips:vgg; needs the package lpips"),
    "symmetry": Entry("weightless.Symmetry", "left-right symmetry"),
    "rotation": Entry("weightless.RotationalAnticorrelation", "unlikeness to the image's own quarter turns"),
    "compressible": Entry(
        "weightless.JPEGCompressibility", "what survives JPEG; compressible:30 sets its quality, compressible:4x its ratio"
    ),
    "incompressible": Entry("weightless.JPEGIncompressibility", "what JPEG loses; incompressible:30 sets the quality"),
    "diversity": Entry("diversity.Diversity", "unlikeness of the images of a batch, by pixels or by a CLIP: diversity:tiny"),
    "filesize": Entry("external.FileSize", "kilobytes of the image's JPEG file; filesize:80 sets its quality; no gradient"),
    "process": Entry("external.Program", "what another program says of each image: process:python scorer.py; no gradient"),
    "dropout": Entry("diversity.Dropout", "aesthetic with dropout in its head: dropout:0.95, or dropout:0.5:tiny"),
}


def described(text: str) -> dict[str, str]:
    """The names of `REGISTRY` that a written reward has, each with the line about it. Nothing is loaded."""
    names = "|".join(sorted(map(re.escape, REGISTRY), key=len, reverse=True))
    return {name: REGISTRY[name].about for name in re.findall(rf"(?:^|[+*-])\s*({names})(?![\w./-])", text)}


_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_DEVICE = r"(?:cpu|mps|(?:cuda|xpu)(?::\d+)?)"
_ENDS = rf"(?=\s*(?:[+-]|<=|@{_DEVICE}|$))(?!-[\w.-]*/)"  # perhaps a sign without a space, but not tiny-lab/model
_KNOWN = rf"(?:{'|'.join(map(re.escape, REGISTRY))})(?::tiny|:\d+)?{_ENDS}"
_WORD = r"\w+(?=[+-])(?![^\s]*[:/])"
# Rewards that take a text after the colon, which may have spaces, and the option it sets. Their source may stand before it.
TEXT_OPTION = {
    "clip": "text", "siglip": "text", "directional": "text", "detect": "text", "area": "text", "classifier": "label",
    "style": "picture", "process": "command",
}  # fmt: skip
# Rewards for which no small model comes with chainrule, so the source "tiny" is not for them.
UNBUNDLED = ("hpsv3", "imagereward", "siglip", "detect", "area", "safe", "concepts", "identity", "lpips")
_TEXT_IS_OPTIONAL = ("clip", "siglip", "directional")  # they have a default
_WITH_TEXT = rf"(?:{'|'.join(TEXT_OPTION)}):[^*]+?(?=->|<=|@{_DEVICE}|\s+[+-]\s|\s*$)"
_TERM = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<body>{_KNOWN}|{_WITH_TEXT}|{_WORD}|(?:(?!->|<=|@{_DEVICE})[^\s*])++)"
    rf"(?:@(?P<device>{_DEVICE})(?:/(?P<dtype>\w+))?)?(?:(?P<aim>->|<=)(?P<goal>-?{_NUMBER}))?\s*(?=[+-]|$)"
)


def parse(text: str, source: str | None = None) -> Reward:
    """The reward written as a weighted sum, e.g. "10*pickscore + 2*hpsv2:tiny - rewards.py:brightness".

    A term is a name of `REGISTRY`, with `:source` (a folder, hub id or "tiny"), `:30` or `:4x` where the class takes one, or
    `path/to/file.py:function`; after it `@cuda:1`, or `@cuda:1/bfloat16`, says where it is computed (`On`).
    Put spaces around + and - after a path or source, which may contain them.
    `source` is used for terms that take a source and name none. "tiny" is the reward models that come with the bundled
    models; it is not used for `UNBUNDLED`.
    Raises UserError for a malformed sum, an unknown name, a bad source, and a missing file or function.
    """
    total: Reward | None = None
    at = 0
    while at < len(text.rstrip()) or total is None:
        term = _TERM.match(text, at)
        if term is None or (total is not None and not term["sign"]):
            rest = text[at:].strip()
            raise UserError(f"cannot read the reward {text!r} at {rest!r}; write it like '10*pickscore + 2*hpsv2'")
        weight = float(term["weight"] or 1) * (-1 if term["sign"] == "-" else 1)
        one = _named(term["body"], {"source": source} if source else {})
        if term["device"]:
            one = _on(one, term["device"], term["dtype"] or "float32")
        if term["goal"]:
            if not math.isfinite(float(term["goal"])):
                raise UserError(f"the reward {text!r} is to reach {term['goal']}, which is no finite number")
            one = _shaped(one, term["aim"], float(term["goal"]))
        scaled = one if weight == 1 else weight * one
        total = scaled if total is None else total + scaled
        at = term.end()
    return total


def _named(body: str, otherwise: dict[str, str]) -> Reward:
    head, colon, tail = body.partition(":")
    if is_place(body) and head != "process":
        return _from_file(body)
    if head not in REGISTRY:
        raise unknown("reward", head, REGISTRY)
    kind = REGISTRY[head].load()
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if "source" not in names or (head in UNBUNDLED and otherwise.get("source") == "tiny"):
        otherwise = {}
    if head in TEXT_OPTION and (colon or head not in _TEXT_IS_OPTIONAL):
        return kind(**otherwise | _text_options(head, tail, "source" in names))
    if not colon:
        return kind(**otherwise)
    option = next(iter(fields(kind)), None)  # type: ignore[arg-type]
    if option is None:
        raise UserError(f"reward {head!r} takes nothing after a colon, got {tail!r}")
    if "ratio" in names and re.fullmatch(rf"{_NUMBER}x", tail):
        return kind(ratio=float(tail[:-1]))  # type: ignore[call-arg]
    if isinstance(option.default, int | float):
        return kind(**otherwise | _number_options(head, tail, option.name, type(option.default), "source" in names))
    return kind(tail)  # type: ignore[call-arg]


def _number_options(head: str, tail: str, option: str, kind: type[int] | type[float], sourced: bool) -> dict[str, Any]:
    """The options written in `compressible:30`, `dropout:0.5:tiny` or `dropout:tiny`: a number, a source, or both."""
    value, colon, source = tail.partition(":")
    if not re.fullmatch(r"\d+" if kind is int else _NUMBER, value):
        if sourced and (tail == "tiny" or "/" in tail):
            return {"source": tail}
        raise UserError(f"reward {head!r} takes a {'whole ' * (kind is int)}number after the colon ({option}), got {tail!r}")
    if colon and not sourced:
        raise UserError(f"reward {head!r} takes nothing after its {option}, got {tail!r}")
    return {option: kind(value)} | ({"source": source} if colon else {})


def _text_options(head: str, tail: str, sourced: bool) -> dict[str, str]:
    """The options written in `style:tiny:picture.png`: the source, if there is one, and the text. `clip:SOURCE` has no text."""
    source, colon, rest = tail.partition(":")
    if colon and sourced:
        return {"source": source, TEXT_OPTION[head]: rest.strip()}
    if head in ("clip", "siglip") and (tail == "tiny" or Path(tail).exists() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", tail)):
        return {"source": tail}
    if not tail.strip():
        raise UserError(f"reward {head!r} needs a {TEXT_OPTION[head]} after a colon, as in {head}:{TEXT_OPTION[head]}")
    return {TEXT_OPTION[head]: tail.strip()}


def _on(reward: Reward, device: str, dtype: str) -> Reward:
    from chainrule.rewards.place import On

    return On(reward, device, dtype)


def _shaped(reward: Reward, aim: str, value: float) -> Reward:
    from chainrule.rewards.shaped import Hinge, Target

    return Target(reward, value) if aim == "->" else Hinge(reward, value)


def _from_file(body: str) -> Reward:
    """The reward `name` of `path/to/file.py:name`: a function of (images, prompts), or a Reward."""
    from chainrule.rewards.base import reward_of

    found = from_file(body, "reward", "function")
    return reward_of(found() if isinstance(found, type) else found, name=body)
