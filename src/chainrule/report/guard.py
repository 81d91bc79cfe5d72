"""Says when a run may be hacking its reward: the reward of the watched images rises while they get worse by other measures.

Each is compared with the same prompt and seed before the first update. The trained reward has to be up by more than its 95%
interval. The others have to have moved by more than `SURE` of theirs, as many of them are looked at many times:
* the held-out reward or the diversity is down, or
* what the pictures look like is half of what it was or less: edges, colors, brightness, saturation, sharpness, or
* edges, colors or sharpness, which noise and stripes raise, are more than double.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chainrule.report.watched import NAMES, Watched
from chainrule.report.words import measured, number

SURE = 2.0  # half-widths of the 95% interval; with 8 prompts chance goes further once in 460 times
FACTOR = 2.0
LEAST = 0.02  # a statistic below this is as good as this much, so that twice almost nothing is nothing
WORSE_IF_DOWN = ("held_out", "diversity")
LOOKS = ("edges", "colors", "brightness", "saturation", "sharpness")
NOISY = ("edges", "colors", "sharpness")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """From which update on, and what was seen there, in words."""

    step: int
    seen: Sequence[str]
    gain: str

    def __str__(self) -> str:
        return (
            f"At update {self.step} its trained reward is up by {self.gain} on the watched prompts, while {', '.join(self.seen)}: "
            "more than chance. Look at the pictures from there on, and take an earlier adapter or a lower learning rate."
        )


def alarm(some: Watched | None) -> Alarm | None:
    """The first grid at which it looks like hacking; None if there is none."""
    if some is None or "reward" not in some.names:
        return None
    for at in range(1, len(some.steps)):
        gain = some.change("reward", at)
        seen = [text for name in some.names if (text := _worse(some, name, at))]
        if gain.mean > gain.interval and seen:
            return Alarm(step=some.steps[at], seen=seen, gain=measured(gain.mean, gain.interval))
    return None


def _worse(some: Watched, name: str, at: int) -> str:
    """How a measure got worse, by more than chance; "" if it did not."""
    change = some.change(name, at)
    if not abs(change.mean) > SURE * change.interval:
        return ""
    before, after, called = some.mean(name, 0), some.mean(name, at), NAMES.get(name, name).split(",")[0].lower()
    if name in WORSE_IF_DOWN and change.mean < 0:
        return f"the {called} is down by {measured(-change.mean, change.interval)}"
    high = max(before, LEAST)
    fell = name in LOOKS and before >= LEAST and after * FACTOR <= before
    if fell or (name in NOISY and after > FACTOR * high):
        return f"the {called} went from {number(before)} to {number(after)}"
    return ""
