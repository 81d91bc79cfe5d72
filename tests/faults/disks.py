"""A disk that is full, at five sizes; a folder that is renamed, deleted or not to be written to."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tuned import differences, outcome

from faults.runs import METHODS, undisturbed, work
from faults.trial import run

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what a run needs
PAGE = 4096


def full(method: str, share: float, root: Path, folder: Path) -> None:
    """A file system in memory that holds a share of a run. With room for all of it, the run goes on to the same end."""
    found, _ = undisturbed(method, root)
    there = root / f"undisturbed-{method}/run"
    needs = sum(-(-path.stat().st_size // PAGE) * PAGE for path in there.rglob("*") if path.is_file())
    place = folder / "disk"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(int(needs * share), PAGE)}", "tmpfs", place], check=True)
    try:
        ended = run(work(method, root, place / "run"), folder / "said.txt")
        ended.check_one_line()
        assert "No space left on device" in ended.said, ended.said
        subprocess.run(["mount", "-o", f"remount,size={needs * 10}", place], check=True)
        again = run(work(method, root, place / "run", resume=True), folder / "again.txt")
        assert again.code == 0, again.said[-600:]
        assert not (wrong := differences(outcome(place / "run"), found)), f"different: {wrong[:5]}"
    finally:
        subprocess.run(["umount", place], check=True)


def moved(what: str, root: Path, folder: Path) -> None:
    """The folder is renamed, or deleted, after the third update: nothing is written where it was; what was renamed goes on."""
    place = folder / "run"

    def update(row: dict[str, object]) -> None:
        if row["step"] == 3:
            place.rename(folder / "elsewhere") if what == "renamed" else shutil.rmtree(place)

    ended = run(work("draft-lv", root, place, look=update), folder / "said.txt")
    ended.check_one_line()
    assert not place.exists() and "no longer there" in ended.said, ended.said
    if what == "renamed":
        again = run(work("draft-lv", root, folder / "elsewhere", resume=True), folder / "again.txt")
        assert again.code == 0, again.said[-600:]
        assert not differences(outcome(folder / "elsewhere"), undisturbed("draft-lv", root)[0])


def read_only(root: Path, folder: Path) -> None:
    """A file system that nothing can be written to."""
    place = folder / "disk"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=True)
    try:
        ended = run(work("draft-lv", root, place / "run"), folder / "said.txt")
        ended.check_one_line()
        assert "Read-only file system" in ended.said, ended.said
    finally:
        subprocess.run(["umount", place], check=True)


def trials(root: Path) -> Iterator[tuple[str, str, partial[None]]]:
    """(kind, name, what is tried in a folder). Disks need the right to mount one."""
    if os.geteuid() == 0:
        for method in METHODS:
            for share in SHARES:
                yield "a full disk", f"{method} {share}", partial(full, method, share, root)
        yield "a read-only disk", "draft-lv", partial(read_only, root)
    for what in ("renamed", "deleted"):
        yield "the folder moved under a run", what, partial(moved, what, root)
