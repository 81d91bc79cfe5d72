"""Two processes under faults: one or both killed, stopped, asked to stop, with an error or a full disk of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from tuned import differences, gray, outcome, tuned

import chainrule as cr
from faults.trial import Ended, Started, together, touching

MOMENTS = 10
TIMEOUT = 8.0  # seconds that one waits for the other
OPTIONS: dict[str, Any] = {"sample_every": 2, "timeout": TIMEOUT, "held_out": gray}


def both(folder: Path, name: str, work: Callable[[int], Callable[[], object]]) -> list[Started]:
    """Two processes under way, which say what they say in files of this name."""
    return together(work, folder / name)


def tuning(folder: Path, **options: Any) -> Callable[[int], Callable[[], object]]:
    """The same run on every process."""
    return lambda rank: lambda: tuned(folder / "run", **{**OPTIONS, **options})


@cache
def undisturbed(root: Path) -> tuple[dict[str, Any], float]:
    """What two processes leave that nothing happens to, and their seconds."""
    place = root / "two"
    ended = [each.end() for each in both(place, "said", tuning(place, overwrite=(place / "run").exists()))]
    assert not any(each.code for each in ended), [each.said[-500:] for each in ended]
    return outcome(place / "run"), max(each.seconds for each in ended)


def goes_on(root: Path, folder: Path) -> None:
    """Raises AssertionError unless both, started again, leave what two undisturbed ones leave."""
    ended = [each.end() for each in both(folder, "again", tuning(folder, resume=True))]
    assert not any(each.code for each in ended), [each.said[-500:] for each in ended]
    found = differences(outcome(folder / "run"), undisturbed(root)[0])
    assert not found, f"different: {found[:5]}"


def check_told(ended: Ended) -> None:
    """Raises AssertionError unless it finished, or ended with one line."""
    if ended.code:
        ended.check_one_line()


def killed(which: tuple[int, ...], moment: int, root: Path, folder: Path) -> None:
    """Some of the two are killed after a share of the time."""
    seconds = undisturbed(root)[1] * Random(moment).random()
    started = both(folder, "said", tuning(folder))
    time.sleep(seconds)
    for rank in which:
        os.kill(started[rank].pid, signal.SIGKILL)
    for rank, each in enumerate(started):
        ended = each.end(60)
        if rank not in which:
            check_told(ended)
    goes_on(root, folder)


def halted(rank: int, root: Path, folder: Path) -> None:
    """One stands still; the other gives up after the time it is told to wait."""
    started = both(folder, "said", tuning(folder))
    time.sleep(undisturbed(root)[1] * 0.5)
    os.kill(started[rank].pid, signal.SIGSTOP)
    ended = started[1 - rank].end(60)
    os.kill(started[rank].pid, signal.SIGKILL)
    os.kill(started[rank].pid, signal.SIGCONT)
    started[rank].end()
    check_told(ended)
    goes_on(root, folder)


def asked(rank: int, number: signal.Signals, root: Path, folder: Path) -> None:
    """A signal to one of them stops both, with all saved."""

    def work(own: int) -> Callable[[], object]:
        def look(row: dict[str, Any]) -> None:
            if own == rank and row["step"] == 3:
                os.kill(os.getpid(), number)

        return lambda: tuned(folder / "run", look=look, **OPTIONS)

    ended = [each.end() for each in both(folder, "said", work)]
    assert not any(each.code for each in ended), [each.said[-500:] for each in ended]
    assert (folder / "run/stopped.txt").read_text() == "interrupted at update 3\n"
    goes_on(root, folder)


def wrong(rank: int, root: Path, folder: Path) -> None:
    """One has an error of its user's; both end, each with a line."""

    def work(own: int) -> Callable[[], object]:
        def look(row: dict[str, Any]) -> None:
            if own == rank and row["step"] == 3:
                raise cr.UserError("the scorer's licence has expired; renew it")

        return lambda: tuned(folder / "run", look=look, **OPTIONS)

    for each in both(folder, "said", work):
        each.end(60).check_one_line()
    goes_on(root, folder)


def touched(number: int, root: Path, folder: Path) -> None:
    """The one that writes is killed before a write."""

    def work(own: int) -> Callable[[], object]:
        each = partial(tuned, folder / "run", **OPTIONS)
        return touching(each, number) if own == 0 else each

    ended = [each.end(60) for each in both(folder, "said", work)]
    check_told(ended[1])
    goes_on(root, folder)


def unshared(root: Path, folder: Path) -> None:
    """One that finds no checkpoint does not begin at 0 beside one that goes on."""
    started = both(folder, "said", tuning(folder, updates=3))
    assert not any(each.end().code for each in started)
    (folder / "elsewhere").mkdir()

    def work(own: int) -> Callable[[], object]:
        place = folder / "run" if own == 0 else folder / "elsewhere" / "run"
        return lambda: tuned(place, resume=True, **OPTIONS)

    for each in both(folder, "again", work):
        ended = each.end(60)
        ended.check_one_line()
        assert "put it on a disk that all of them share" in ended.said, ended.said


def trials(root: Path) -> Iterator[tuple[str, str, partial[None]]]:
    """(kind, name, what is tried in a folder)."""
    kind = "two processes"
    for moment in range(MOMENTS):
        which = [(0,), (1,), (0, 1)][moment % 3]
        yield kind, f"kill -9 of {' and '.join(map(str, which))} at moment {moment}", partial(killed, which, moment, root)
    for number in range(3, 60, 8):
        yield kind, f"kill -9 of 0 at file write {number}", partial(touched, number, root)
    for rank in range(2):
        yield kind, f"{rank} stands still", partial(halted, rank, root)
        yield kind, f"an error on {rank}", partial(wrong, rank, root)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            yield kind, f"{number.name} to {rank}", partial(asked, rank, number, root)
    yield kind, "no shared disk", partial(unshared, root)
