"""Reads a source of prompts, written as `NAME`, `NAME:test@3` or `NAME as a photo of {}`."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chainrule.asked import texts
from chainrule.errors import UserError, unknown
from chainrule.prompts import files, hub
from chainrule.prompts.sets import SETS, subjects

# What DRaFT's authors found (arXiv:2309.17400, A.3).
PAPERS_TEMPLATE = "A stunning beautiful oil painting of a {}, cinematic lighting, golden hour light."
TEMPLATES = (
    "{}", PAPERS_TEMPLATE, "a photo of {}", "a painting of {}", "a drawing of {}", "a close-up of {}", "a large {}",
    "{} in the center", "{} on a plain background",
)  # fmt: skip

_HALF = re.compile(r"(.+):(train|test)(?:@([^:/]*))?", re.DOTALL)
_SLOT = re.compile(r"(?:\b(a|an|a\(n\)) )?\{\}", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of prompts: a set, file, folder or dataset, which half of it ("train" or "test"), and a template to fill."""

    name: str
    half: str = ""
    seed: str = ""
    template: str = ""

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read NAME[:train|:test[@SEED]][ as TEMPLATE with {}]. The name of an existing file or folder is taken whole."""
        if os.path.exists(text):
            return cls(name=text)
        front, _, template = text.partition(" as ")
        front, template = (front.strip(), template.strip()) if "{}" in template else (text, "")
        found = _HALF.fullmatch(front)
        if not found or (front.startswith(hub.PREFIX) and found[1].count(":") < 3):  # there :train is the dataset's own split
            return cls(name=front, template=template)
        return cls(name=found[1], half=found[2], seed=found[3] if found[3] is not None else "0", template=template)


def prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Read prompts from a set, a file, a folder, a dataset or a list; docs/prompts.md shows every form.

    A source is a set (`animals`, `unseen-animals`, `faces`, `emoji`), a file (.txt, .json, .jsonl, .csv, .tsv, .parquet; its
    column after a colon), the folder of HPDv2's benchmark or of a saved dataset, or `hub:owner/name:split:column`.
    It may end in `:train` or `:test`, the same split of four fifths against one fifth everywhere (`:test@3` by seed 3), and then
    in a template, ` as a photo of {}`, filled with the subjects of a set ("a fox") or the lines of a file. An article before {}
    is made to fit: "a {}" gives "an ant".
    Raises UserError for an unknown name, and for a file that is missing, empty, not text or without a column of prompts.
    """
    if not isinstance(source, (str, Path)):
        if not (given := texts(source)):
            raise UserError("the list holds no prompts")
        if blank := next((number for number, prompt in enumerate(given, 1) if not prompt.strip()), None):
            raise UserError(f"prompt {blank} of the list is blank; leave it out")
        return given
    parsed = Source.parse(str(source))
    found = _subjects(parsed) if parsed.template else _named(parsed.name)
    if parsed.half:
        train, test = split(found, seed=_seed(parsed, str(source)))
        found = train if parsed.half == "train" else test
    if not found:
        raise UserError(f"{source} holds no prompts")
    return [fill(parsed.template, subject) for subject in found] if parsed.template else found


def groups(source: str | Path, column: str) -> list[str]:
    """The group of each prompt of a source, in the same order: what its file has in another `column`, the category say.

    HPDv2's benchmark folder has the column "style". Raises UserError for a source without columns, and where a prompt has no group.
    """
    parsed = Source.parse(str(source))
    place, _ = _place(parsed.name)
    if os.path.isdir(place) and files.is_benchmark(Path(place)):
        if column != "style":
            raise UserError(f"the prompt folder {place} has no column {column!r}; its prompts are grouped by style")
        found = [style for style in files.STYLES for _ in files.read(Path(place) / f"{style}.json")]
    elif place.lower().endswith(files.WITH_COLUMNS) or _holds_prompts(place):
        found = _named(f"{place}:{column}")
    elif place.startswith(hub.PREFIX) and place.count(":") >= 2:
        found = _named(f"{':'.join(place.split(':')[:3])}:{column}")
    else:
        raise UserError(f"{source} has no columns, so its prompts have no {column}; leave the group out")
    if parsed.half:
        train, test = split(found, seed=_seed(parsed, str(source)))
        found = train if parsed.half == "train" else test
    if len(found) != len(prompts(source)):
        raise UserError(f"{source} has {len(prompts(source))} prompts, but {len(found)} values in its column {column!r}")
    return found


def is_source(text: str) -> bool:
    """Whether a text names a source of prompts (a set, a file, a folder of prompts, a dataset) and is not itself a prompt."""
    name = Source.parse(text).name
    place, _ = _place(name)
    known = name in SETS or name.startswith(hub.PREFIX)
    return known or os.path.isfile(place) or place.lower().endswith(files.SUFFIXES) or _holds_prompts(place)


def split(texts: Sequence[str], share: float = 0.8, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split prompts at random into two lists, for training and held out, each in the original order.

    `share` of them, rounded, are for training. The same seed gives the same split.
    """
    chosen = set(random.Random(seed).sample(range(len(texts)), round(share * len(texts))))
    return [p for i, p in enumerate(texts) if i in chosen], [p for i, p in enumerate(texts) if i not in chosen]


def other_half(source: str | Path | Sequence[str]) -> list[str]:
    """The prompts of `NAME:test` for the source `NAME:train`; none for any other source."""
    if not isinstance(source, (str, Path)):
        return []
    parsed = Source.parse(str(source))
    if parsed.half != "train":
        return []
    rest = f" as {parsed.template}" if parsed.template else ""
    try:
        return prompts(f"{parsed.name}:test@{parsed.seed}{rest}")
    except UserError:  # so few that there is no other half
        return []


def fill(template: str, subject: str) -> str:
    """Put the subject for every {} of a template. An article before {} is made to fit: "a {}" gives "an ant"."""

    def filled(slot: re.Match[str]) -> str:
        if not slot[1]:
            return subject
        own = subject.lower().startswith(("a ", "an "))
        fitting = subject if own else f"{'an' if subject[0].lower() in 'aeiou' else 'a'} {subject}"
        return fitting[0].upper() + fitting[1:] if slot[1][0] == "A" else fitting

    return _SLOT.sub(filled, template)


def _seed(parsed: Source, source: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", parsed.seed):
        raise UserError(f"the seed {parsed.seed!r} of {source!r} must be a whole number, as in {parsed.name}:{parsed.half}@3")
    return int(parsed.seed)


def _subjects(parsed: Source) -> list[str]:
    return subjects(parsed.name) if parsed.name in SETS else _named(parsed.name)


def _place(name: str) -> tuple[str, str]:
    """The path and the column of `path:column`; no column where the path has none to choose."""
    front, _, column = name.rpartition(":")
    chosen = not os.path.exists(name) and (front.lower().endswith(files.WITH_COLUMNS) or _holds_prompts(front))
    return (front, column) if chosen else (name, "")


def _holds_prompts(place: str) -> bool:
    folder = Path(place)
    return os.path.isdir(place) and (files.is_benchmark(folder) or hub.is_saved(folder) or bool(hub.parquet_files(folder)))


def _named(name: str) -> list[str]:
    if name in SETS:
        return SETS[name]()
    if name.startswith(hub.PREFIX):
        return hub.read_hub(name)
    place, column = _place(name)
    if os.path.isdir(place):
        return _folder(Path(place), column)
    if os.path.isfile(place):
        return (hub.read_parquet if place.lower().endswith(".parquet") else files.read)(Path(place), column)
    if " as " in name:
        raise UserError(
            f"the template {name.partition(' as ')[2]!r} of {name!r} must say where the subject goes, as in a photo of {{}}"
        )
    if "/" in place or "." in place:
        raise UserError(f"the prompt file {place} does not exist")
    raise unknown("prompt set", name, SETS)


def _folder(path: Path, column: str) -> list[str]:
    if hub.is_saved(path):
        return hub.read_saved(path, column)
    if parts := hub.parquet_files(path):
        return [prompt for part in parts for prompt in hub.read_parquet(part, column)]
    if not files.is_benchmark(path):
        styles = ", ".join(f"{style}.json" for style in files.STYLES)
        raise UserError(f"the prompt file {path} is a folder, but no benchmark ({styles}), saved dataset or Parquet files")
    if column:
        raise UserError(f"the prompt folder {path} has no columns, but {column!r} was asked for")
    return files.read_benchmark(path)
