"""Files written whole or not at all: a reader sees the old one or the new one, whatever is killed, full or gone. No torch here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from chainrule.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@contextmanager
def whole(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write in the block; after it, what was written stands at `path`, flushed to disk.

    After an error, or a kill, `path` is as it was. The file is as readable as the umask says. Raises UserError where it
    cannot be written: a full disk, a folder that is gone.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: str | Path, error: OSError) -> UserError:
    """The line for a file that cannot be written."""
    return UserError(f"cannot write {path}: {error.strerror or error}; what was saved before is whole")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, with line ends of one character. Raises UserError as `whole` does."""
    with whole(path) as file:
        file.write(text.encode())


def append_text(path: str | Path, text: str) -> None:
    """Add to the end of a text file in UTF-8, flushed to disk; a kill may tear what is added. Raises UserError as `whole` does."""
    try:
        with Path(path).open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def write_picture(path: str | Path, image: Image.Image, texts: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a PNG, with `texts` by their keywords in it (PNG's text chunks). Raises UserError as `whole` does."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    with whole(path) as file:
        image.save(file, "PNG", pnginfo=info)


def digest(paths: Iterable[Path]) -> str:
    """What tells these files from others: the first 16 hexadecimal digits of their SHA-256, whatever they are called."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def make_folder(path: str | Path) -> Path:
    """Make a folder, and those it is in. Raises UserError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return Path(path)
