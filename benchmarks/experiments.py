"""The comparisons of docs/log.md: every method, and DRaFT-K over K, three seeds each, on prompts not trained on.

    python benchmarks/experiments.py              # runs what is missing, then writes docs/experiments.md
    python benchmarks/experiments.py --shard 0/2  # half of the runs, for a second process beside it
    python benchmarks/experiments.py --write      # only the page

Every run trains on `animals:train` with `pickscore:tiny` and is measured on `animals:test` with that reward, with
`hpsv2:tiny` as the held-out judge, and for diversity; gains are paired by prompt and seed with the base model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import chainrule as cr
from chainrule import methods
from chainrule.evaluate import evaluate
from chainrule.rewards import parse

N, BATCH, UPDATES, SEEDS, LR = 50, 4, 20, (0, 1, 2), 2e-3
KEPT = Path("docs/experiments")  # one small file a run, so that what was measured is not measured again
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "DRaFT-1": ("draft", {"k": 1}), "DRaFT-LV": ("draft-lv", {}), "ReFL": ("refl", {}), "SDO": ("sdo", {}),
    "DRTune": ("drtune", {}), "DRaFT-5": ("draft", {"k": 5}), "DRaFT-10": ("draft", {"k": 10}),
    "DRaFT-50": ("draft", {"k": 50}), "DRaFT-30": ("draft", {"k": 30}),
    "LV, one reward gradient": ("draft-lv", {"reuse_reward_gradient": True}),
    "ReFL unguided": ("refl", {"guided": False}), "SDO, 4 calls": ("sdo", {"samples": 4}), "AlignProp": ("alignprop", {}),
}  # fmt: skip
HELD_SEEDS = range(100, 104)
TRAINED, HELD = "pickscore:tiny", "hpsv2:tiny"


def slug(name: str, seed: int) -> str:
    return f"{name.lower().replace(',', '').replace(' ', '-')}-{seed}"


def run_one(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train and measure one method with one seed; the result is kept, so a second call is free."""
    kept = KEPT / f"{slug(name, seed)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model = cr.load("tiny-emoji")
    run = cr.finetune(
        model, methods.make(*NAMES[name]), parse(TRAINED), "animals:train", out=folder, overwrite=True, steps=UPDATES,
        batch=BATCH, lr=LR, sample_steps=N, seed=seed, sample_every=0, save_every=0, watch=["a painting of a fox"],
    )  # fmt: skip
    table = evaluate(
        {"base": model, "tuned": model.using(run.adapter)}, cr.prompts("animals:test"), [parse(TRAINED), parse(HELD)],
        seeds=HELD_SEEDS, steps=20,
    )  # fmt: skip
    gains = table.gains["tuned"]
    result = {
        "trained": gains[TRAINED].mean, "held": gains[HELD].mean, "diversity": gains["diversity"].mean,
        "base": table.rows["base"][TRAINED].mean,
    }  # fmt: skip
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({key: float(f"{value:.5g}") for key, value in result.items()}) + "\n")
    return result


def interval(values: list[float]) -> str:
    """Mean and 95% half width over training seeds (t with two degrees of freedom for three)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    point = {2: 12.71, 3: 4.30}.get(len(values), 1.96)
    return f"{mean:+.3f} ± {point * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """A markdown table, best trained reward first. What an update costs is `make bench`'s business."""
    lines = [
        "| method | gain in trained reward | vs DRaFT-1, same seed | held-out gain | change in diversity | seeds up |",
        "|---|---|---|---|---|---|",
    ]
    first = results.get("DRaFT-1", {})
    for name, rows in sorted(results.items(), key=lambda item: -statistics.mean(r["trained"] for r in item[1].values())):
        gain, held, diversity = (interval([r[key] for r in rows.values()]) for key in ("trained", "held", "diversity"))
        apart = [row["trained"] - first[seed]["trained"] for seed, row in rows.items() if seed in first]
        paired = interval(apart) if apart and name != "DRaFT-1" else ""
        up = f"{sum(r['trained'] > 0 for r in rows.values())} of {len(rows)}"
        lines.append(f"| {name} | {gain} | {paired} | {held} | {diversity} | {up} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--shard", default="0/1", help="i/n: only every n-th run, starting with the i-th")
    parser.add_argument("--write", action="store_true", help="only write the page")
    given = parser.parse_args()
    part, parts = map(int, given.shard.split("/"))
    jobs = [(name, seed) for name in NAMES for seed in SEEDS]
    for name, seed in [] if given.write else jobs[part::parts]:
        print(name, seed, run_one(name, seed, given.out / slug(name, seed)), flush=True)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name, seed in jobs:
        kept = KEPT / f"{slug(name, seed)}.json"
        if kept.exists():
            found.setdefault(name, {})[seed] = json.loads(kept.read_text())
    about = (
        f"N = {N}, batch {BATCH}, {UPDATES} updates, AdamW {LR}, rank 8; trained on {TRAINED}, judged by {HELD}.\n"
        "Gains are over the base model on the 9 held-out animals x 4 seeds; ± is a 95% interval over training\n"
        "seeds, which share prompts and noise between methods.\n"
    )
    Path("docs/experiments.md").write_text(
        f"# Methods compared\n\n`make experiments` writes this page.\n\n{about}\n{table(found)}\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
