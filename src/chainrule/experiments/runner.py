"""Running what is missing of a table: one run after the other, or several at once in processes of one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chainrule.errors import UserError
from chainrule.experiments.table import Table
from chainrule.experiments.unit import Unit, units
from chainrule.loop import stop_signals

CALLED_OFF = "called off"


@dataclass(slots=True)
class Outcome:
    """What became of the runs that were missing, by their titles."""

    made: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # with the reason
    interrupted: bool = False


def run(tables: Sequence[Table], root: Path, jobs: int = 1) -> Outcome:
    """Make every result of these tables that is not in `root` yet.

    Each run is a folder there; a run that was cut is taken up (training from its last checkpoint, the rest from the start).
    What it prints goes to a file beside its folder. A run that fails is reported and the others go on. Ctrl-C, or SIGTERM, keeps
    what is there. `jobs` runs at a time, in a process of one thread each. Raises UserError for a table that cannot be run, and
    for a root that is no folder.
    """
    missing = {unit.key: unit for table in tables for unit in units(table) if not unit.done(root)}
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the root {root}: {error.strerror or error}; choose another root") from error
    outcome = Outcome()
    turns = [[unit for unit in missing.values() if bool(unit.of) is measuring] for measuring in (False, True)]
    with _bar(len(missing)) as bar:
        for waiting in filter(None, turns):  # what measures a run comes after it
            if jobs == 1:
                _one_by_one(waiting, root, outcome, bar)
            elif not outcome.interrupted:
                _side_by_side(waiting, root, jobs, outcome, bar)
    return outcome


@contextmanager
def _bar(total: int) -> Iterator[Progress]:
    """A bar on stderr: the runs under way, and how many are done."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)  # this stream, while a run's own output goes elsewhere
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        bar.add_task("runs", total=total)
        yield bar


def _show(bar: Progress, running: Sequence[Unit], outcome: Outcome) -> None:
    names = " · ".join(unit.title for unit in running) or "runs"
    bar.update(bar.task_ids[0], description=names, completed=len(outcome.made) + len(outcome.failed), refresh=True)


def _one_by_one(waiting: list[Unit], root: Path, outcome: Outcome, bar: Progress) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for unit in waiting:
            _show(bar, [unit], outcome)
            _note(outcome, unit, _logged(unit, root))
            if outcome.interrupted:
                break
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        torch.set_num_threads(threads)
    _show(bar, [], outcome)


@dataclass(slots=True)
class Worker:
    """A process of one thread that makes one unit after the other, so that the libraries are loaded once."""

    process: BaseProcess
    pipe: Connection
    unit: Unit

    @classmethod
    def start(cls, unit: Unit, root: Path) -> Worker:
        """Start the process."""
        fresh = multiprocessing.get_context("spawn")  # a forked torch may hang
        here, there = fresh.Pipe()
        process = fresh.Process(target=_serve, args=(there, root), daemon=True)
        process.start()
        there.close()
        here.send(unit)
        return cls(process, here, unit)

    def answer(self, root: Path) -> str | None:
        """None where the unit is done, otherwise why it is not."""
        with contextlib.suppress(EOFError, OSError):
            answer: str | None = self.pipe.recv()
            return answer
        return f"its process ended without a result; see {_log(self.unit, root)}"

    def goes_on(self, waiting: list[Unit]) -> bool:
        """Give it the next unit, if there is one and the process lives."""
        if not waiting or not self.process.is_alive():
            return False
        self.unit = waiting.pop(0)
        self.pipe.send(self.unit)
        return True


def _serve(pipe: Connection, root: Path) -> None:
    """What a worker does until its parent hangs up."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(_logged(pipe.recv(), root))


def _side_by_side(waiting: list[Unit], root: Path, jobs: int, outcome: Outcome, bar: Progress) -> None:
    with stop_signals() as asked, _one_thread():
        workers = [Worker.start(waiting.pop(0), root) for _ in range(min(jobs, len(waiting)))]
        while workers:
            _show(bar, [worker.unit for worker in workers], outcome)
            if asked() and not outcome.interrupted:
                outcome.interrupted = True
                waiting.clear()
                for worker in workers:
                    worker.process.terminate()  # training saves a checkpoint first
            ready = multiprocessing.connection.wait([worker.pipe for worker in workers], timeout=0.5)
            for worker in [each for each in workers if each.pipe in ready]:
                _note(outcome, worker.unit, worker.answer(root))
                if worker.goes_on(waiting):
                    continue
                workers.remove(worker)
                worker.pipe.close()
                if waiting:
                    workers.append(Worker.start(waiting.pop(0), root))
    _show(bar, [], outcome)


def _note(outcome: Outcome, unit: Unit, answer: str | None) -> None:
    if answer is None:
        outcome.made.append(unit.title)
    elif answer == CALLED_OFF or outcome.interrupted:
        outcome.interrupted = True
    else:
        outcome.failed[unit.title] = answer


def _log(unit: Unit, root: Path) -> Path:
    folder = unit.folder(root)
    return folder.with_name(f"{folder.name}.log")


def _logged(unit: Unit, root: Path) -> str | None:
    """Do the work with its output in a file: None when done, otherwise why not."""
    from chainrule.experiments.tasks import work

    log = _log(unit, root)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            return None if work(unit, root) else CALLED_OFF
        except KeyboardInterrupt:
            return CALLED_OFF
        except UserError as error:
            return str(error)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error} (see {log})"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started within the block compute with one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
