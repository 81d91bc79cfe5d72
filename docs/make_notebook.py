"""Run examples/start.ipynb and keep its pictures in it: python docs/make_notebook.py. The tests run it without keeping anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "start.ipynb"


def executed(folder: str | Path) -> nbformat.NotebookNode:
    """The notebook as it is after running every cell, with `folder` for what it writes. Raises nbclient's error of a cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    # A kernel that is asked to end was once seen to wait for minutes; there is nothing left for it to do.
    return NotebookClient(notebook, timeout=300, kernel_name="python3", shutdown_kernel="immediate", resources=where).execute()


def kept(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what tells the time or this machine, and without progress bars."""
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.output_type == "execute_result" or each.get("name") == "stdout"]
            for each in cell.outputs:
                each.get("data", {}).pop("image/jpeg", None)  # Pillow offers both
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(kept(executed(folder)), NOTEBOOK)
