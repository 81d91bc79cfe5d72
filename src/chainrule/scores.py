"""The scores of every image of an evaluation, saved as they are made, so that one that was cut off goes on. No torch here.

    scores.jsonl  scores.csv: a line for each image, with its row of the table, prompt, seed, and each reward

In `scores.jsonl` a line also says by what its image was made (`made`, a digest of the settings). An evaluation with the same
settings takes the lines that are there and makes the others; lines of other settings go when it is whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.files import append_text, make_folder, write_text

LINES, TABLE = "scores.jsonl", "scores.csv"


@dataclass(frozen=True, slots=True)
class Score:
    """The scores of one image: its row of the table, its prompt and seed, and each column's value."""

    row: str
    prompt: str
    seed: int
    values: Mapping[str, float]

    @property
    def line(self) -> dict[str, Any]:
        """It as a line of `scores.jsonl` has it; a value that is not finite is null there."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        return {"row": self.row, "prompt": self.prompt, "seed": self.seed, "scores": values}


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores in a folder. `made` says of each row of the table how its images are made: what JSON holds, in any form.

    What changes an image or a score has to be in it, but for the prompt, the seeds and the names of rewards.
    """

    folder: Path
    made: Mapping[str, Mapping[str, Any]]

    def begin(self) -> None:
        """Make the folder, and drop a line that a kill has torn. Raises UserError where it cannot be written."""
        make_folder(self.folder)
        path = self.folder / LINES
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines()))

    def there(self, row: str, prompts: Sequence[str], seeds: Sequence[int], columns: Sequence[str]) -> dict[int, list[Score]]:
        """The scores of a row that are there: by a prompt's place, where it has all columns for all seeds, one for each seed."""
        key, found = self._key(row, seeds), {}
        for line in self._lines():
            values = line.get("scores")
            if line.get("row") == row and line.get("made") == key and isinstance(values, dict) and set(columns) <= set(values):
                kept = {name: math.nan if values[name] is None else values[name] for name in columns}
                found[line.get("prompt"), line.get("seed")] = Score(row, str(line.get("prompt")), int(line.get("seed") or 0), kept)
        every = {at: [found.get((prompt, seed)) for seed in seeds] for at, prompt in enumerate(prompts)}
        return {at: [each for each in scores if each] for at, scores in every.items() if all(scores)}

    def extend(self, scores: Sequence[Score], seeds: Sequence[int]) -> None:
        """Add the scores of images that were made."""
        append_text(self.folder / LINES, self._text(scores, seeds))

    def finish(self, scores: Sequence[Score], seeds: Sequence[int]) -> None:
        """Write these scores, in their order, and the same as CSV. Other prompts' of the same rows, which are there, stay."""
        mine, keys = {(score.row, score.prompt, score.seed) for score in scores}, {row: self._key(row, seeds) for row in self.made}
        same = (line for line in self._lines() if (row := line.get("row")) in keys and line.get("made") == keys[row])
        kept = [line for line in same if (line["row"], line.get("prompt"), line.get("seed")) not in mine]
        write_text(self.folder / LINES, self._text(scores, seeds) + "".join(map(_written, kept)))
        write_csv(self.folder / TABLE, scores)

    def _key(self, row: str, seeds: Sequence[int]) -> str:
        told = json.dumps([self.made.get(row), list(seeds)], sort_keys=True)  # diversity depends on the other seeds
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _text(self, scores: Sequence[Score], seeds: Sequence[int]) -> str:
        keys = {row: self._key(row, seeds) for row in {score.row for score in scores}}
        return "".join(_written({**score.line, "made": keys[score.row]}) for score in scores)

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that are there, but for those that are damaged."""
        path, found = self.folder / LINES, []
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
            with suppress(ValueError, RecursionError):
                line = json.loads(text)
                found += [line] if isinstance(line, dict) else []
        return found


def _written(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_csv(path: str | Path, scores: Sequence[Score]) -> None:
    """Write scores as CSV: row, prompt, seed, and a column for each reward; a value that is not finite is left empty."""
    columns = list(scores[0].values) if scores else []
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["row", "prompt", "seed", *columns])
    for score in scores:
        values = (score.values[name] for name in columns)
        lines.writerow([score.row, score.prompt, score.seed, *(value if math.isfinite(value) else "" for value in values)])
    write_text(path, text.getvalue())
