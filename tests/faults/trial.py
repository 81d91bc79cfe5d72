"""A trial: something done in a process of its own, which may be killed, and what became of it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from chainrule.errors import UserError

Work = Callable[[], object]
TOUCH = ("fsync", "replace", "unlink", "mkdir", "rmdir")  # what changes files on disk, and how often
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal that killed it, and what it said on stderr."""

    code: int
    said: str
    seconds: float

    def check_one_line(self) -> None:
        """Raises AssertionError unless it ended as a user's mistake does: exit code 2 and a last line that says why."""
        assert self.code == 2, f"exit code {self.code}: {self.said[-600:]}"
        assert TRACEBACK not in self.said, self.said[-600:]
        assert sum(line.startswith("error: ") for line in self.said.splitlines()) == 1, self.said[-600:]


@dataclass
class Started:
    """A process under way."""

    pid: int
    errors: Path
    began: float

    def end(self, deadline: float = 300.0) -> Ended:
        """Wait for it. Raises AssertionError, and kills it, when it takes longer than `deadline` seconds."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                said = self.errors.read_text(errors="replace")
                return Ended(os.waitstatus_to_exitcode(status), said, time.monotonic() - self.began)
            if time.monotonic() - self.began > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hung for {deadline} s")
            time.sleep(0.005)


def start(work: Work, errors: Path, environment: dict[str, str] | None = None) -> Started:
    """Do something in a fork of this process, as the program does it: a UserError is one line and exit code 2."""
    errors.parent.mkdir(parents=True, exist_ok=True)
    began, pid = time.monotonic(), os.fork()
    if pid:
        return Started(pid, errors, began)
    code = 1
    try:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        os.environ.update(environment or {})
        work()
        code = 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def together(work: Callable[[int], Work], errors: Path, count: int = 2) -> list[Started]:
    """Several processes that are told what a launcher tells them; each does the work of its number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def own(number: int) -> Work:
        def alone() -> None:
            PartialState._reset_state()  # this process may have one of its own, which a fork inherits
            work(number)()

        return alone

    def environment(number: int) -> dict[str, str]:
        return {**told, "ACCELERATE_USE_CPU": "true", "RANK": str(number), "LOCAL_RANK": str(number)}

    return [start(own(k), errors.with_name(f"{errors.name}-{k}.txt"), environment(k)) for k in range(count)]


def run(work: Work, errors: Path) -> Ended:
    """Do it, and wait."""
    return start(work, errors).end()


def tear(number: int) -> None:
    """Cut off half of what was being written: of the last line of a log, whose earlier lines are on disk already."""
    place = Path(os.readlink(f"/proc/self/fd/{number}"))
    data = place.read_bytes()
    start = data.rfind(b"\n", 0, len(data) - 1) + 1 if place.suffix == ".jsonl" else 0
    os.ftruncate(number, (start + len(data)) // 2)


def touching(work: Work, die: int = 0, torn: bool = False, count: Path | None = None) -> Work:
    """The same, killed before it touches a file for the `die`-th time; `torn`: with half of what was being written.

    0: not at all. `count` is a file that the number of times is written to.
    """

    def watched() -> None:
        times = 0

        def before(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal times
                times += 1
                if times == die:
                    if torn and name == "fsync":
                        tear(arguments[0])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in TOUCH:
            setattr(os, name, before(name, getattr(os, name)))
        work()
        if count:
            count.write_text(str(times))

    return watched
