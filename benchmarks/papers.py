"""ShortFT's tables (arXiv:2507.22604) in miniature, on tiny-emoji: at equal wall-clock, three seeds, unseen prompts.

    python benchmarks/papers.py               # runs what is missing, then writes docs/papers.md
    python benchmarks/papers.py --pace        # only the methods' speeds: on a quiet machine, before shards that share it
    python benchmarks/papers.py --shard 0/2   # half of the runs, for a second process beside it
    python benchmarks/papers.py --write       # only the page

Every method gets the updates that fit into the budget at the speed it has on this machine, measured once before all runs and
kept, so that what else the machine does during a run changes nothing. All train on `animals:train` and are measured on
`animals:test`, 50 steps, by the trained reward and its held-out neighbor.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the meter is there, next to the test that relies on it

from experiments import interval
from meter import peak_bytes
from steering import section

import chainrule as cr
from chainrule import methods
from chainrule.adapters import save_bands
from chainrule.evaluate import evaluate
from chainrule.methods import stages
from chainrule.models import Model, bundled
from chainrule.models.students import boundaries
from chainrule.rewards import parse

N, BATCH, LR, RANK, SECONDS, SEEDS = 50, 4, 2e-3, 8, 60.0, (0, 1, 2)
KEPT = Path("docs/papers")  # one small file a run, so that what was measured is not measured again
REWARDS = {"PickScore": "pickscore:tiny", "HPSv2": "hpsv2:tiny", "Symmetry": "4*symmetry + pickscore:tiny + 0.1*hpsv2:tiny"}
MEASURED = {"PickScore": "pickscore:tiny", "HPSv2": "hpsv2:tiny", "Symmetry": "symmetry"}
HELD = {"PickScore": "hpsv2:tiny", "HPSv2": "pickscore:tiny", "Symmetry": "hpsv2:tiny"}
Spec = tuple[str, dict[str, Any]]
TABLE1: dict[str, Spec] = {
    "DRaFT-1": ("draft", {"k": 1}), "DRaFT-LV": ("draft-lv", {}), "DRTune": ("drtune", {}), "SDO": ("sdo", {}),
    "ShortFT": ("shortft", {}),
}  # fmt: skip
TABLE3: dict[str, Spec] = {
    "ShortFT without timestep-aware LoRA": ("shortft", {"shared": True}),
    "ShortFT without progressive training": ("shortft", {"stage": 1}),
}
# What ShortFT's place may come from: three of four equal stages train little, and its adapters are on in 15 of 50 calls.
WHY: dict[str, tuple[str, dict[str, Any]]] = {
    "ShortFT, first stage 70%": ("ShortFT", {"first": 0.7}), "ShortFT, both": ("ShortFT", {"lr": 3 * LR, "first": 0.7}),
    "DRaFT-1, lr x 3": ("DRaFT-1", {"lr": 3 * LR}), "ShortFT, lr x 3": ("ShortFT", {"lr": 3 * LR}),
}  # fmt: skip
STUDENT = "tuning the student"  # Table 2: DRaFT through all four calls of the student itself
PAPER = {  # HPSv2 x 100, PickScore, symmetry (lower is better there: a distance)
    "base": ("20.46", "26.91", "0.853"), "DRaFT-LV": ("23.35", "33.13", "0.418"), "DRTune": ("23.22", "32.79", "0.207"),
    "ShortFT": ("24.16", "33.88", "0.138"), "ShortFT without timestep-aware LoRA": ("23.82", "33.46", "0.187"),
    "ShortFT without progressive training": ("23.97", "33.27", "0.146"),
}  # fmt: skip


def model_for(name: str) -> tuple[Model, dict[str, Any]]:
    """The model a method trains, and its sampling settings."""
    net = cr.load("tiny-emoji")
    if name == STUDENT:
        # From where the base starts, over the ends of the student's segments: the levels it was distilled for.
        levels = (net.grid(N)[0], *boundaries(net.solver.process.schedule.top, 4))
        student = net.using(bundled.student("tiny-emoji"))
        return replace(student, sampler=replace(student.sampler, levels=lambda steps: levels)), {"sample_steps": 4, "guidance": 1.0}
    return net.with_student(), {"sample_steps": N}


def method_for(name: str) -> methods.Method:
    return methods.DRaFT() if name == STUDENT else methods.make(*(TABLE1 | TABLE3)[name])


def train(net: Model, method: methods.Method, reward: str, folder: Path, **options: Any) -> cr.Run:
    return cr.finetune(
        net, method, parse(REWARDS[reward]), "animals:train", out=folder, overwrite=True, batch=BATCH, rank=RANK,
        memory="keep", sample_every=0, save_every=0, watch=["a painting of a fox"], **{"lr": LR, **options},
    )  # fmt: skip


def pace(name: str) -> dict[str, list[float]]:
    """Of every stage: seconds of an update, the middle one of six after one that warms up, and the peak bytes of a gradient.

    Measured with the PickScore form; the rewards' share of an update is a few percent.
    """
    kept = KEPT / f"pace-{slug(name)}.json"
    if not kept.exists():
        pace: dict[str, list[float]] = {"seconds": [], "keep": [], "recompute": []}
        for stage in stages(method_for(name)):
            net, options = model_for(name)
            run = train(net, stage, "PickScore", Path("runs/papers/pace"), steps=7, **options)
            pace["seconds"].append(float(f"{statistics.median(row['seconds'] for row in run.metrics()[1:]):.4g}"))
            for memory in ("keep", "recompute"):
                pace[memory].append(peak(name, stage, memory))
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(pace) + "\n")
    return dict(json.loads(kept.read_text()))


def peak(method: str, stage: methods.Method, memory: str) -> int:
    """The most bytes that one gradient of a batch holds, above the weights; the largest of the stage's first three plans."""
    (net, options), most = model_for(method), 0
    plans = [stage.plan(net.grid(options["sample_steps"]), Random(seed)) for seed in range(3)]
    bands = methods.needs(stage, net.grid(options["sample_steps"])).adapters
    weights = [w for name, levels in bands.items() for w in net.adapt(name, rank=RANK, levels=levels).parameters()]
    for plan in plans:
        for weight in weights:
            weight.grad = None
        gradient = partial(cr.gradient, net, plan, parse(REWARDS["PickScore"]), ["a painting of a fox"] * BATCH, range(BATCH))
        most = max(most, peak_bytes(partial(gradient, guidance=options.get("guidance"), memory=memory)))
    return most


def names_of(reward: str) -> list[str]:
    """The rows of a reward's table; the ablations are run with the two preference rewards."""
    return [*TABLE1, *(() if reward == "Symmetry" else TABLE3)]


def slug(*parts: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def run_one(name: str, reward: str, seed: int, folder: Path) -> dict[str, float]:
    """Train and measure once; the result is kept, so a second call is free."""
    kept = KEPT / f"{slug(name, reward, seed)}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    method, changed = WHY.get(name, (name, {}))
    seconds, first = pace(method)["seconds"], changed.get("first")
    net, options = model_for(method)
    if first:  # of the time, the first stage gets this share and the others the rest in equal parts
        shares = [first, *[(1 - first) / (len(seconds) - 1)] * (len(seconds) - 1)]
        options["stage_steps"] = [max(1, round(SECONDS * share / each)) for share, each in zip(shares, seconds, strict=True)]
        updates = sum(options["stage_steps"])
    else:
        updates = max(len(seconds), round(SECONDS / statistics.mean(seconds)))
    options |= {"lr": changed["lr"]} if "lr" in changed else {}
    run = train(net, method_for(method), reward, folder / slug(name, reward, seed), steps=updates, seed=seed, **options)
    result = measured(net.using(run.folder), reward, options) | {"updates": updates}
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({key: float(f"{value:.5g}") for key, value in result.items()}) + "\n")
    return result


def base(reward: str, name: str = "base") -> dict[str, float]:
    """A model as it is: the base, or the student."""
    kept = KEPT / f"{name}-{reward}.json".lower().replace(" ", "-")
    if not kept.exists():
        net, options = (cr.load("tiny-emoji"), {"sample_steps": N}) if name == "base" else model_for(name)
        found = measured(net, reward, options)
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({key: float(f"{value:.5g}") for key, value in found.items()}) + "\n")
    return dict(json.loads(kept.read_text()))


def measured(net: Model, reward: str, options: dict[str, Any]) -> dict[str, float]:
    """The trained reward, the held-out one and diversity on unseen prompts."""
    scorers, settings = [parse(MEASURED[reward]), parse(HELD[reward])], {"steps": options["sample_steps"]}
    table = evaluate(
        {"it": net}, cr.prompts("animals:test"), scorers, seeds=range(100, 103), guidance=options.get("guidance"), **settings
    )
    row = table.rows["it"]
    return {"trained": row[MEASURED[reward]].mean, "held": row[HELD[reward]].mean, "diversity": row["diversity"].mean}


def inference(rounds: int = 7) -> dict[str, float]:
    """Seconds of a plain pipeline's 50 steps without an adapter, with one LoRA on, and with ShortFT's adapters attached.

    Rank and target layers are the same. Medians over rounds in turns, A B C A B C.
    """
    kept = KEPT / "inference.json"
    if not kept.exists():
        net = cr.load("tiny-emoji")
        folder = Path("runs/papers/inference")
        one = net.adapt("one", rank=RANK)
        one.save(folder / "one")
        bands = methods.needs(methods.ShortFT(), net.grid(N)).adapters
        for name in bands:
            one.save(folder / "several" / name)
        net.drop(one)
        save_bands(folder / "several", bands)
        pipe, said, seconds = net.pipe, cr.prompts("animals:test")[:4], {"none": [], "one": [], "attached": []}

        def clock(kind: str) -> None:
            began = time.perf_counter()
            pipe(said, num_inference_steps=N, guidance_scale=2.0, output_type="latent")
            seconds[kind].append(time.perf_counter() - began)

        for _ in range(rounds + 1):
            clock("none")
            pipe.load_lora_weights(folder / "one")
            clock("one")
            pipe.unload_lora_weights()
            with cr.attach(pipe, folder / "several"):
                clock("attached")
        found = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
        KEPT.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({key: float(f"{value:.4g}") for key, value in found.items()}) + "\n")
    return dict(json.loads(kept.read_text()))


def found(name: str, reward: str) -> list[dict[str, float]]:
    files = [KEPT / f"{slug(name, reward, seed)}.json" for seed in SEEDS]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def table(reward: str, names: list[str]) -> str:
    """Gains over the base beside the paper's own values, with what an update cost."""
    before, column = base(reward), list(REWARDS).index(reward)
    absolute = " | ".join(f"{before[key]:.3f}" for key in ("trained", "held", "diversity"))
    lines = [
        f"| {reward} | gain | held-out gain | diversity | the paper's score | updates | s / update | MiB, keep | MiB, recompute |",
        "|---" * 9 + "|",
        f"| base (absolute) | {absolute} | {PAPER['base'][column]} | | | | |",
    ]
    for name in names:
        rows, paper = found(name, reward), PAPER.get(name, ("",) * 3)[column]
        if not rows:
            lines.append(f"| {name} | not run | | | {paper} | | | | |")
            continue
        gains = [interval([r[key] - before[key] for r in rows]) for key in ("trained", "held", "diversity")]
        cost = pace(WHY.get(name, (name, {}))[0])
        spent = [f"{statistics.mean(cost['seconds']):.2f}", *(f"{max(cost[m]) / 2**20:.0f}" for m in ("keep", "recompute"))]
        seeds = "" if len(rows) == len(SEEDS) else f" ({len(rows)} of {len(SEEDS)} seeds)"
        lines.append(f"| {name}{seeds} | {' | '.join(gains)} | {paper} | {rows[0]['updates']:.0f} | {' | '.join(spent)} |")
    return "\n".join(lines)


def page() -> str:
    about = (
        "arXiv:2507.22604. There: Stable Diffusion 1.5, HPDv2, six hours on two A800. Here: tiny-emoji, "
        f"{SECONDS:.0f} seconds of updates on one\nCPU core per run, N = {N}, batch {BATCH}, AdamW {LR}, rank {RANK}, "
        f"{len(SEEDS)} training seeds, 9 unseen animals x 3 image seeds; ± is a 95%\ninterval over training seeds. The paper's "
        "columns are absolute scores (HPSv2 x 100; its symmetry is a distance, lower is better),\nours are gains over the base, "
        f"higher is better. Symmetry is trained as {REWARDS['Symmetry']},\nafter the paper's joint regularization."
    )
    cost, tables = inference(), "\n\n".join(table(reward, names_of(reward)) for reward in REWARDS)
    untuned = base("HPSv2", STUDENT)["trained"] - base("HPSv2")["trained"]
    return f"""# The papers' tables in miniature

`python benchmarks/papers.py` makes ShortFT's tables and `python benchmarks/steering.py` those of SDO; each writes this page.

## ShortFT, Tables 1, 2 and 3

{about}

{tables}

What ShortFT's place above may come from: of four equal stages only the first trains what the early calls decide, and its adapters
are on in few calls (12 + 3 of 50), so that the same learning rate moves the image less. The same budget with 70% of the time in the
first stage, with three times the rate as well, and with the rate alone; DRaFT-1 with that rate for comparison:

{table("PickScore", list(WHY))}

Table 2, tuning the few-step student itself (4 calls, DRaFT through all of them) against tuning the base.
In the paper: HPSv2 32.92 and 35.97, after full training. The student as it is stands {untuned:+.4f} from the base.

{table("HPSv2", [STUDENT, "ShortFT"])}

All ran with the activations kept (`memory="keep"`); the two columns at the right are the peak bytes of one gradient of a batch
above the weights, of a method's largest stage, that way and recomputed. Seconds are the middle one of six updates, measured one
method after the other before all runs, averaged over stages.

Inference in a plain diffusers pipeline, {N} steps, batch 4, medians in one run: {cost["none"]:.2f} s without an adapter,
{cost["one"]:.2f} s with one LoRA of rank {RANK} by `load_lora_weights`, {cost["attached"]:.2f} s with ShortFT's four of that
rank by `chainrule.attach`: {cost["attached"] / cost["one"]:.2f} times the one LoRA.

{section()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/papers"))
    parser.add_argument("--shard", default="0/1", help="i/n: only every n-th run, starting with the i-th")
    parser.add_argument("--pace", action="store_true", help="only measure the methods' speed and memory, where not yet known")
    parser.add_argument("--rewards", nargs="+", default=list(REWARDS), choices=list(REWARDS))
    parser.add_argument("--write", action="store_true", help="only write the page")
    given = parser.parse_args()
    for name in () if given.write else (*TABLE1, *TABLE3, STUDENT):
        print(name, pace(name), flush=True)
    part, parts = map(int, given.shard.split("/"))
    jobs = [(name, reward, seed) for reward in given.rewards for seed in SEEDS for name in names_of(reward)]
    jobs += [(STUDENT, "HPSv2", seed) for seed in SEEDS] + [(name, "PickScore", seed) for name in WHY for seed in SEEDS]
    for name, reward, seed in [] if given.write or given.pace else jobs[part::parts]:
        print(name, reward, seed, run_one(name, reward, seed, given.out / str(part)), flush=True)
    Path("docs/papers.md").write_text(page())


if __name__ == "__main__":
    main()
