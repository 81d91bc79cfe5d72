"""One self-contained HTML page about a run. No torch: it opens anywhere.

Every part of the page is optional; what a run folder does not hold is left out.
"""

from __future__ import annotations

from pathlib import Path

from chainrule.report.material import gather
from chainrule.report.page import render
from chainrule.report.pictures import before_after, grid
from chainrule.runs import Run

__all__ = ["before_after", "grid", "report"]


def report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises UserError if there is nothing of a run in the folder, or a file of it cannot be read.
    """
    run = Run(Path(folder))
    return run.write_text("report.html", render(gather(run)))
