"""What steering leaves in its folder: pictures, the curve and a report."""

from __future__ import annotations

import json

from chainrule.files import make_folder, write_picture
from chainrule.report import before_after, report
from chainrule.runs import Run
from chainrule.steer.found import Steered


def save(found: Steered, run: Run) -> None:
    """Write every image before and after, a sheet of both, the best one, `steered.json`, `metrics.jsonl` and `report.html`."""
    for place in (run.folder / "images", run.samples):
        make_folder(place)
    for i, (before, after) in enumerate(zip(found.before, found.images, strict=True)):
        write_picture(run.folder / "images" / f"{i:04d}.png", after)
        write_picture(run.folder / "images" / f"{i:04d}-before.png", before)
    write_picture(run.folder / "best.png", found.best)
    rewards = zip(found.prompts, found.rewards_before, found.rewards, strict=True)
    captions = [f"{prompt} {before:.4g} to {after:.4g}" for prompt, before, after in rewards]
    write_picture(run.samples / "before_after.png", before_after(found.before, found.images, captions))
    run.write_metrics(found.curve)  # the loop's rows are of one batch after the other; the curve is over all of them
    keys = ("prompts", "rewards_before", "rewards", "distances", "updates", "inverted")
    run.write_text("steered.json", json.dumps({key: getattr(found, key) for key in keys}, indent=2) + "\n")
    report(run.folder)
