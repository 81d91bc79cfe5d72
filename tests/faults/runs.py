"""The runs that are disturbed: DRaFT-LV, and ShortFT over its stages, on a small random-weight model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from students import student_file
from tuned import drawn, outcome, tuned

from chainrule.methods import ShortFT
from faults.trial import Ended, Work, run

METHODS = ("draft-lv", "shortft")


@cache
def student(root: Path) -> Path:
    """The student that ShortFT jumps by."""
    return student_file(root / "student", torch.float32)


def work(method: str, root: Path, folder: Path, **options: Any) -> Work:
    """Fine-tune into a folder, with a held-out reward, both of which draw."""
    staged: dict[str, Any] = {"method": ShortFT(k=3), "student": student(root)} if method == "shortft" else {"method": method}
    settings = {"sample_every": 2, "stage_steps": [2, 2, 2] if staged.get("student") else None, **staged, **options}
    return lambda: tuned(folder, drawn, held_out=drawn, **settings)


@cache
def undisturbed(method: str, root: Path) -> tuple[dict[str, Any], float]:
    """What a run leaves that nothing happens to, and the seconds it takes."""
    folder = root / f"undisturbed-{method}"
    ended = run(work(method, root, folder / "run", overwrite=(folder / "run").exists()), folder / "said.txt")
    assert ended.code == 0, ended.said
    return outcome(folder / "run"), ended.seconds


def resumed(method: str, root: Path, folder: Path) -> Ended:
    """The same run, gone on with."""
    return run(work(method, root, folder / "run", resume=True), folder / "resumed.txt")
