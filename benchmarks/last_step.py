"""Where the trained chain ends: on `alphas_cumprod[0]`, as Stable Diffusion 1.x samples, or on the clean prediction.

    python -m benchmarks.last_step [--out build/last-step]

DRaFT-1 and DRaFT-LV are trained with either end, on the same prompts and noise; all are evaluated as the pipeline samples.
Prints each gain over the base model, and DRaFT-LV's over DRaFT-1 at the same seed. Resumable: a run that is evaluated is not
made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import chainrule as cr
from chainrule.estimate import Estimate
from chainrule.files import write_text
from chainrule.methods import DRaFT, DRaFTLV, Method

METHODS: dict[str, Method] = {"DRaFT-1": DRaFT(1), "DRaFT-LV": DRaFTLV(2)}
ENDS = {"alphas_cumprod[0]": False, "clean prediction": True}
SEEDS = range(4)
STEPS = 20
REWARD, HELD_OUT = "pickscore:tiny", "hpsv2:tiny"


def gains(folder: Path, method: Method, end: bool, seed: int) -> dict[str, float]:
    """The gains of one run on prompts it was not trained on, as the pipeline itself samples."""
    found = folder / "gains.json"
    if not found.is_file():
        model = cr.load("tiny-emoji")
        run = cr.finetune(
            model.solving(None, {"set_alpha_to_one": end}), method, REWARD, "animals:train", updates=20, batch=4, lr=2e-3,
            sample_steps=STEPS, seed=seed, sample_every=0, save_every=0, out=folder / "run", overwrite=True,
        )  # fmt: skip
        table = cr.evaluate(
            {"base": model, "tuned": model.using(run.adapter)}, "animals:test", [REWARD, HELD_OUT], seeds=range(100, 104),
            steps=STEPS,
        )  # fmt: skip
        write_text(found, json.dumps({name: gain.mean for name, gain in table.gains["tuned"].items()}) + "\n")
    return dict(json.loads(found.read_text(encoding="utf-8")))


def main() -> None:
    """Make the runs that are missing, and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/last-step"))
    out = parser.parse_args().out
    made = {
        (end, name, seed): gains(out / f"{name}-{'clean' if lands else 'first'}-{seed}", method, lands, seed)
        for seed in SEEDS
        for name, method in METHODS.items()
        for end, lands in ENDS.items()
    }
    for reward in (REWARD, HELD_OUT):
        for end in ENDS:
            by = {name: [made[end, name, seed][reward] for seed in SEEDS] for name in METHODS}
            rows = {name: Estimate.of(values) for name, values in by.items()}
            ahead = Estimate.of([lv - one for one, lv in zip(by["DRaFT-1"], by["DRaFT-LV"], strict=True)])
            print(f"{reward}, trained to {end}:", *(f"{name} {row}," for name, row in rows.items()), f"LV - DRaFT-1 {ahead}")


if __name__ == "__main__":
    main()
