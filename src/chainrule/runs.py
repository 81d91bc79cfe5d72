"""A run is a folder: its config, environment, metrics, samples, checkpoints, adapter and report. No torch here.

    config.yaml  environment.json  metrics.jsonl  watched.jsonl  plan.txt  report.html
    evaluation.json  scores.jsonl  scores.csv
    adapter/  checkpoints/step-000123/  samples/

The folder is the truth and `Run` only a name for it, so a run is opened by `Run(folder)` on any machine. What a run may write
is known by name (`WRITES`), so that replacing a run deletes nothing else.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from chainrule import display, rows
from chainrule.config import AnyConfig, RunConfig, difference, read_config
from chainrule.environment import environment
from chainrule.errors import UserError
from chainrule.files import write_text

METRICS, WATCHED = "metrics.jsonl", "watched.jsonl"
LOCK = ".lock"
PART = re.compile(r"(.*/)?\.[^/]+\.part")  # what a kill left of a file
WRITES = re.compile(
    r"""(config\.yaml | environment\.json | (metrics|watched)\.jsonl | plan\.txt | stopped\.txt | (report|compared)\.html
    | evaluation\.json | scores\.(jsonl|csv) | experiment\.yaml | steered\.json | best\.png | shortcut\.(md|png) | \.lock
    | (adapter|best|learned)/(learned/)?([\w.-]+/)?[\w-]+\.(safetensors|json) | (adapter|best)/(README\.md|before_after\.png)
    | checkpoints/step-\d+/state\.(safetensors|json)
    | samples/(before|after|before_after|unseen|unseen-before|step-\d+)\.png | images/\d+(-before)?\.png
    | trackers/.*)""",
    re.X,
)
"""The files a run writes, by their places in its folder."""


@dataclass(frozen=True)
class Run:
    """One run folder. Opening it reads nothing; `Run.create` makes or resumes one."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @classmethod
    def create(cls, folder: str | Path, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> Run:
        """Make the folder and write `config.yaml` and `environment.json`.

        `resume` continues the run in the folder if it has the same config apart from its `CHANGEABLE` keys (an empty or
        missing folder starts afresh); `overwrite` deletes the run that is there, and nothing that is not a run's. Raises
        UserError, before anything is written, for a used folder without either, a file, a place that cannot be written, or
        a config that differs.
        """
        run = cls(Path(folder))
        text = config.text()
        used = run.check_place(resume=resume, overwrite=overwrite)
        if used and resume:
            run._check_same(config)
        run.prepare()
        run._delete(PART)
        if used and not resume:
            run._delete(WRITES)
        now = environment()
        if used and resume:
            first = run.environment or now
            now = {**first, "resumed": [*first.get("resumed", []), now]}
        # config.yaml last: with it there, the folder is whole and counts as a run
        run.write_text("environment.json", json.dumps(now, indent=2) + "\n")
        run.write_text("config.yaml", text)
        return run

    def check_place(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Whether something is in the folder already. Raises UserError if a run cannot be put there; touches nothing."""
        if resume and overwrite:
            raise UserError(f"resume and overwrite were both asked for {self.folder}; choose one")
        check_folder(self.folder)
        if (self.folder / LOCK).exists():
            with self.locked():
                pass
        there = self._files()
        if all(path in ("environment.json", LOCK) or PART.fullmatch(path) for path in there):
            return False  # nothing, or a run that was killed before it had its config
        if resume:
            _ = self.config
        elif not overwrite:
            raise UserError(f"{self.folder} is not empty; pass resume to continue it, overwrite, or another out")
        elif "environment.json" not in there:  # the first file of a run
            raise UserError(f"will not overwrite {self.folder}: it does not look like a run; choose another out")
        elif foreign := next((path for path in there if not (WRITES.fullmatch(path) or PART.fullmatch(path))), None):
            raise UserError(f"will not overwrite {self.folder}: no run wrote {foreign}; move it away, or choose another out")
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In the block this process writes into the folder, which must be there, and no other may.

        Raises UserError if another one does. A process that was killed leaves no lock.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / LOCK, blocking=False, is_singleton=True)  # once for this process
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing to {self.folder}; wait until it has ended, or choose another out"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}; choose another out") from error
        except NotImplementedError:  # a file system that has no locks
            pass
        try:
            yield
        finally:
            lock.release()

    def _repr_html_(self) -> str:
        """In a notebook: the pictures before and after, and where the adapter is."""
        pair = self.samples / "before_after.png"
        shown = display.picture(pair.read_bytes(), "before and after training") if pair.is_file() else ""
        return f"{shown}<p>adapter: <code>{escape(str(self.adapter))}</code></p>"

    @property
    def adapter(self) -> Path:
        """The trained adapter, in the form that diffusers' `load_lora_weights` reads."""
        return self.folder / "adapter"

    @property
    def samples(self) -> Path:
        """Sample pictures: `before.png`, `after.png`, `before_after.png`, `step-000040.png`."""
        return self.folder / "samples"

    @property
    def config(self) -> AnyConfig:
        """The resolved config, read from `config.yaml`: a `FinetuneConfig`, `DistillConfig` or `SteerConfig`."""
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise UserError(f"{self.folder} is not a run folder: it has no config.yaml")
        return read_config(path)

    @property
    def environment(self) -> dict[str, Any]:
        """The environment the run was started in, or {} if none was written; `resumed` lists later ones."""
        path = self.folder / "environment.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not readable JSON: {error}") from error
        return found if isinstance(found, dict) else {}

    def note(self, values: Mapping[str, str]) -> None:
        """Add to `environment.json` what is known only when the work begins. Raises UserError where it cannot be written."""
        self.check_there()
        self.write_text("environment.json", json.dumps({**self.environment, **values}, indent=2) + "\n")

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, flushed to disk. Raises UserError where it cannot be written.

        Floats keep 6 significant digits; NaN and infinities become null.
        """
        self.check_there()
        rows.append(self.folder / METRICS, row)

    def write_metrics(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Put these rows in the place of those in `metrics.jsonl`, in one move."""
        rows.write(self.folder / METRICS, found)

    def check_there(self) -> None:
        """Raises UserError if the folder is no longer the run it was, so that nothing is written into another or a new one."""
        if not (self.folder / "config.yaml").is_file():
            raise UserError(
                f"the run {self.folder} is no longer there; if it was moved, its last checkpoint is with it: resume it there"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, oldest first. A last line torn by a kill is left out."""
        return rows.read(self.folder / METRICS)

    def watch(self, row: Mapping[str, Any]) -> None:
        """Append one line to `watched.jsonl`, or put it in the place of that of the same step. As `log`."""
        self.check_there()
        if any(other.get("step") == row["step"] for other in self.watched()):
            rows.keep_to(self.folder / WATCHED, row["step"] - 1)
        rows.append(self.folder / WATCHED, row)

    def watched(self) -> list[dict[str, Any]]:
        """The rows of `watched.jsonl`, oldest first: what was measured on the same prompts and seeds, one row for each grid.

        step, prompts, trained (whether each is among those of the run), extra (how many at the end are of the first and the last
        grid alone), and values {name: a number for each prompt}: reward, held_out, and those of `appearance.STATISTICS`.
        """
        return rows.read(self.folder / WATCHED)

    def truncate(self, step: int) -> None:
        """Drop the metrics of later steps, and what was watched there, so that a resumed run holds each step once."""
        for name in (METRICS, WATCHED):
            rows.keep_to(self.folder / name, step)

    def checkpoint(self, step: int) -> Path:
        """The folder of one step's checkpoint. Write `state.json` into it last: that marks it complete."""
        return self.folder / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints (those with a `state.json`), by rising step."""
        found = []
        for path in self.folder.glob("checkpoints/step-*"):
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match and (path / "state.json").is_file():
                found.append((int(match[1]), path))
        return [path for _, path in sorted(found)]

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run in one move: a reader sees the old text or the new, never half."""
        write_text(self.folder / name, text)
        return self.folder / name

    def _files(self) -> list[str]:
        """Every file in the folder, by its place in it."""
        found = self.folder.rglob("*") if self.folder.is_dir() else ()
        return sorted(path.relative_to(self.folder).as_posix() for path in found if path.is_symlink() or not path.is_dir())

    def prepare(self) -> None:
        """Make the folder. Raises UserError if it cannot be made or written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}; choose another out") from error
        _check_writable(self.folder, self.folder)

    def _delete(self, what: re.Pattern[str]) -> None:
        """Delete files: `config.yaml` first, as there is no run without it, and last what says that there was one."""
        order = {"config.yaml": 0, "environment.json": 2}
        try:
            for path in sorted(self._files(), key=lambda path: order.get(path, 1)):
                if what.fullmatch(path) and path != LOCK:
                    (self.folder / path).unlink()
        except OSError as error:
            raise UserError(f"cannot overwrite {self.folder}: {error.strerror or error}; choose another out") from error
        for folder in sorted(self.folder.rglob("*/"), reverse=True):
            with suppress(OSError):
                folder.rmdir()

    def _check_same(self, config: RunConfig) -> None:
        if found := difference(self.config.values(), config.values(), config.CHANGEABLE):
            key, before, now = found
            raise UserError(
                f"cannot resume {self.folder}: {key} was {before!r} and is now {now!r}; "
                "put it back, or start another run with another out"
            )


def check_folder(folder: Path) -> None:
    """The nearest thing that exists on the way to an output folder has to be a folder that can be written to.

    Raises UserError if not. Nothing is left behind.
    """
    for place in (folder, *folder.parents):
        if place.is_dir():
            return _check_writable(place, folder)
        if os.path.lexists(place):
            raise UserError(f"{place} is a file, so {folder} cannot be a folder; choose another out")


def _check_writable(place: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another out") from error
