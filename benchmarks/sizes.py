"""Memory, time and the largest batch of an update, for models of the published sizes.

    python -m benchmarks.sizes --count                   # no GPU: bytes counted on the meta device
    python -m benchmarks.sizes --device cuda             # random weights on a GPU: time, peak, the largest batch
    python -m benchmarks.sizes --write                   # docs/performance.md from the rows that are there

Every row is one small file of docs/performance/, written as soon as it is known; what is there is not made again (`--again`
does), so that a long measurement may be cut at any time (`--minutes`) and taken up later. `--tiny` takes models of a few
thousand weights instead, and `--device cpu` measures those without a GPU, to show that the script works.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import chainrule as cr
from benchmarks.sizes_models import ARCHITECTURES, TINY, Architecture, parameters
from benchmarks.sizes_update import MICRO_BATCH, RANK, STUDENT_RANK, Bench, benched, opened, pieces, settings, with_student
from chainrule.footprint import USABLE, count
from chainrule.meters import peak_bytes
from chainrule.methods import SDO, DRaFT, DRaFTLV, DRTune, Method, ShortFT
from chainrule.rewards import Reward

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "docs" / "performance", ROOT / "docs" / "performance.md"
METHODS: dict[str, Method] = {
    "draft-1": DRaFT(1), "draft-lv": DRaFTLV(2), "sdo": SDO(1), "drtune": DRTune(), "shortft-1": ShortFT(stage=1),
}  # fmt: skip
KINDS = {"meta": "count", "cuda": "cuda", "cpu": "cpu"}  # how rows of a device are called
MEMORIES = ("recompute", "blocks", "keep")
CARDS = (24, 48, 80)  # GB
CONTEXT = 10**9  # bytes that a measurement leaves to CUDA itself
QUANTIZED = ("flux-int8", "flux-4bit")
# What a count must not depend on: (name, method, steps).
GROWTH: tuple[tuple[str, Method, int], ...] = (
    ("DRaFT(), N = 10", DRaFT(), 10), ("DRaFT(), N = 50", DRaFT(), 50), ("DRaFT(10), N = 50", DRaFT(10), 50),
    ("SDO(1), N = 10", SDO(1), 10), ("SDO(1), N = 50", SDO(1), 50), ("SDO(4), N = 50", SDO(4), 50),
    ("DRaFTLV(2), N = 50", DRaFTLV(2), 50), ("DRaFTLV(8), N = 50", DRaFTLV(8), 50),
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row: its file's name, and how to make it from a model and its reward."""

    name: str
    method: Method
    make: Callable[[cr.Model, Reward], Row]


def count_row(model: cr.Model, reward: Reward, method: Method, memory: str, steps: int) -> Row:
    """Peaks by batch, and the largest batch of every card."""
    with with_student(model, method, steps) as taught:
        found = count(taught, method, reward, settings(steps, memory))
    return {"fixed": found.fixed, "peaks": found.peaks, "largest": {card: found.largest(USABLE * card * 1e9) for card in CARDS}}


def pieces_row(model: cr.Model, reward: Reward) -> Row:
    return {"pieces": pieces(model, reward)}


def growth_row(model: cr.Model, reward: Reward, method: Method, steps: int) -> Row:
    found = {memory: count(model, method, reward, settings(steps, memory), (1,)).peaks[1] for memory in ("recompute", "keep")}
    return {"growth": found}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(bench: Bench, batch: int, memory: str, steps: int, rounds: int) -> list[float]:
    """An update's time, several times over, after one that is not counted."""
    taken, device = [], bench.task.model.device
    for _ in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        bench.update(batch, memory, steps)
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return taken[1:]


def within(bench: Bench, memory: str, steps: int, batch: int, card: int) -> bool:
    """Whether an update of this batch runs when the allocator may take no more than a card of so many GB would give it.

    Without a GPU by the count of its tensors.
    """
    device, room = bench.task.model.device, card * 1e9 - CONTEXT
    if device.type != "cuda":
        return sum(bench.fixed().values()) + peak_bytes(lambda: bench.update(batch, memory, steps), device) <= room
    whole = torch.cuda.get_device_properties(device).total_memory
    if room >= whole - CONTEXT:
        raise SystemExit(f"error: this GPU is too small to stand for one of {card} GB; leave it out by --cards")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / whole, device)
    try:
        bench.update(batch, memory, steps)
        return True
    except torch.OutOfMemoryError:
        bench.forget()
        gc.collect()
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure_row(model: cr.Model, reward: Reward, method: Method, memory: str, args: argparse.Namespace) -> Row:
    """Time and peak of one batch at full length; the largest batches by chains of `short` calls, which hold as much."""
    with benched(model, reward, method, args.steps) as bench:
        try:
            taken = seconds(bench, args.batch, memory, args.steps, args.rounds)
            above = peak_bytes(lambda: bench.update(args.batch, memory, args.steps), model.device)
        except torch.OutOfMemoryError:
            taken, above = [], 0
            bench.forget()
        short = args.short if memory != "keep" else args.steps
        found, guess = {}, 1
        for card in args.cards:
            found[card] = largest(lambda n, card=card: within(bench, memory, short, n, card), guess, args.most)
            guess = max(2 * found[card], 1)
        row = {"fixed": bench.fixed(), "batch": args.batch, "seconds": taken, "median": median(taken) if taken else None}
        return row | {"peak": above, "largest": found}


def largest(fits: Callable[[int], bool], guess: int, most: int = 4096) -> int:
    """The largest batch that fits, by steps away from a guess that double, then by halving. 0: not even one."""
    low, high, step, at = 0, most + 1, 1, min(max(guess, 1), most)
    while high - low > 1:
        if fits(at):
            low = at
        else:
            high = at
        at = min(low + step, most) if high > most else (low + high) // 2 if low else max(high - step, 1)
        step *= 2
    return low


def jobs(name: str, args: argparse.Namespace) -> Iterator[Job]:
    """The rows of one architecture."""
    methods = {key: METHODS[key] for key in args.methods}
    if args.device == "meta":
        yield Job(f"count-{name}-pieces", DRaFT(1), pieces_row)
        if name in ("sd15", "tiny-sd"):
            for number, (_, method, steps) in enumerate(GROWTH):
                yield Job(f"count-{name}-growth-{number}", method, partial(growth_row, method=method, steps=steps))
    for memory in args.memory:
        for key, method in methods.items():
            row = partial(count_row, method=method, memory=memory, steps=args.steps)
            if args.device != "meta":
                row = partial(measure_row, method=method, memory=memory, args=args)
            yield Job(f"{KINDS[args.device]}-{name}-{key}-{memory}", method, row)


def facts(args: argparse.Namespace, name: str, shape: Architecture, job: Job) -> Row:
    """What every row says of itself."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    made = {"model": name, "title": shape.title, "method": repr(job.method), "steps": args.steps, "dtype": args.dtype}
    made |= {"rank": RANK, "student_rank": STUDENT_RANK, "micro_batch": MICRO_BATCH, "device": device}
    return made | {"versions": {package: version(package) for package in ("torch", "diffusers", "transformers", "peft")}}


def run(args: argparse.Namespace) -> None:
    """Make the rows that are missing, until they are there or the time is over."""
    shapes, began, device = TINY if args.tiny else ARCHITECTURES, time.monotonic(), torch.device(args.device)
    for named in args.models or [*shapes, *(QUANTIZED if device.type == "meta" and not args.tiny else ())]:
        name, _, quantize = named.partition("-") if named in QUANTIZED else (named, "", "")
        wanted = [job for job in jobs(named, args) if args.again or not (args.out / f"{job.name}.json").is_file()]
        if not wanted:
            continue
        model, reward = opened(shapes[name], device, getattr(torch, args.dtype), quantize or None)
        for job in wanted:
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                print("the time is over; the same command goes on from here")
                return
            row = facts(args, named, shapes[name], job) | {"guidance": model.defaults.guidance} | job.make(model, reward)
            row["title"] += f", base in {quantize}" if quantize else ""
            args.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(row | {"machine": platform.machine(), "parameters": parameters(shapes[name])}, indent=1)
            (args.out / f"{job.name}.json").write_text(text + "\n")
            print(job.name, {key: row[key] for key in ("largest", "median", "growth", "pieces") if key in row}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = "cuda" if torch.cuda.is_available() else "meta"
    parser.add_argument(
        "--count", action="store_const", const="meta", dest="device", default=usual, help="count on the meta device"
    )
    parser.add_argument("--device", choices=("meta", "cuda", "cpu"), default=usual)
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights")
    parser.add_argument("--models", nargs="+", choices=(*ARCHITECTURES, *QUANTIZED, *TINY))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--memory", nargs="+", choices=MEMORIES, default=list(MEMORIES))
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS), help="GB")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--short", type=int, default=10, help="steps of the chains that look for the largest batch")
    parser.add_argument("--batch", type=int, default=4, help="images of an update that is timed")
    parser.add_argument("--most", type=int, default=64, help="the largest batch that is tried")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, help="begin no row after so many minutes")
    parser.add_argument("--again", action="store_true", help="make rows that are there too")
    parser.add_argument("--out", type=Path, help="the folder of the rows")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and measure nothing")
    args = parser.parse_args()
    args.out = args.out or (ROOT / "runs" / "sizes-tiny" if args.tiny else FOLDER)
    if not args.write:
        run(args)
        return
    from benchmarks.sizes_page import page

    PAGE.write_text(page(args.out, {name: dict(shape.published) for name, shape in ARCHITECTURES.items()}, USABLE))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
