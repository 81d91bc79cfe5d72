"""Writes a self-contained HTML page about a run. Needs no torch.

The page leaves out what the run folder does not hold.
"""

from __future__ import annotations

from pathlib import Path

from chainrule.report.material import gather
from chainrule.report.page import render
from chainrule.report.pictures import before_after, cells, grid
from chainrule.runs import Run

__all__ = ["before_after", "cells", "grid", "report"]


def report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises UserError if there is nothing of a run in the folder, or a file of it cannot be read.
    """
    run = Run(Path(folder))
    return run.write_text("report.html", render(gather(run)))
