"""A blind preference study: pictures in pairs on one page, votes in files, win rates (ShortFT, arXiv:2507.22604, Fig. 9).

The page knows pairs and sides only. Which contestant is on which side is in `key.json`, which stays with who counts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainrule.errors import UserError
from chainrule.estimate import wilson
from chainrule.files import make_folder, write_text
from chainrule.vote.page import Pair, render

if TYPE_CHECKING:
    from PIL import Image

PAGE, KEY = "vote.html", "key.json"
QUESTION = "Which picture do you prefer?"
SIDES = ("left", "right", "none")


def study(
    pictures: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], out: str | Path, *, question: str = QUESTION,
    seed: int = 0,
) -> Path:  # fmt: skip
    """Write the page and its key into a folder, and return the page's path.

    `pictures` are every contestant's, one for each prompt of `prompts`, made from the same seeds. Every two contestants meet at
    every prompt, in an order and on sides drawn from `seed`. Raises UserError for fewer than two contestants.
    """
    if len(pictures) < 2:
        raise UserError("a study needs at least two contestants to compare")
    if any(len(each) != len(prompts) for each in pictures.values()):
        raise UserError("a study needs one picture of every contestant for each prompt")
    rng = random.Random(seed)
    sides = [(i, rng.sample(two, 2)) for two in itertools.combinations(pictures, 2) for i in range(len(prompts))]
    rng.shuffle(sides)
    meetings = [(i, left, right) for i, (left, right) in sides]
    shown = [Pair(prompts[i], pictures[left][i], pictures[right][i]) for i, left, right in meetings]
    key = [{"prompt": prompts[i], "left": left, "right": right} for i, left, right in meetings]
    told = json.dumps({"question": question, "pairs": key, "seed": seed}, ensure_ascii=False, indent=1)
    name = hashlib.sha256(told.encode()).hexdigest()[:12]
    folder = make_folder(out)
    write_text(folder / PAGE, render(shown, name, question))
    write_text(folder / KEY, json.dumps({"study": name, **json.loads(told)}, ensure_ascii=False, indent=1) + "\n")
    return folder / PAGE


@dataclass(frozen=True, slots=True)
class Outcome:
    """How often one contestant was preferred to another, by how many people, and how often neither was."""

    first: str
    second: str
    wins: int
    losses: int
    neither: int
    people: int

    @property
    def rate(self) -> float:
        """The share of decided votes for the first."""
        return self.wins / (self.wins + self.losses)

    def __str__(self) -> str:
        decided = self.wins + self.losses
        if not decided:
            return f"{self.first} or {self.second}: no vote decided"
        low, high = wilson(self.wins, decided)
        return (
            f"{self.first} over {self.second}: {100 * self.rate:.1f}% ({100 * low:.1f} to {100 * high:.1f}) of {decided} votes, "
            f"{self.neither} for neither, {self.people} {'person' if self.people == 1 else 'people'}"
        )


def count(folder: str | Path, files: Sequence[str | Path]) -> list[Outcome]:
    """Who won, for every two contestants of a study, over the votes of all people.

    The interval is Wilson's, which takes votes for independent. Raises UserError for files that are damaged, of another study,
    or of one person twice.
    """
    key = _read(Path(folder) / KEY, ("study", "pairs"))
    votes: dict[str, Mapping[str, str]] = {}
    for file in files:
        told = _read(Path(file), ("study", "voter", "votes"))
        if told["study"] != key["study"]:
            raise UserError(f"the votes in {file} are of another study than {Path(folder) / KEY}")
        if told["voter"] in votes:
            raise UserError(f"{file} is of a person whose votes are in another of the files; give the latest one alone")
        for number, side in told["votes"].items():
            if side not in SIDES or not number.isdecimal() or int(number) >= len(key["pairs"]):
                raise UserError(f"{file} is damaged: it has the vote {side!r} on pair {number!r}")
        votes[told["voter"]] = told["votes"]
    if not votes:
        raise UserError("no votes to count: give the files that people saved")
    names = dict.fromkeys(name for pair in key["pairs"] for name in sorted((pair["left"], pair["right"])))
    return [_outcome(first, second, key["pairs"], votes) for first, second in itertools.combinations(sorted(names), 2)]


def _outcome(first: str, second: str, pairs: Sequence[Mapping[str, str]], votes: Mapping[str, Mapping[str, str]]) -> Outcome:
    tally, people = {first: 0, second: 0, "none": 0}, set()
    for voter, given in votes.items():
        for number, side in given.items():
            pair = pairs[int(number)]
            if {pair["left"], pair["right"]} == {first, second}:
                tally["none" if side == "none" else pair[side]] += 1
                people.add(voter)
    return Outcome(first, second, tally[first], tally[second], tally["none"], len(people))


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise UserError(f"{path} is no file of a study: it lacks {', '.join(keys)}")
    return found
