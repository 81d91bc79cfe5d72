"""What there is to choose from: the models that were named, the bundled ones, and what lies in one folder. That is all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chainrule.adapters.files import BANDS, FILE, LEARNED
from chainrule.errors import UserError, unknown
from chainrule.models.bundled import BUNDLED
from chainrule.vote import KEY, PAGE

T = TypeVar("T")
NAME = re.compile(r"\w[\w. -]{0,99}")


@dataclass(frozen=True, slots=True)
class Shelf:
    """`folder` holds runs, adapters and studies, at most two levels deep; what is made goes there too.

    `sources` are further models, runs and adapters, as they were named on the command line.
    """

    folder: Path
    sources: tuple[str, ...] = ()

    def models(self) -> dict[str, str]:
        """Models and runs by the names they have on the page: those that were named, the folder's, the bundled ones."""
        named = {source: source for source in self.sources if not _is_adapter(Path(source)) or _is_run(Path(source))}
        inside = {name: str(place) for name, place in self._inside() if _is_run(place) or (place / "model_index.json").is_file()}
        bundled = {name: name for name in BUNDLED}
        return {**named, **{name: place for name, place in inside.items() if place not in named}, **bundled}

    def adapters(self) -> dict[str, Path]:
        """Adapters by their names on the page; a run stands for its own."""
        named = {source: Path(source) for source in self.sources if _is_adapter(Path(source))}
        inside = {name: place for name, place in self._inside() if _is_adapter(place)}
        return {**named, **{name: place for name, place in inside.items() if place not in named.values()}}

    def runs(self) -> dict[str, Path]:
        """The folder's runs, and those that were named."""
        named = {source: Path(source) for source in self.sources if _is_run(Path(source))}
        inside = {name: place for name, place in self._inside() if _is_run(place)}
        return {**named, **{name: place for name, place in inside.items() if place not in named.values()}}

    def studies(self) -> dict[str, Path]:
        """The folder's studies of preference."""
        return {name: place for name, place in self._inside() if (place / PAGE).is_file() and (place / KEY).is_file()}

    def free(self, name: str | None) -> Path:
        """The place of something new in the folder. Raises UserError for a name that is taken, or that leads out of the folder."""
        name = (name or "").strip()
        if not NAME.fullmatch(name):
            raise UserError(f"the name is {name!r}, but must be letters, digits, spaces, ., - and _, a letter first")
        place = self.folder / name
        if place.exists() or place.is_symlink():
            raise UserError(f"{name!r} is there already; choose another name")
        return place

    def _inside(self) -> Iterator[tuple[str, Path]]:
        """Folders, and files of weights, by their places in the folder. A link that leads out of it is passed over."""
        root = self.folder.resolve()
        for pattern in ("*", "*/*"):
            for place in sorted(self.folder.glob(pattern)):
                if place.name.startswith(".") or (place.name == "adapter" and _is_run(place.parent)):
                    continue
                if place.resolve().is_relative_to(root) and (place.is_dir() or (pattern == "*" and place.suffix == ".safetensors")):
                    yield place.relative_to(self.folder).as_posix(), place


def chosen(what: str, name: str | None, among: Mapping[str, T]) -> T:
    """The thing of this name. Raises UserError, with the nearest known name, where there is none."""
    if not name:
        raise UserError(f"no {what} chosen")
    if name not in among:
        raise unknown(what, str(name), among)
    return among[name]


def _is_run(place: Path) -> bool:
    return (place / "config.yaml").is_file()


def _is_adapter(place: Path) -> bool:
    if place.is_file():
        return place.suffix == ".safetensors"
    return any((folder / name).exists() for folder in (place, place / "adapter") for name in (FILE, BANDS, LEARNED))
