"""Checkpoints in a run's folder: tensors and what JSON can hold, with a checksum over both, so that a torn one is known."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from chainrule.errors import Note
from chainrule.files import make_folder, write_text
from chainrule.runs import Run
from chainrule.tensors import write_tensors

KEPT = 2  # checkpoints: if the last one is torn, there is one before
SUM = "sha256"


def save(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `checkpoints/step-000123`; `state.json` comes last, so a folder that has it is complete. Keeps the last two.

    Raises UserError where it cannot be written; the one before is then whole.
    """
    run.check_there()
    folder = make_folder(run.checkpoint(step))
    data = write_tensors(folder / "state.safetensors", tensors)
    write_text(folder / "state.json", json.dumps({SUM: _sum(data, state), **state}))
    kept = run.checkpoints()[-KEPT:]
    for other in run.folder.glob("checkpoints/step-*"):  # older ones, and what is left of one that a kill kept from being deleted
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)


def intact(run: Run) -> Iterator[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
    """The folders of checkpoints with what is in them, newest first. A torn one is passed over, with a note."""
    for folder in reversed(run.checkpoints()):
        try:
            data = (folder / "state.safetensors").read_bytes()
            tensors, state = load(data), json.loads((folder / "state.json").read_text())
            known = state.pop(SUM, None)  # earlier versions wrote none
            if known and known != _sum(data, state):
                raise ValueError("its checksum is another")
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            warnings.warn(Note(f"the checkpoint {folder} is damaged ({reason}) and is passed over"), stacklevel=2)
        else:
            yield folder, tensors, state


def drop_after(run: Run, step: int) -> None:
    """Delete the checkpoints of later steps, damaged ones as a rule, and the metrics of these steps."""
    for folder in run.checkpoints():
        if folder.name > run.checkpoint(step).name:
            shutil.rmtree(folder, ignore_errors=True)
    run.truncate(step)


def _sum(data: bytes, state: Mapping[str, Any]) -> str:
    return hashlib.sha256(data + json.dumps(state).encode()).hexdigest()
