"""How fast sampling and updates are beside diffusers' own sampling, eager and compiled.

    python -m benchmarks.speed [--rounds 5] [--batch 4] [--steps 50] [--threads 1] [--quick]

Everything is measured in turns, A B C ..., after a round that is not counted, so that a machine whose speed varies is the same for
all. A ratio is that of one round to the sampling of the same round. Writes benchmarks/speed.md; `--quick` writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import chainrule as cr
from benchmarks.bench import ADAPTED, PACKAGES, PRISTINE, Bench, Scope, machine, plain, race
from chainrule.methods import SDO, DRaFT
from chainrule.models.compiled import check_compiler, compiled
from chainrule.report.tables import markdown
from chainrule.rewards import Symmetry

PAGE = Path(__file__).with_name("speed.md")
FLOOR = "as many products as in diffusers' sampling, in large matrices"  # nothing that computes the same is much faster
SIDE = 1024  # of those matrices
WANTED = {  # what the project wants to hold, as ratios of time to diffusers' own sampling without an adapter
    "sampling": (1 / 1.10, 1 / 1.25), "DRaFT-1, keep": (1.0, 0.85), "SDO, keep": (1.0, 0.85),
}  # fmt: skip


def prepared(scope: Scope) -> Bench:
    """The bundled model with an adapter in, and a plain pipeline in diffusers' own layout."""
    model = cr.load("tiny-emoji", device="cpu")
    unet = copy.deepcopy(model.pipe.unet).to(memory_format=torch.contiguous_format)
    adapter = model.adapt("bench")
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.01)
    said = cr.prompts("emoji")
    pipes = {PRISTINE: plain(model.pipe, unet), ADAPTED: plain(model.pipe, model.pipe.unet)}
    return Bench(model, adapter, pipes, [said[i % len(said)] for i in range(scope.batch)], list(range(scope.batch)), scope)


def contenders(bench: Bench, ending: str) -> dict[str, Callable[[int], object]]:
    """Sampling and updates by the library. The adapter is on but in `sampling`."""
    model, scope = bench.model, bench.scope
    bare = cr.load(model.pipe)  # the same network with no adapter on
    optimizer = torch.optim.AdamW(bench.adapter.parameters(), lr=1e-5)
    sample = lambda which, number: which.render(bench.prompts, bench.seeds, scope.steps, bench.guidance)
    found: dict[str, Callable[[int], object]] = {"sampling": partial(sample, bare), "sampling, LoRA on": partial(sample, model)}
    for name, method in (("DRaFT-1, keep", DRaFT(1)), ("SDO, keep", SDO(1))):
        found[name] = partial(bench.update, method, Symmetry(), "keep", optimizer)
    return {name + ending: run for name, run in found.items()}


def products(bench: Bench) -> Callable[[int], object]:
    """As many multiplications and additions as sampling takes, in matrices so large that nothing else costs time."""
    with FlopCounterMode(display=False) as counter:
        bench.sample(PRISTINE, 0)
    matrix, answer, times = torch.ones(SIDE, SIDE), torch.empty(SIDE, SIDE), round(counter.get_total_flops() / (2 * SIDE**3))

    def run(number: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix, out=answer)

    return run


def measured(scope: Scope) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    cpu, bench = torch.device("cpu"), prepared(scope)
    theirs: dict[str, Callable[[int], object]] = {which: partial(bench.sample, which) for which in (PRISTINE, ADAPTED)}
    theirs[FLOOR] = products(bench)
    eager = race(theirs | contenders(bench, ""), scope.rounds, cpu)
    compiled(bench.model)
    later = race({PRISTINE: theirs[PRISTINE]} | contenders(bench, ", compiled"), scope.rounds, cpu)
    return eager | {f"{PRISTINE}, again": later.pop(PRISTINE)} | later


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Every contender's time over diffusers' sampling without an adapter, round by round."""
    first, again = seconds[PRISTINE], seconds[f"{PRISTINE}, again"]
    found = {}
    for name, taken in seconds.items():
        beside = again if name.endswith((", compiled", ", again")) else first
        found[name] = [mine / theirs for mine, theirs in zip(taken, beside, strict=True)]
    lora = zip(seconds["sampling, LoRA on"], seconds["sampling"], strict=True)
    return found | {"LoRA's cost (sampling with it over without)": [on / off for on, off in lora]}


def rows(found: Mapping[str, Sequence[float]]) -> list[tuple[str, ...]]:
    labels = {PRISTINE: "diffusers, no LoRA", ADAPTED: "diffusers, LoRA on"}
    made = []
    for name, values in found.items():
        if name.startswith(PRISTINE):
            continue
        own, is_compiled = name.removesuffix(", compiled"), name.endswith(", compiled")
        wanted = f"at most {WANTED[own][is_compiled]:.2f}" if own in WANTED else "at most 1.04" if own.startswith("LoRA") else "-"
        spread = f"{min(values):.3f} to {max(values):.3f}"
        made.append((labels.get(name, name), f"{median(values):.3f}", spread, wanted))
    return made


def page(found: Mapping[str, Sequence[float]], scope: Scope) -> str:
    m: dict[str, Any] = machine(torch.device("cpu"))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    about = (
        f"Made by `{command}` on {date.today().isoformat()}: {m['cpu']}, {m['threads']} CPU threads; {versions}. tiny-emoji, a "
        f"batch of {scope.batch}, {scope.steps} steps, guided. A ratio is a time over that of diffusers' own pipeline without an "
        f"adapter in the same round; median of {scope.rounds} rounds, with the least and the most. An update is the gradient with "
        "its decoding and a reward without a network (symmetry), clipping and AdamW's step. "
        '"Wanted" is what the project set out to reach.'
    )
    table = markdown(("what", "time / diffusers' sampling", "least to most", "wanted"), rows(found))
    return f"# Speed\n\n{about}\n\n{table}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, number in (("rounds", 5), ("batch", 4), ("steps", 50), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--quick", action="store_true", help="two steps and two rounds, to see that it works; writes nothing")
    args = parser.parse_args()
    check_compiler("cpu")
    torch.set_num_threads(args.threads)
    scope = Scope(steps=2, batch=2, rounds=2) if args.quick else Scope(steps=args.steps, batch=args.batch, rounds=args.rounds)
    text = page(ratios(measured(scope)), scope)
    print(text)
    if not args.quick:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
