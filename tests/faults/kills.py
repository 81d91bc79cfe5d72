"""kill -9 at random moments, and before every time that a file is touched."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tuned import differences, outcome

from faults.runs import METHODS, resumed, undisturbed, work
from faults.trial import run, start, touching

MOMENTS = 40


def goes_on(method: str, root: Path, folder: Path) -> None:
    """Raises AssertionError unless the run, gone on with, leaves what an undisturbed one leaves."""
    ended = resumed(method, root, folder)
    assert ended.code == 0, ended.said[-600:]
    found = differences(outcome(folder / "run"), undisturbed(method, root)[0])
    assert not found, f"different: {found[:5]}"


def at_a_moment(method: str, moment: int, root: Path, folder: Path) -> None:
    """Killed after a share of the time that a whole run takes."""
    seconds = undisturbed(method, root)[1] * Random(moment).random()
    started = start(work(method, root, folder / "run"), folder / "said.txt")
    time.sleep(seconds)
    os.kill(started.pid, signal.SIGKILL)
    started.end()
    goes_on(method, root, folder)


def at_a_touch(method: str, number: int, torn: bool, root: Path, folder: Path) -> None:
    """Killed before a file is touched for the so-manieth time."""
    ended = run(touching(work(method, root, folder / "run"), number, torn), folder / "said.txt")
    assert ended.code == -signal.SIGKILL, f"exit code {ended.code}: {ended.said[-600:]}"
    goes_on(method, root, folder)


def trials(root: Path) -> Iterator[tuple[str, str, partial[None]]]:
    """(kind, name, what is tried in a folder)."""
    for method in METHODS:
        for moment in range(MOMENTS):
            yield "kill -9 at a random moment", f"{method} {moment}", partial(at_a_moment, method, moment, root)
        count = root / f"touches-{method}"
        if not count.exists():
            assert run(touching(work(method, root, root / f"counted-{method}"), count=count), root / "said.txt").code == 0
        for number in range(1, int(count.read_text()) + 1):
            for torn in (False, True):
                name = f"{method} {number}{' torn' * torn}"
                yield "kill -9 at every file write", name, partial(at_a_touch, method, number, torn, root)
