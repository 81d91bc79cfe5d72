"""What is shown as a page within the page: a run's report, and pairs to vote on. Each in a frame of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from chainrule.errors import UserError
from chainrule.report.charts import line
from chainrule.report.material import gather
from chainrule.report.page import render
from chainrule.runs import Run
from chainrule.studio.desk import Asked, Desk, OnCall, Part
from chainrule.studio.shelf import Shelf, chosen
from chainrule.vote import PAGE, QUESTION, count, study

BASE = "(without an adapter)"
MOST_PAIRS = 200


def report(shelf: Shelf, name: str | None) -> str:
    """The report of a run, under way or not, in a frame. Nothing is written. Raises UserError where there is nothing of a run."""
    return _frame(render(gather(Run(chosen("run", name, shelf.runs())))), "report", "")


def curve(points: Sequence[tuple[float, float]]) -> str:
    """A reward's curve over updates, as a drawing."""
    start = points[0][1] if points else None
    return line(points, title="Reward", reference=start, reference_label="before", smoothed=False)


def pairs(shelf: Shelf, name: str | None) -> str:
    """The page of a study, in a frame that keeps its script to itself."""
    place = chosen("study", name, shelf.studies()) / PAGE
    return _frame(place.read_text(encoding="utf-8"), "pairs to vote on", "allow-scripts allow-downloads")


def make_study(
    desk: Desk, name: str | None, asked: Asked, prompts: Sequence[str], seeds: int, contestants: Sequence[str], out: str | None,
    on_call: OnCall = lambda: None,
) -> str:  # fmt: skip
    """Sample every contestant, an adapter or `BASE`, at every prompt and seed, and write the study; returns its name.

    Raises UserError for fewer than two contestants, for none or too many pairs, and for a name that is taken.
    """
    place, seeds_of = desk.shelf.free(out), [asked.seed + k for k in range(seeds)]
    every = [(prompt, seed) for prompt in prompts for seed in seeds_of]
    number = len(every) * len(contestants) * (len(contestants) - 1) // 2
    if len(contestants) < 2:
        raise UserError("a study needs at least two contestants to compare")
    if not 1 <= number <= MOST_PAIRS:
        raise UserError(
            f"these are {number} pairs, but a study made here has 1 to {MOST_PAIRS}; change prompts or images per prompt"
        )
    known = desk.shelf.adapters()
    for each in contestants:
        if each != BASE:
            chosen("adapter", each, known)
    with desk.busy:
        opened = desk.opened(name)
        pictures = {}
        for each in contestants:
            model = desk.used(opened, [] if each == BASE else [Part(each)], asked.steps)
            wanted, noise = [prompt for prompt, _ in every], [seed for _, seed in every]
            pictures[each] = model.sample(wanted, noise, asked.steps, asked.guidance, on_call=on_call)
    study(pictures, [prompt for prompt, _ in every], place, question=QUESTION)
    return place.name


def result(shelf: Shelf, name: str | None, files: Sequence[str | Path]) -> str:
    """Who was preferred to whom, a line for every two contestants. Raises UserError for files that are no votes of the study."""
    return "\n".join(str(outcome) for outcome in count(chosen("study", name, shelf.studies()), files))


def _frame(page: str, title: str, may: str) -> str:
    """A page in a frame of its own origin, which may do nothing but `may`."""
    source = escape(page, quote=True)
    return f'<iframe class="studio-frame" title="{escape(title)}" sandbox="{may}" srcdoc="{source}"></iframe>'
