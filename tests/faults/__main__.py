"""Try every fault that was not tried yet, and print a table: `make faults`.

Results are rows of FOLDER/trials.jsonl; a trial that is there is not made again, so the same command goes on after it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from faults import damaged, disks, inputs, kills, ranks


def tried(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The trials that were made, by kind and name."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(row["kind"], row["name"]): row for row in rows}


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """How many of each kind were tried, survived and failed, in markdown."""
    lines = ["| what happens | tried | survived | failed |", "|:--|--:|--:|--:|"]
    for kind in dict.fromkeys(kind for kind, _ in rows):
        own = [row for (each, _), row in rows.items() if each == kind]
        failed = sum(row["failed"] is not None for row in own)
        lines.append(f"| {kind} | {len(own)} | {len(own) - failed} | {failed} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--folder", type=Path, default=Path("build/faults"), help="where the results are")
    asked.add_argument("--only", default="", help="only trials whose kind or name has this in it")
    options = asked.parse_args()
    torch.set_num_threads(1)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    file, root = folder / "trials.jsonl", folder / "root"
    root.mkdir(exist_ok=True)
    done = tried(file)
    rooms = (inputs, damaged, disks, kills, ranks)
    every: Iterator[tuple[str, str, partial[None]]] = chain.from_iterable(room.trials(root) for room in rooms)
    left = [each for each in every if each[:2] not in done and options.only in f"{each[0]} {each[1]}"]
    for kind, name, trial in track(left, "faults"):
        place, failed = folder / "trial", None
        shutil.rmtree(place, ignore_errors=True)
        try:
            trial(place)
        except AssertionError as error:
            failed = str(error)
            print(f"FAILED {kind}: {name}: {failed}")
        done[kind, name] = {"kind": kind, "name": name, "failed": failed}
        with file.open("a") as rows:
            rows.write(json.dumps(done[kind, name]) + "\n")
    print(table(done))
    raise SystemExit(any(row["failed"] is not None for row in done.values()))


if __name__ == "__main__":
    main()
