"""An album is a folder of images that were made of prompts, each with what made it: its facts. No torch here.

    0000.png 0001.png ...  images.jsonl  grid.png (more than 36 images: grid-001.png, grid-002.png, ...)

Every PNG holds its own facts, as JSON under the keyword `chainrule` and as the text `parameters` that viewers of generated
images show. `images.jsonl` has a line of facts for each. So the PNGs say by themselves which images are there and how they were
made: an album that was cut off is continued by adding what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from chainrule.errors import UserError
from chainrule.files import append_text, make_folder, write_picture, write_text
from chainrule.report.pictures import grid
from chainrule.runs import check_folder
from chainrule.size import size_of

KEYWORD, SHOWN = "chainrule", "parameters"  # of the text chunks in a PNG
LIST = "images.jsonl"
PAGE, COLUMNS = 36, 6  # images of a contact sheet, and of a row of it
WAYS = "pass --overwrite to replace it, or choose another out"

Facts = Mapping[str, Any]


def facts_of(path: str | Path) -> dict[str, Any]:
    """What made an image: the facts in a PNG of `chainrule sample`; {} for any other file, and for none."""
    with suppress(OSError, SyntaxError, ValueError, RecursionError), Image.open(path, formats=["PNG"]) as image:
        found = json.loads(image.info.get(KEYWORD, "{}"))
        return found if isinstance(found, dict) else {}
    return {}


@dataclass(frozen=True, slots=True)
class Album:
    """The images of these prompts and seeds in a folder; image k is that of the k-th pair."""

    folder: Path
    pairs: Sequence[tuple[str, int]]

    def picture(self, number: int) -> Path:
        """Where an image lies."""
        return self.folder / f"{number:04d}.png"

    @property
    def list(self) -> Path:
        """The file with a line of facts for each image."""
        return self.folder / LIST

    @property
    def sheets(self) -> dict[Path, range]:
        """The contact sheets, with the images that are on them: one, or pages of 36."""
        count = len(self.pairs)
        if count <= PAGE:
            return {self.folder / "grid.png": range(count)}
        starts = range(0, count, PAGE)
        return {self.folder / f"grid-{k:03d}.png": range(at, min(at + PAGE, count)) for k, at in enumerate(starts, 1)}

    # What is there

    def there(self) -> dict[int, dict[str, Any]]:
        """The facts of the images that are there, by their numbers."""
        found = {number: facts_of(self.picture(number)) for number in range(len(self.pairs)) if self.picture(number).exists()}
        return {number: facts for number, facts in found.items() if facts}

    def check(self, known: Facts, overwrite: bool = False) -> None:
        """Raises UserError if images cannot be put there, or if there are others than would be made. It touches nothing.

        `known` is what is known of how they will be made; None stands for a fact that none of them has.
        """
        check_folder(self.folder)
        if overwrite:
            return
        there = [number for number in range(len(self.pairs)) if self.picture(number).exists()]
        for number in there:
            prompt, seed = self.pairs[number]
            _check_same(self.picture(number), {"prompt": prompt, "seed": seed, **known})
        if facts_of(more := self.picture(len(self.pairs))):
            raise UserError(f"{more} is one image more than the {len(self.pairs)} that were asked for; {WAYS}")
        others = (place for place in (self.list, *self.sheets) if place.exists() and place.stat().st_size)
        if not there and (place := next(others, None)):
            raise UserError(f"{place} is there already; {WAYS}")

    # What is added

    def begin(self, overwrite: bool = False) -> dict[int, dict[str, Any]]:
        """Make the folder, with the list of the images that are there, and return their facts; with `overwrite` take away all."""
        make_folder(self.folder)
        if overwrite:
            for path in self._ours():
                path.unlink(missing_ok=True)
        there = self.there()
        self.write_list(there)
        return there

    def _ours(self) -> Iterator[Path]:
        """Files that are replaced: those with the names of this album's, and what another one left in the folder."""
        yield from (self.list, *self.sheets, *(self.picture(number) for number in range(len(self.pairs))))
        yield from (path for path in self.folder.glob("*.png") if facts_of(path))

    def add(self, number: int, image: Image.Image, facts: Facts) -> str:
        """Write an image with its facts, and return its line of the list."""
        texts = {"Software": "chainrule", SHOWN: parameters(facts), KEYWORD: json.dumps(facts, ensure_ascii=False)}
        write_picture(self.picture(number), image, texts)
        return self.line(number, facts)

    def line(self, number: int, facts: Facts) -> str:
        """An image's line of the list."""
        return json.dumps({"file": self.picture(number).name, **facts}, ensure_ascii=False) + "\n"

    def extend_list(self, lines: Sequence[str]) -> None:
        """Add lines to the list."""
        append_text(self.list, "".join(lines))

    def write_list(self, facts: Mapping[int, Facts]) -> None:
        """Write the list whole, in the images' order."""
        write_text(self.list, "".join(self.line(number, facts[number]) for number in sorted(facts)))

    def finish(self) -> None:
        """Write the list in order, and the contact sheets, one page of images in memory at a time.

        Raises UserError where this process does not see all images.
        """
        facts = self.there()
        if gone := next((self.picture(number) for number in range(len(self.pairs)) if number not in facts), None):
            raise UserError(f"{gone} is not here; out must be on a disk that all processes share")
        self.write_list(facts)
        for place in {*self.folder.glob("grid*.png")} - {*self.sheets}:
            if facts_of(place):  # of fewer images
                place.unlink()
        for place, numbers in self.sheets.items():
            shown = {"first": self.picture(numbers[0]).name, "last": self.picture(numbers[-1]).name}
            if facts_of(place) != shown:
                sheet = grid([_opened(self.picture(number)) for number in numbers], COLUMNS, [self.pairs[k][0] for k in numbers])
                write_picture(place, sheet, {KEYWORD: json.dumps(shown)})


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _check_same(path: Path, known: Facts) -> None:
    """Raises UserError for an image that is there and was made otherwise, or by something else."""
    found = facts_of(path)
    if not found:
        raise UserError(f"{path} is there already; {WAYS}")
    if isinstance(found.get("best_of"), int) and isinstance(found.get("seed"), int):
        found["seed"] //= max(found["best_of"], 1)  # the best of n has one of the seeds n s, n s + 1, ...
    found["rewards"] = list(found["rewards"]) if found.get("rewards") else None
    for key, value in known.items():
        if found.get(key) != value:
            raise UserError(f"{path} was made with {key} {_told(found.get(key))}, and now {key} is {_told(value)}; {WAYS}")


def _told(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def parameters(facts: Facts) -> str:
    """The facts as viewers and web interfaces of generated images read them from a PNG: the prompt, then a line of settings."""
    height, width = size_of(facts["size"])
    told = {"Steps": facts["steps"], "Sampler": facts.get("solver"), "CFG scale": facts["guidance"], "Seed": facts["seed"]}
    told |= {"Size": f"{width}x{height}", "Model": Path(facts["model"]).name}
    simple = {key: value for key, value in told.items() if isinstance(value, str | int | float)}
    return f"{facts['prompt']}\n" + ", ".join(f"{key}: {value}" for key, value in simple.items())
