"""Says how large a change is, and what else changed: rewards have scales of their own, which no reader knows by heart."""

from __future__ import annotations

import math
import statistics

from chainrule.estimate import Estimate
from chainrule.report.guard import LOOKS, SURE, alarm
from chainrule.report.material import Material, is_diversity
from chainrule.report.watched import NAMES, Watched
from chainrule.report.words import MINUS, number

APART = {
    True: "Diversity is how far the images of one prompt are apart, from 0, all alike, to 1, one black and one white.",
    False: "Diversity is how far an image is from those of the other prompts, from 0, all alike, to 1, one black and one white.",
}


def how_much(material: Material) -> str:
    """Each change as a share of the standard deviation of the values over prompts before training; of diversity in per cent.

    That is Glass's delta, an effect size, which Cohen's rule of thumb (Statistical power analysis, 1988) has words for.
    "" where there is nothing to compare with.
    """
    changes = _evaluated(material) if material.gains else _unseen(material.unseen)
    rewards = [f"{name} {_signed(change / spread, 2)}" for name, (change, _, _, spread) in changes.items() if spread]
    apart = next((some[:3] for name, some in changes.items() if is_diversity(name) and some[2]), None)
    said = ""
    if rewards:
        said = (
            "Each reward has a scale of its own. In units of how much prompts differed before training (one standard deviation), "
        )
        said += f"the change is: {', '.join(rewards)}. By a rule of thumb 0.2 is small, 0.5 medium and 0.8 large."
    if apart:
        change, half, before = apart
        moved = "Its change is not told from chance"
        if abs(change) > half:
            moved = f"It changed by {_signed(100 * change / before, 0)}%"
        said += f" {APART[bool(material.gains)]} {moved}."
    return said.strip()


def also(material: Material) -> str:
    """What the pictures look like now, where it changed by more than chance: of unseen prompts, else of the watched ones."""
    some = material.unseen or material.watched
    if some is None or len(some.steps) < 2 or alarm(material.watched):
        return ""
    found = []
    for name in LOOKS:
        if name in some.names and abs((change := some.change(name)).mean) > SURE * change.interval:
            called = NAMES[name].split(",")[0].lower()
            found.append(f"{called} {number(some.mean(name, 0))} to {number(some.mean(name, -1))}")
    return f"The pictures also look different, by more than chance: {', '.join(found)}." if found else ""


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _evaluated(material: Material) -> dict[str, tuple[float, float, float, float]]:
    """The change of everything that was evaluated with its interval, and the mean and spread before; a spread of 0 is not known."""
    rows = [values for _, values in material.measures if values]
    before = next((values for name, values in material.measures if name == "before"), rows[0] if rows else {})
    count, found = len(material.prompts), {}
    for name, (change, interval) in material.gains.items():
        mean, half = before.get(name, (0.0, 0.0))
        known = count > 1 and half > 0 and not is_diversity(name)
        found[name] = (change, interval, mean, Estimate(mean, half).spread(count) if known else 0.0)
    return found


def _unseen(some: Watched | None) -> dict[str, tuple[float, float, float, float]]:
    names = {"reward": "the trained reward", "held_out": "the held-out reward", "diversity": "diversity"}
    found = {}
    for name, called in names.items():
        if some and name in some.names:
            column = some.column(name, 0)
            spread = statistics.stdev(column) if len(column) > 1 and name != "diversity" else 0.0
            change = some.change(name)
            found[called] = (change.mean, change.interval, some.mean(name, 0), spread if math.isfinite(spread) else 0.0)
    return found
