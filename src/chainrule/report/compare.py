"""Writes one page about several runs: the same curves, pictures and gains side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from chainrule.estimate import Estimate
from chainrule.report.curves import Curve, bands
from chainrule.report.embedded import figure
from chainrule.report.guard import alarm
from chainrule.report.layout import beside, columns, document, header, section, titled, warning
from chainrule.report.material import Material, seconds, series
from chainrule.report.watched import NAMES, Watched
from chainrule.report.words import duration, flat, measured

COLORS = 6  # of the page's style; more runs use them again
GAINS = ("reward", "held_out", "diversity")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A run of the comparison, its name and its color."""

    name: str
    color: int
    material: Material

    @property
    def watched(self) -> Watched | None:
        """What was measured on the same prompts and seeds."""
        return self.material.watched


def compared(materials: Sequence[Material]) -> str:
    """The whole page as one string."""
    names = [material.folder.resolve().name for material in materials]
    if len(set(names)) < len(names):
        names = [str(material.folder) for material in materials]
    runs = [Named(name=name, color=i % COLORS, material=m) for i, (name, m) in enumerate(zip(names, materials, strict=True))]
    together = alike(runs)
    said = "They were watched on the same prompts and seeds, from the same images before the first update."
    if not together:
        said = "They were not watched on the same prompts, seeds and base model, so compare their gains, not their values."
    body = "\n".join(
        [
            header("chainrule", f"{len(runs)} runs compared", said),
            _legend(runs),
            *(warning(f"{run.name} may be hacking its reward.", str(found)) for run in runs if (found := alarm(run.watched))),
            "<main>",
            section("Gains", _gains(runs, together)),
            section("By update", _curves(runs, "update", lambda run, step: step)),
            section("By seconds", _curves(runs, "second of training", _spent)),
            section("Pictures", _pictures(runs, together)),
            section("Settings that differ", _settings(runs)),
            "</main>",
        ]
    )
    return document(", ".join(names), body)


def alike(runs: Sequence[Named]) -> bool:
    """Whether all were watched on the same prompts and seeds, from a base model that made the same images of them."""
    first = runs[0].watched
    if first is None or any(run.watched is None for run in runs):
        return False
    looks = [name for name in first.values if name not in ("reward", "held_out")]
    return all(
        list(run.watched.prompts) == list(first.prompts)
        and all(list(run.watched.values.get(name, [[]])[0]) == list(first.values[name][0]) for name in looks)
        for run in runs[1:]
        if run.watched
    )


def _legend(runs: Sequence[Named]) -> str:
    items = []
    for run in runs:
        config = run.material.config
        reward = getattr(config, "reward", None)
        what = f": {config.model}, trained for {reward}" if config and reward else ""
        items.append(f'<li><i class="c{run.color}"></i>{escape(run.name + what)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _gains(runs: Sequence[Named], together: bool) -> str:
    """A row for each run, and where they can be compared image by image, how much the others gained over the first."""
    watched = [name for name in GAINS if any(run.watched and name in run.watched.names for run in runs)]
    evaluated = list(dict.fromkeys(key for run in runs for key in run.material.gains))
    head = ["", "updates", "time", *(NAMES[name] for name in watched), *(f"evaluated: {key}" for key in evaluated)]
    rows = []
    for run in runs:
        spent = seconds(run.material.rows)
        cells = [run.name, str(len(run.material.rows)), duration(spent) if spent is not None else ""]
        cells += [_gain(run.watched, name) for name in watched]
        gains = run.material.gains
        rows.append([*cells, *(measured(*gains[key], signed=True) if key in gains else "" for key in evaluated)])
    if together:
        rows += [
            [f"{run.name} over {runs[0].name}", "", "", *(_over(runs[0], run, name) for name in watched), *("" for _ in evaluated)]
            for run in runs[1:]
        ]
    said = "Changes from the first to the last update on the watched prompts, with 95% intervals over them"
    other = "; then those of chainrule eval, on its own prompts" if evaluated else ""
    return f"<p>{said}{other}.</p>{columns(head, rows)}"


def _gain(some: Watched | None, name: str) -> str:
    if some is None or name not in some.names:
        return ""
    found = some.change(name)
    return measured(found.mean, found.interval, signed=True)


def _over(first: Named, other: Named, name: str) -> str:
    """How much higher the other run's last images are, by prompt. A reward has to be the same one in both."""
    a, b = first.watched, other.watched
    if a is None or b is None or name not in a.names or name not in b.names:
        return ""
    if list(a.values[name][0]) != list(b.values[name][0]):
        return ""
    found = Estimate.of([y - x for x, y in zip(a.column(name, -1), b.column(name, -1), strict=True)])
    return measured(found.mean, found.interval, signed=True)


def _curves(runs: Sequence[Named], across: str, at: Callable[[Named, float], float]) -> str:
    names = list(dict.fromkeys(name for run in runs if run.watched for name in run.watched.names))
    charts = []
    for name in names:
        curves = [
            Curve(
                points=[(at(run, step), mean, half) for step, mean, half in run.watched.curve(name)], name=run.name, color=run.color
            )
            for run in runs
            if run.watched and name in run.watched.names
        ]
        title = NAMES.get(name, name)
        charts.append(titled(title, bands(curves, title=title, across=across, start=False)))
    return beside(charts)


def _spent(run: Named, step: float) -> float:
    """The seconds of training up to an update."""
    return sum(value or 0.0 for number, value in series(run.material.rows, "seconds") if number <= step)


def _pictures(runs: Sequence[Named], together: bool) -> str:
    """The sheets of equal seeds: before once, if all began alike, then after for each."""
    parts = []
    for run in runs:
        folder = run.material.folder / "samples"
        if not together or run is runs[0]:
            parts.append(figure(folder / "before.png", "Before the first update, of all" if together else f"{run.name}, before"))
        parts.append(figure(folder / "after.png", f"{run.name}, after {len(run.material.rows)} updates"))
    parts += [
        figure(
            run.material.folder / "samples" / "unseen.png",
            f"{run.name}, prompts that it was not trained on: above before, below after",
        )
        for run in runs
    ]
    return f'<div class="pair">{"".join(parts)}</div>' if any(parts) else ""


def _settings(runs: Sequence[Named]) -> str:
    """The settings of which not all runs have the same."""
    values = [flat(run.material.config.values()) if run.material.config else {} for run in runs]
    keys = list(dict.fromkeys(key for each in values for key in each))
    rows = [[key, *(each.get(key, "") for each in values)] for key in keys if len({each.get(key, "") for each in values}) > 1]
    return columns(["", *(run.name for run in runs)], rows) if rows else ""
