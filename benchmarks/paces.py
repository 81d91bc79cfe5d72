"""What an update of every method takes on the bundled model: the budgets of the tables at equal time come from here.

    python -m benchmarks.paces [--rounds 6] [--updates 16]

Prints for each method: the processor seconds of an update (one thread, activations kept, in turns with all others, the middle
one of the rounds after one that warms up; a random plan is drawn anew in each), the updates that fit into the time of so many of
the first method, and the peak MiB of one gradient of a batch above the weights, kept and recomputed. A method's stages count
equally; its bytes are the largest stage's.
"""

from __future__ import annotations

import argparse
import os
import time
from random import Random
from statistics import fmean, median

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.progress import track

import chainrule as cr
from chainrule.estimators import Batch
from chainrule.experiments.table import Table, read
from chainrule.meters import peak_bytes
from chainrule.methods import Method, needs, stages
from chainrule.methods import read as read_method
from chainrule.rewards import parse
from chainrule.settings import Finetuning
from chainrule.training import FinetuneTask

TABLE = "all-methods"


def task_of(table: Table, label: str, method: Method, memory: str) -> FinetuneTask:
    """The training of a row as it would begin."""
    row = table.settings | table.rows[label].settings
    own = {key: value for key, value in row.items() if key in Finetuning.model_fields}
    model = cr.load(row["model"]).solving(row["solver"]) if row.get("solver") else cr.load(row["model"])
    settings = Finetuning(**(own | {"memory": memory, "updates": 1000}))
    if "student" in needs(method, model.grid(settings.sample_steps)).members:
        model = model.with_student()
    return FinetuneTask.start(model, method, parse(row["reward"], "tiny"), cr.prompts(row["prompts"]), settings)


def peak(table: Table, label: str, method: Method, memory: str) -> float:
    """MiB of one gradient of a batch, above the weights."""
    task = task_of(table, label, method, memory)
    prompts, seeds = task.share(0)
    own = needs(method, task.grid)
    task.learner.train_only((*own.trained, *task.learned))
    batch = Batch(prompts, seeds, 1, memory, None, task.processes)
    plan = method.plan(task.grid, Random(0))
    found = peak_bytes(lambda: task.estimator.add(task.model, plan, task.objective(), batch), task.model.device)
    task.remove()
    return found / 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=16, help="of the table's first method, in whose time the others' must fit")
    parser.add_argument("--table", default=TABLE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, console = read(args.table), Console()
    methods = {label: stages(read_method(row.settings["method"])) for label, row in table.rows.items() if "method" in row.settings}
    parts = [(label, method) for label, every in methods.items() for method in every]
    tasks = {(label, i): task_of(table, label, method, "keep") for i, (label, method) in enumerate(parts)}
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in tasks}
    for number in track(range(args.rounds + 1), "rounds", console=console):
        for key, task in tasks.items():
            began = time.process_time()  # of this process, whatever else runs
            task.update()
            if number:
                seconds[key].append(time.process_time() - began)
    for task in tasks.values():
        task.remove()
    first = fmean(median(times) for key, times in seconds.items() if key[0] == next(iter(methods)))
    for label, every in methods.items():
        pace = fmean(median(times) for key, times in seconds.items() if key[0] == label)
        kept, again = (max(peak(table, label, method, memory) for method in every) for memory in ("keep", "recompute"))
        console.print(
            f"{label}: updates: {int(args.updates * first / pace)}, recorded: {{s / update: {pace:.3f}, MiB kept: {kept:.0f}, "
            f"MiB recomputed: {again:.0f}}}", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
