"""A run is a folder: its config, environment, metrics, samples, checkpoints, adapter and report. No torch here.

    config.yaml  environment.json  metrics.jsonl  plan.txt  evaluation.json  report.html
    adapter/  checkpoints/step-000123/  samples/

The folder is the truth and `Run` only a name for it, so a run is opened by `Run(folder)` on any machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from chainrule.config import AnyConfig, RunConfig, difference, plain, read_config
from chainrule.errors import UserError

PACKAGES = ("chainrule", "torch", "diffusers", "transformers", "peft", "accelerate")
DIGITS = 6  # significant digits of a float in metrics.jsonl


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
        missing folder starts afresh); `overwrite` deletes the run that is there. Raises UserError, before anything is written,
        for a used folder without either, a file, a place that cannot be written, or a config that differs.
        """
        run = cls(Path(folder))
        text = config.text()
        used = run.check_place(resume=resume, overwrite=overwrite)
        if used and resume:
            run._check_same(config)
        elif used:
            run._empty()
        run._prepare()
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
        used = self.folder.is_dir() and any(self.folder.iterdir())
        if used and resume:
            _ = self.config
        elif used and overwrite:
            if not all((self.folder / name).is_file() for name in ("config.yaml", "environment.json")):
                raise UserError(f"will not overwrite {self.folder}: it does not look like a run; choose another out")
        elif used:
            raise UserError(f"{self.folder} is not empty; pass resume to continue it, overwrite, or another out")
        return used

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

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`. Floats keep 6 significant digits; NaN and infinities become null."""
        path = self.folder / "metrics.jsonl"
        line = json.dumps(_rounded(plain(row, "metrics")), allow_nan=False) + "\n"
        if _ends_in_a_torn_line(path):
            self._write_metrics(self.metrics())
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, oldest first. A last line torn by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = []
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                if index == len(lines) - 1:
                    break
                raise UserError(f"{path}: line {index + 1} is not a JSON object; delete that line") from error
        return rows

    def truncate(self, step: int) -> None:
        """Drop the metrics of later steps, so that a resumed run holds each step once."""
        if (self.folder / "metrics.jsonl").is_file():
            self._write_metrics([row for row in self.metrics() if row.get("step", 0) <= step])

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
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, path)
        return path

    def _write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}; choose another out") from error

    def _empty(self) -> None:
        try:
            for path in self.folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            raise UserError(f"cannot overwrite {self.folder}: {error.strerror or error}; choose another out") from error

    def _check_same(self, config: RunConfig) -> None:
        if found := difference(self.config.values(), config.values(), config.CHANGEABLE):
            key, before, now = found
            raise UserError(
                f"cannot resume {self.folder}: {key} was {before!r} and is now {now!r}; "
                "put it back, or start another run with another out"
            )


def environment() -> dict[str, Any]:
    """Python, platform, date and the versions of the packages that matter (null: not installed), none imported."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    date = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return {"date": date, "python": platform.python_version(), "platform": platform.platform(), **versions}


def check_folder(folder: Path) -> None:
    """The nearest thing that exists on the way to an output folder has to be a folder. Raises UserError if not."""
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            raise UserError(f"{place} is a file, so {folder} cannot be a folder; choose another out")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _ends_in_a_torn_line(path: Path) -> bool:
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
