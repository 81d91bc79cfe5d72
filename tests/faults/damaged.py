"""Damaged files in the folder of a run that was killed: it goes on to the same adapter, or says why not in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

from tuned import differences, outcome

from faults.runs import METHODS, resumed, undisturbed, work
from faults.trial import run

FILES = (
    "config.yaml", "environment.json", "metrics.jsonl", "checkpoints/step-000004/state.json",
    "checkpoints/step-000004/state.safetensors", "checkpoints/step-000002/state.safetensors", "samples/before.png", "plan.txt",
)  # fmt: skip
TRIES = 30


def _flipped(data: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes, Random], bytes | None]] = {
    "gone": lambda data, rng: None, "empty": lambda data, rng: b"", "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "noise": lambda data, rng: rng.randbytes(len(data)), "flipped": _flipped, "longer": lambda data, rng: data + rng.randbytes(64),
}  # fmt: skip


def damaged(method: str, name: str, how: str, number: int, root: Path, folder: Path) -> None:
    """One file of a run that was killed after its fifth update."""
    run(work(method, root, folder / "run", die=5), folder / "said.txt")
    place = folder / "run" / name
    now = DAMAGE[how](place.read_bytes(), Random(number))
    if now is None:
        place.unlink()
    else:
        place.write_bytes(now)
    shutil.copy(place, folder / "damaged") if place.exists() else None
    ended = resumed(method, root, folder)
    if ended.code:
        ended.check_one_line()
        return
    own = Path(name).name
    found = [each for each in differences(outcome(folder / "run"), undisturbed(method, root)[0]) if own not in each]
    # A picture of the beginning cannot be made again, and is not on the sheet that it is half of.
    found = [each for each in found if not (own == "before.png" and "before_after" in each)]
    # The card shows that sheet, and says what the rows that are left say.
    found = [each for each in found if not (own in ("before.png", "metrics.jsonl") and each.endswith("README.md"))]
    assert not found, f"different: {found[:5]}"


def trials(root: Path) -> Iterator[tuple[str, str, partial[None]]]:
    """(kind, name, what is tried in a folder)."""
    every = [(method, name, how) for method in METHODS for name in FILES for how in DAMAGE]
    for number, (method, name, how) in enumerate(Random(0).sample(every, TRIES)):
        yield "a damaged file", f"{method} {name} {how}", partial(damaged, method, name, how, number, root)
