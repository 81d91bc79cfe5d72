"""One loop for all that is done update by update: fine-tuning, distilling, steering.

A task says what an update is. The loop has the rest: the progress bar, stopping, updates gone bad, checkpoints, and the
listeners that look on (trackers, sample grids, a user's own function).
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from chainrule import checkpoints
from chainrule.config import RunConfig
from chainrule.errors import UserError
from chainrule.noise import derive, drawing
from chainrule.processes import ALONE, Processes
from chainrule.runs import Run

BAD_IN_A_ROW = 8  # updates that may be skipped or taken back for NaN or Inf, with none that holds between, before the loop gives up

Row = dict[str, Any]
"""What one update logs: step, the task's `watched` number, grad_norm, lr, seconds, skipped, and `terms` {name: value}.

`taken_back` is there, and true, where what came of the last update was undone.
"""


class Task(Protocol):
    """Something done by a number of equal updates."""

    @property
    def label(self) -> str:
        """What the progress bar calls an update: "update", "stage 2 of 4"."""

    @property
    def watched(self) -> str:
        """The number of a row that the progress bar shows, "reward" or "loss"."""

    @property
    def batch(self) -> int:
        """Images per update, over all processes."""

    @property
    def seed(self) -> int:
        """What an update draws from torch's, numpy's and Python's own generators depends on this, and on nothing before it."""

    @property
    def total(self) -> int:
        """Updates until it is done. It may shrink on the way."""

    @property
    def step(self) -> int:
        """Updates done."""

    def update(self) -> Row:
        """Make one update. One whose watched number or gradient is not finite must change nothing but `step` and `skipped`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a checkpoint needs to go on bit for bit: tensors, and what JSON can hold."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state. Raises KeyError, TypeError or RuntimeError when it is of something else."""

    def save(self, folder: Path) -> None:
        """Write what the task makes into the run folder. The main process calls it."""


def _nothing(_: object = None) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who is told how a task goes. Every process tells its own."""

    started: Callable[[], None] = _nothing  # before the first update of this call, after a checkpoint is loaded
    updated: Callable[[Row], str | None] = _nothing  # may add values to the row; what it returns is a reason to stop
    finished: Callable[[str], None] = _nothing  # with the reason, after the result is saved


def told(on_update: Callable[[Row], object] | None) -> tuple[Listener, ...]:
    """A listener that calls a user's function, if there is one, with every row."""
    if on_update is None:
        return ()

    def updated(row: Row) -> None:
        on_update(row)

    return (Listener(updated=updated),)


@contextmanager
def open_run(
    out: str | Path, config: RunConfig, processes: Processes = ALONE, *, resume: bool = False, overwrite: bool = False
) -> Iterator[Run]:  # fmt: skip
    """`Run.create` by the main process, which alone writes into the folder in the block. Raises UserError as that does."""
    run = Run(Path(out))
    processes.wait()  # until all have seen the folder as it was
    with ExitStack() as held:

        def create() -> None:
            run.check_place(resume=resume, overwrite=overwrite)  # and again below, when no other process can change it
            run.prepare()
            held.enter_context(run.locked())
            Run.create(out, config, resume=resume, overwrite=overwrite)

        processes.main_does(create)
        yield run


def complete(
    task: Task, run: Run | None = None, *, listeners: Sequence[Listener] = (), save_every: int = 0, resume: bool = False,
    processes: Processes = ALONE,
) -> str:  # fmt: skip
    """Update a task until it is done, and return why it stopped: "finished", "interrupted", or what a listener said.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP end the update under way; then, as at any end, a checkpoint and the result are written into
    the run's folder, and the loop returns. A second SIGINT stops at once. `resume` goes on from the folder's last checkpoint.
    Raises UserError after `BAD_IN_A_ROW` updates without a finite number or gradient in a row, or where the last update had none,
    with all of that written; and where something cannot be written, with the last checkpoint whole.
    """
    if resume and run:
        load_checkpoint(run, task)
        if len(set(processes.gather([task.step]))) > 1:
            raise UserError(f"not every process finds the checkpoints of {run.folder}; put it on a disk that all of them share")
        processes.main_does(lambda: checkpoints.drop_after(run, task.step))
    with stop_signals() as asked:
        for listener in listeners:
            listener.started()
        with _shown(task, quiet=not processes.main) as show:
            reason, bad = _update(task, run if processes.main else None, listeners, save_every, processes, show, asked)
        if run and processes.main:
            checkpoints.save(run, task.step, *task.state())
            task.save(run.folder)
            run.write_text("stopped.txt", f"{reason} at update {task.step}\n")
    for listener in listeners:
        listener.finished(reason)
    processes.wait()
    if bad and reason in ("bad updates", "finished"):
        which = "the last update" if bad == 1 else f"the last updates, {bad} times,"
        where = f"; the last good state is in {run.folder}" if run else ""
        raise UserError(
            f"{which} had a NaN or Inf {task.watched} or gradient, or led to one{where}; lower lr, or look at the {task.watched}"
        )
    return reason


def _update(
    task: Task, run: Run | None, listeners: Sequence[Listener], save_every: int, processes: Processes,
    show: Callable[[Row, str], None], asked: Callable[[], bool],
) -> tuple[str, int]:  # fmt: skip
    """Update to the end, or until somebody has a reason to stop, which is returned; and how many bad updates were the last."""
    bad, good, interrupted = 0, True, lambda: "interrupted" if asked() else None
    reason = processes.agree(interrupted())
    while reason is None and task.step < task.total:
        label = task.label
        with drawing(derive(task.seed, "update", task.step, processes.index)):
            row = task.update()
            said = [listener.updated(row) for listener in listeners]
        before, good = good, math.isfinite(row[task.watched]) and math.isfinite(row["grad_norm"]) and not row.get("taken_back")
        if before and good:  # one that follows a bad one may still be taken back
            bad = 0
        bad += not good
        if run:
            run.log(row)
            if save_every and task.step % save_every == 0:
                checkpoints.save(run, task.step, *task.state())
        show(row, label)
        mine = "bad updates" if bad >= BAD_IN_A_ROW else interrupted() or next(filter(None, said), None)
        reason = processes.agree(mine)  # a signal may have reached one of the processes only
    return reason or "finished", bad if reason == "bad updates" else bad * (not good)


def load_checkpoint(run: Run, task: Task) -> None:
    """Continue from the last checkpoint that is whole, if there is one.

    Raises UserError if there are some and none is whole, or when it is of another task.
    """
    found = next(checkpoints.intact(run), None)
    if found:
        folder, tensors, state = found
        try:
            task.restore(tensors, state)
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint {folder} belongs to another adapter or version; start a new run") from error
    elif run.checkpoints():
        raise UserError(f"no checkpoint of {run.folder} is whole; start it again with overwrite, or choose another out")


# Ctrl-C, and what schedulers and closed terminals send before they kill; there is no SIGHUP on Windows.
STOPS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block STOPS only ask to stop, which the value tells; a SIGINT after that stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before: dict[signal.Signals, Any] = {}
    try:
        for each in STOPS:
            before[each] = signal.signal(each, ask)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield lambda: asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def progress_bar(watched: str, quiet: bool = False) -> Progress:
    """A bar on stderr with the updates, a number (the reward, the loss), speed, elapsed and remaining time."""
    return Progress(
        TextColumn("[bold]{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
        TextColumn(watched + " [bold]{task.fields[value]}"), TextColumn("{task.fields[speed]} images/s"),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=Console(stderr=True, quiet=quiet),
    )  # fmt: skip


@contextmanager
def _shown(task: Task, quiet: bool) -> Iterator[Callable[[Row, str], None]]:
    """A progress bar of a task; the value shows a row under a label. The number is averaged over about the last ten."""
    smooth: float | None = None
    with progress_bar(task.watched, quiet) as bar:
        line = bar.add_task(task.label, total=task.total, completed=task.step, value="-", speed="-")

        def show(row: Row, label: str) -> None:
            nonlocal smooth
            value, speed = row[task.watched], task.batch / row["seconds"]
            if math.isfinite(value):
                smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
            said = "-" if smooth is None else f"{smooth:.4g}"
            bar.update(line, description=label, total=task.total, completed=task.step, value=said, speed=f"{speed:.1f}")

        yield show
