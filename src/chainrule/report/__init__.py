"""Writes a self-contained HTML page about a run, or one about several. Needs no torch.

The page leaves out what the run folder does not hold.
"""

from __future__ import annotations

from pathlib import Path

from chainrule.errors import UserError
from chainrule.report.compare import compared
from chainrule.report.material import gather
from chainrule.report.page import render
from chainrule.report.pictures import before_after, cells, grid
from chainrule.runs import Run

__all__ = ["before_after", "cells", "grid", "report"]


def report(folder: str | Path, *others: str | Path) -> Path:
    """Write `report.html` into a run folder, or with `others` `compared.html` about all of them, and return its path.

    Raises UserError if there is nothing of a run in a folder, a file of it cannot be read, or a run is given twice.
    """
    runs = [Run(Path(each)) for each in (folder, *others)]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError(f"a run is given twice: {', '.join(str(run.folder) for run in runs)}")
    found = [gather(run) for run in runs]
    if others:
        return runs[0].write_text("compared.html", compared(found))
    return runs[0].write_text("report.html", render(found[0]))
