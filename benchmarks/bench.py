"""What an update costs: its time against diffusers' own sampling, and its peak memory against N and K.

    python -m benchmarks.bench [--quick] [--out docs/bench.json] [--model FOLDER_OR_NAME] [--device cuda]

Prints the tables and writes them as JSON and as benchmarks/results.md. `--quick` only shows that the script works: a
shorter chain, and nothing is written unless `--out` names a file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import chainrule as cr
from chainrule.adapters import selected
from chainrule.meters import peak_bytes
from chainrule.methods import SDO, DRaFT, DRaFTLV, DRTune, Method, ShortFT, spelled
from chainrule.models.defaults import Defaults
from chainrule.plan import Forecast
from chainrule.report.tables import markdown
from chainrule.rewards import Reward, Symmetry, parse

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "chainrule")
MEMORIES = ("keep", "recompute")
PRISTINE, ADAPTED = "pristine", "adapted"
DOES_NOT_FIT = "out of memory"
console = Console(width=max(Console().width, 118))


@dataclass(frozen=True)
class Scope:
    """What is measured, and how large."""

    steps: int = 50
    batch: int = 8
    rounds: int = 5
    methods: tuple[Method, ...] = (
        DRaFT(1), DRaFTLV(2), SDO(1), DRTune(), ShortFT(stage=1), ShortFT(stage=4), DRaFT(10), DRaFT(50),
    )  # fmt: skip
    along_n: tuple[int, ...] = (5, 10, 20, 50)
    along_k: tuple[int, ...] = (1, 5, 10, 20)
    k_steps: int = 20
    memory_batch: int = 2


QUICK = Scope(10, 2, 2, (DRaFT(1), DRaFTLV(2), SDO(1), DRTune(), DRaFT(10)), (5, 10), (1, 5), 5)


@dataclass(frozen=True)
class Bench:
    """The model with an adapter on, two plain pipelines to compare with, and the images that all of them make."""

    model: cr.Model
    adapter: cr.Adapter
    pipes: Mapping[str, Any]
    prompts: list[str]
    seeds: list[int]
    scope: Scope

    @property
    def guidance(self) -> float:
        return self.model.defaults.guidance

    def sample(self, which: str, number: int = 0) -> torch.Tensor:
        """diffusers' own sampling of the batch, (b, 3, h, w) in [0, 1]."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        on = {self.adapter.name: 1.0} if which == ADAPTED else {}
        with selected(self.model.network, on):
            images = self.pipes[which](
                self.prompts, num_inference_steps=self.scope.steps, guidance_scale=self.guidance, generator=generators,
                output_type="pt",
            ).images  # fmt: skip
        return images  # type: ignore[no-any-return]

    def update(self, method: Method, reward: Reward, memory: str, optimizer: torch.optim.Optimizer, number: int) -> None:
        """One full update: gradient, clipping and the optimizer's step."""
        optimizer.zero_grad(set_to_none=True)
        plan = method.plan(self.model.grid(self.scope.steps), Random(number))
        cr.gradient(self.model, plan, reward, self.prompts, self.seeds, memory=memory)
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        optimizer.step()

    def peak(self, method: Method, steps: int, memory: str) -> int | None:
        """Peak bytes of one gradient above what was there before it; None when it does not fit."""
        prompts, seeds = self.prompts[: self.scope.memory_batch], self.seeds[: self.scope.memory_batch]
        plan = method.plan(self.model.grid(steps), Random(0))
        for weight in self.adapter.parameters():
            weight.grad = None
        run = partial(cr.gradient, self.model, plan, Symmetry(), prompts, seeds, memory=memory)
        try:
            return peak_bytes(run, self.model.device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None


def load(name: str, device: str | None) -> tuple[cr.Model, bool]:
    """The model, and whether it is a stand-in: the bundled model's shape with random weights, when it is missing."""
    try:
        return cr.load(name, device=device).with_student(), False
    except cr.UserError as error:
        if name != "tiny-emoji":
            raise SystemExit(f"error: {error}") from error
        console.print(f"[yellow]{error}.\nMeasuring a stand-in of its shape with random weights; no results.md is written.")
    from chainrule.tiny import autoencoder, generator

    pipe = generator.pipeline(generator.Generator(), autoencoder.build())
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return replace(cr.load(pipe), name="tiny-emoji's shape, random weights", defaults=Defaults(guidance=2.0)), True


def plain(pipe: Any, unet: Any) -> Any:
    """A pipeline of the same parts around another denoiser, with the DDIM scheduler the chain walks."""
    from diffusers import DDIMScheduler

    parts = {**pipe.components, "unet": unet, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    made = type(pipe)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def prepare(model: cr.Model, scope: Scope) -> Bench:
    """Put the adapter in; what it is compared with was copied before."""
    pristine = plain(model.pipe, copy.deepcopy(model.pipe.unet))
    adapter = model.adapt("bench")
    said = cr.prompts("emoji")
    prompts = [said[i % len(said)] for i in range(scope.batch)]
    pipes = {PRISTINE: pristine, ADAPTED: plain(model.pipe, model.pipe.unet)}
    return Bench(model, adapter, pipes, prompts, list(range(scope.batch)), scope)


def rewards(device: torch.device) -> list[Reward]:
    """A reward without a network, and the bundled PickScore-like one if it is there."""
    found: list[Reward] = [Symmetry()]
    try:
        found.append(parse("pickscore:tiny").to(device))
    except cr.UserError as error:
        console.print(f"[yellow]pickscore:tiny is left out: {error}")
    return found


def clock(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def race(contenders: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every contender in every round, A B A B ..., after a round that is not counted.

    An update that runs out of the GPU's memory leaves the race and gets no seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    racing = dict(contenders)
    for number in range(-1, rounds):
        for name, run in list(racing.items()):
            try:
                took = clock(partial(run, max(number, 0)), device)
            except torch.OutOfMemoryError:
                if name not in MEMORIES:
                    raise  # nothing to compare with
                del racing[name]
                seconds[name].clear()
                torch.cuda.empty_cache()
                continue
            if number >= 0:
                seconds[name].append(took)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, least and most; None for no values."""
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None


def forecast(bench: Bench, method: Method, memory: str) -> float:
    """The library's own estimate of the ratio: forward passes of an update over those of sampling."""
    grid, steps = bench.model.grid(bench.scope.steps), bench.scope.steps
    plans = [method.plan(grid, Random(number)) for number in range(bench.scope.rounds)]
    return median(Forecast.of(p, recompute=memory == "recompute").relative_time * p.calls() / steps for p in plans)


def times(bench: Bench, scored: Sequence[Reward]) -> list[dict[str, Any]]:
    """One row for each reward, method and memory policy."""
    optimizer = torch.optim.AdamW(bench.adapter.parameters(), lr=1e-4)
    rows = []
    cells = [(reward, method) for reward in scored for method in bench.scope.methods]
    for reward, method in track(cells, "update time", console=console, transient=True):
        contenders: dict[str, Callable[[int], object]] = {which: partial(bench.sample, which) for which in (PRISTINE, ADAPTED)}
        for memory in MEMORIES:
            contenders[memory] = partial(bench.update, method, reward, memory, optimizer)
        seconds = race(contenders, bench.scope.rounds, bench.model.device)
        for memory in MEMORIES:
            row: dict[str, Any] = {"reward": reward.name, "method": label(method), "memory": memory}
            for which in (ADAPTED, PRISTINE):
                pairs = zip(seconds[memory], seconds[which], strict=bool(seconds[memory]))
                row[f"ratio_{which}"] = spread([update / sampling for update, sampling in pairs])
            row["forecast"] = forecast(bench, method, memory)
            row["seconds"] = {"update": seconds[memory], ADAPTED: seconds[ADAPTED], PRISTINE: seconds[PRISTINE]}
            rows.append(row)
    return rows


def label(method: Method) -> str:
    """A method as the papers write it: DRaFT(10), DRaFT(), SDO()."""
    options = {key: value for key, value in spelled(method).items() if key != "name"}
    return f"{type(method).__name__}({', '.join(f'{key}={value}' for key, value in options.items())})"


def peaks(bench: Bench) -> list[dict[str, Any]]:
    """Peak bytes along N for all of the chain and for SDO, and along K."""
    scope = bench.scope
    wanted: list[tuple[str, str, list[tuple[int, Method, int]]]] = [
        ("N", "DRaFT()", [(n, DRaFT(), n) for n in scope.along_n]),
        ("N", "SDO()", [(n, SDO(), n) for n in scope.along_n]),
        ("K", f"DRaFT(K), N = {scope.k_steps}", [(k, DRaFT(k), scope.k_steps) for k in scope.along_k]),
    ]
    bench.peak(DRaFT(1), scope.k_steps, "recompute")  # a GPU allocates its libraries' workspaces on first use
    rows = []
    for along, name, points in track(wanted, "peak memory", console=console, transient=True):
        for memory in MEMORIES:
            found = [bench.peak(method, steps, memory) for _, method, steps in points]
            first, last = found[0], found[-1]
            growth = last / first if first and last else None
            at = [value for value, _, _ in points]
            rows.append({"along": along, "method": name, "memory": memory, "at": at, "bytes": found, "growth": growth})
    return rows


@dataclass(frozen=True)
class Sheet:
    """A table, for the terminal and for markdown."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for name, cell in zip(self.columns, self.rows[0], strict=True):
            table.add_column(name, justify="right" if cell[:1].isdigit() else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        return f"### {self.title}\n\n{markdown(self.columns, self.rows)}"


def shown(value: Mapping[str, float] | None) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})" if value else DOES_NOT_FIT


def sheets(facts: Mapping[str, Any]) -> list[Sheet]:
    """The update times, then memory along N, then along K."""
    columns: tuple[str, ...] = ("reward", "method", "memory", "update, s")
    columns += ("/ sampling, LoRA on", "/ sampling, no LoRA", "forecast")
    rows: list[tuple[str, ...]] = []
    for row in facts["time"]:
        update = row["seconds"]["update"]
        seconds = f"{median(update):.3f}" if update else DOES_NOT_FIT
        ratios = (shown(row["ratio_adapted"]), shown(row["ratio_pristine"]))
        rows.append((row["reward"], row["method"], row["memory"], seconds, *ratios, f"{row['forecast']:.2f}"))
    made = [Sheet("Time of one update, as a ratio to sampling", columns, rows)]
    for along in ("N", "K"):
        chosen = [row for row in facts["memory"] if row["along"] == along]
        columns = ("method", "memory", *(f"{along} = {value}" for value in chosen[0]["at"]), "last / first")
        rows = []
        for row in chosen:
            sizes = [DOES_NOT_FIT if size is None else f"{size / 2**20:.2f}" for size in row["bytes"]]
            rows.append((row["method"], row["memory"], *sizes, f"{row['growth']:.3f}" if row["growth"] else "-"))
        made.append(Sheet(f"Peak memory of one gradient above the weights, MiB, along {along}", columns, rows))
    return made


def added(facts: Mapping[str, Any]) -> float:
    """Bytes that one more live call of all of the chain adds under recompute."""
    row = next(row for row in facts["memory"] if (row["along"], row["method"], row["memory"]) == ("N", "DRaFT()", "recompute"))
    few, many = row["bytes"][-2:]
    return (many - few) / (row["at"][-1] - row["at"][-2]) if few and many else float("nan")


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What was measured, in sentences."""
    s, device = facts["settings"], facts["machine"]["device"]
    meter = "`torch.cuda.max_memory_allocated`" if device == "cuda" else "the storages its operations return (`chainrule.meters`)"
    return [
        f"Model: {facts['model']}, {s['steps']} steps, guidance {s['guidance']:g}, a batch of {s['batch']} prompts, "
        f"LoRA rank {s['rank']}.",
        "An update is the gradient (text encoding, the chain, decoding, the reward, the backward pass), clipping and AdamW's step.",
        "Sampling is diffusers' own pipeline call for the same prompts, seeds, steps and guidance, with DDIM, decoded to tensors. "
        f"`LoRA on`: with the adapter that is trained, as the tuned model samples ({facts['sampling_adapted_s']:.3f} s). "
        f"`no LoRA`: a copy of the network as it was loaded ({facts['sampling_pristine_s']:.3f} s). "
        f"The library's images and the pipeline's differ by at most {facts['largest_pixel_difference']:.1e}.",
        f"Measured in turns, A B A B, after an uncounted round: median of {s['rounds']} ratios, each of an update to the sampling "
        "of its own round, with the least and the most in brackets. Random plans are drawn anew in every round.",
        "`forecast` is `chainrule.plan.Forecast`: the network's forward passes, a backward pass counted as one; decoding and "
        "the reward are not in it.",
        f"Memory: {s['memory_batch']} prompts, reward symmetry, one `chainrule.gradient`, by {meter}. A latent of that batch is "
        f"{s['latent_bytes'] / 1024:g} KiB; under `recompute` a further live call of DRaFT() added {added(facts) / 1024:g} KiB "
        "(last two columns along N). From the second live call on, the adapter's gradient summed so far is held as well.",
    ]  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = named[0] if named else platform.processor() or platform.machine()
    found = {"device": device.type, "cpu": cpu, "threads": torch.get_num_threads()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def measure(bench: Bench) -> dict[str, Any]:
    """Everything, as what the JSON file holds."""
    model, scope = bench.model, bench.scope
    ours = model.render(bench.prompts, bench.seeds, scope.steps, batch=scope.batch)
    apart = max(float((ours - bench.sample(which).float().cpu()).abs().max()) for which in bench.pipes)
    time_rows = times(bench, rewards(model.device))
    sampling = {which: median([s for row in time_rows for s in row["seconds"][which]]) for which in bench.pipes}
    latent = torch.Size((scope.memory_batch, *model.codec.latent_shape)).numel() * model.dtype.itemsize
    settings = {
        "steps": scope.steps, "batch": scope.batch, "rounds": scope.rounds, "guidance": bench.guidance,
        "rank": bench.adapter.config.r, "memory_batch": scope.memory_batch, "latent_bytes": latent,
    }  # fmt: skip
    return {
        "command": shlex.join(["python", "-m", "benchmarks.bench", *sys.argv[1:]]), "date": date.today().isoformat(),
        "model": Path(model.name).name, "machine": machine(model.device), "versions": {name: version(name) for name in PACKAGES},
        "settings": settings, "sampling_adapted_s": sampling[ADAPTED], "sampling_pristine_s": sampling[PRISTINE],
        "largest_pixel_difference": apart, "time": time_rows, "memory": peaks(bench),
    }  # fmt: skip


def page(facts: Mapping[str, Any]) -> str:
    """benchmarks/results.md."""
    m = facts["machine"]
    place = f"{m['gpu']}, " if "gpu" in m else ""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    head = f"Made by `{facts['command']}` on {facts['date']}: {place}{m['cpu']}, {m['threads']} CPU threads; {versions}."
    body = "\n\n".join(sheet.markdown() for sheet in sheets(facts))
    return f"# Benchmark\n\n{head}\n\n" + "\n".join(f"- {note}" for note in notes(facts)) + f"\n\n{body}\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a shorter chain; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path, help="the JSON file (default: docs/bench.json)")
    parser.add_argument("--model", default="tiny-emoji", help="a bundled model, a diffusers folder or a hub id")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    parser.add_argument("--batch", type=int, help="prompts of a timed update (default: 8)")
    parser.add_argument("--rounds", type=int, help="measured rounds (default: 5)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    given = {key: value for key in ("batch", "rounds") if (value := getattr(args, key)) is not None}
    if any(value < 1 for value in given.values()):
        raise SystemExit("error: --batch and --rounds must be at least 1")
    scope = replace(QUICK if args.quick else Scope(), **given)
    model, stand_in = load(args.model, args.device)
    bench = prepare(model, replace(scope, memory_batch=min(scope.memory_batch, scope.batch)))
    try:
        facts = measure(bench)
    finally:
        model.active.pop(bench.adapter.name, None)
        bench.adapter.remove()
    for sheet in sheets(facts):
        console.print(sheet.rich())
    console.print("\n".join(notes(facts)), markup=False)
    out = args.out or (None if args.quick or stand_in else ROOT / "docs" / "bench.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(facts, indent=1) + "\n")
    if not (args.quick or stand_in):
        (ROOT / "benchmarks" / "results.md").write_text(page(facts))


if __name__ == "__main__":
    main()
