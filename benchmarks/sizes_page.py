"""docs/performance.md from the rows that `sizes.py` left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from chainrule.report.tables import markdown

Row = dict[str, Any]
WIDTH = 148
BEFORE = Path(__file__).with_name("sizes_before.json")
LABELS = {
    "draft-1": "DRaFT-1", "draft-lv": "DRaFT-LV, n = 2", "sdo": "SDO", "drtune": "DRTune", "shortft-1": "ShortFT, stage 1",
}  # fmt: skip
MEMORIES = ("recompute", "blocks", "keep")
GROWTH = (
    "all of the chain, N = 10", "all of the chain, N = 50", "DRaFT-10, N = 50", "SDO, N = 10", "SDO, N = 50", "SDO, M = 4, N = 50",
    "DRaFT-LV, n = 2, N = 50", "DRaFT-LV, n = 8, N = 50",
)  # fmt: skip

HOW = """\
# Memory, time and the largest batch at the published sizes

Written by `make sizes` (`benchmarks/sizes.py`) from the rows in `docs/performance/`.

**The numbers under "Counted" are counts, not measurements.** The models are built on PyTorch's meta device, where a tensor has a
shape and no numbers. One update goes through the library's own walker, decoder, reward and optimizer. Every operation, forwards
and backwards, reports how many bytes it makes. A tensor's bytes count until it is freed. The peak is the most that was held at
once.

* Counted are the weights of the denoiser, the VAE and the reward's image tower; the adapters with AdamW's two moments and the
  averaged weights; gradients; activations; and all that an operation returns. Prompts are embedded ahead of the run, for the
  network and for the reward, by text encoders that stay on the CPU.
* Not counted are scratch space inside kernels (workspaces of convolutions and matrix products, attention's backward pass in
  float32), the allocator's fragmentation, and the CUDA context.
* A batch "fits" where the count is at most {usable:.0%} of the card's gigabytes, 10^9 bytes each. A card sold as 80 GB may have a
  few percent more.
* Attention counts as a fused kernel (flash or memory-efficient), which keeps q, k, v, its output and a float32 per row. The meta
  device by itself would split it into steps and hold a matrix of all pairs of tokens. So would a GPU on which no fused kernel
  serves.
* Weights are bfloat16, the reward's too (`pickscore@cuda/bfloat16`), except the adapters', which are float32. LoRAs have rank 8.
  ShortFT has four of them, and a frozen student's of rank 64. A base in int8 or 4 bits is made into bfloat16 layer by layer,
  for the moment of each product.
* A chain has {steps} steps and the pipeline's own guidance. The reward is PickScore's CLIP ViT-H/14. One image at a time is
  decoded and scored (`micro_batch` 1; the trainer's default is 8, fewer for large images).
* `chainrule plan --model ... --memory-of 24GB` counts the same of any model, from its configuration alone.
* `tests/test_footprint.py` compares the count with the same update of tiny models with real numbers.
"""


def section(title: str, about: str, columns: Sequence[str], found: Sequence[Sequence[str]]) -> str:
    """A heading, what the table below it holds, and the table."""
    return f"## {title}\n\n{fill(about, WIDTH)}\n\n{markdown(columns, found)}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}" if size >= 10 * 2**30 else f"{size / 2**30:.2f}"


def read(folder: Path) -> dict[str, Row]:
    """The rows by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def models(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> dict[str, str]:
    """Names and titles of the models that have rows, in the published order."""
    titles = {row["model"]: row["title"] for row in rows.values()}
    return {name: titles[name] for name in [*published, *titles] if name in titles}


def configurations(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    found = []
    for name, title in models(rows, published).items():
        row = next(row for row in rows.values() if row["model"] == name)
        for part, count in row["parameters"].items():
            if part not in ("tokenizer", "scheduler"):
                found.append((title, part, f"{count:,}", published.get(name, {}).get(part, "-")))
    columns = ("model", "part", "parameters here", "published, millions")
    about = "The models are built from the published configurations. Their numbers of parameters are beside the published ones."
    return section("The models", about, columns, found)


def further(peaks: dict[str, int]) -> str:
    """What one more image adds, from the two largest batches counted."""
    (a, low), (b, high) = sorted((int(batch), peak) for batch, peak in peaks.items())[-2:]
    return gib((high - low) / (b - a))


def compared(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    """DRaFT-1 before and after."""
    before, found = json.loads(BEFORE.read_text())["rows"], []
    for name, title in models(rows, published).items():
        for memory in MEMORIES:
            old, row = before.get(f"{name.partition('-')[0]}-{memory}"), rows.get(f"count-{name}-draft-1-{memory}")
            if row:
                new = sum(row["fixed"].values()) + row["peaks"]["1"]
                was = (f"{(old['fixed'] + old['one']) / 1e9:.1f}", str(old["in 24 GB"])) if old else ("-", "-")
                found.append((title, memory, was[0], f"{new / 1e9:.1f}", was[1], str(row["largest"]["24"])))
    about = (
        "DRaFT-1 with one image, all that is held at once, in GB (10^9 bytes). Before, activations of adapted layers were cast up "
        "to float32, text encoders and the reward's text tower were on the card, the reward was in float32, and VAEs were "
        "recomputed block by block (commit 7697927). A base in fewer bits is beside the one in bfloat16 before."
    )
    columns = ("model", "memory", "before", "after", "batch in 24 GB before", "after")
    return section("Counted: before and after", about, columns, found)


def counts(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    found = []
    for name, title in models(rows, published).items():
        for memory in MEMORIES:
            for key, label in LABELS.items():
                row = rows.get(f"count-{name}-{key}-{memory}")
                if row:
                    fixed = sum(row["fixed"].values())
                    fits = [str(row["largest"][card]) for card in ("24", "48", "80")]
                    cells = (gib(fixed), gib(row["peaks"]["1"]), further(row["peaks"]))
                    found.append((title, memory, label, *cells, *fits))
    columns = ("model", "memory", "method", "before, GiB", "+ one image", "+ each further", "in 24 GB", "48 GB", "80 GB")
    about = (
        '"Before" is what memory holds between updates: weights and the adapters\' state. "One image" is how far the peak of an '
        'update with a batch of one is above that. "Each further" is what one more image adds. The last three columns are the '
        "largest batch."
    )
    return section("Counted: one update", about, columns, found)


def parts(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    names = (
        "call without gradient", "call", "call, blocks recomputed", "decode", "decode and reward",
        "decode and reward, layers recomputed",
    )  # fmt: skip
    found = [
        (title, *(gib(rows[f"count-{name}-pieces"]["pieces"][each]) for each in names))
        for name, title in models(rows, published).items()
        if f"count-{name}-pieces" in rows
    ]
    about = (
        "The table has the peaks for one image in GiB. A call is the guided one, forwards and backwards. It has two halves, but "
        'for FLUX.1, which reads its guidance. "Blocks recomputed" is gradient checkpointing inside the network, which '
        'memory="blocks" switches on; the decoder then recomputes its layers.'
    )
    return section("Counted: what an image is made of", about, ("model", *names), found)


def growth(rows: dict[str, Row]) -> str:
    found = []
    for number, label in enumerate(GROWTH):
        row = rows.get(f"count-sd15-growth-{number}")
        if row:
            found.append((label, *(f"{row['growth'][memory] / 2**30:.3f}" for memory in ("recompute", "keep"))))
    about = (
        "The table has the peak above the weights in GiB, for Stable Diffusion 1.5 and one image. N is the number of steps, K "
        "and M are numbers of live calls, and n is the number of copies."
    )
    return section("Counted: what memory does not depend on", about, ("plan", "recompute", "keep"), found)


def ratio(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def findings(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    """What the counts say, each sentence from the rows."""
    made = {name: rows[f"count-{name}-pieces"]["pieces"] for name in published if f"count-{name}-pieces" in rows}
    if not made or "count-sd15-growth-1" not in rows:
        return ""
    grown = [rows[f"count-sd15-growth-{i}"]["growth"] for i in range(len(GROWTH)) if f"count-sd15-growth-{i}" in rows]
    under = [row["recompute"] / 2**30 for row in grown]
    share = {name: piece["call"] / piece["decode and reward"] for name, piece in made.items()}
    named = lambda values: ", ".join(f"{value:.1f} ({name})" for name, value in values.items())
    gain = {name: piece["call"] / piece["call, blocks recomputed"] for name, piece in made.items()}
    decode = {name: piece["decode"] / piece["decode and reward"] for name, piece in made.items()}
    whole = grown[1]["keep"] / 2**30
    lines = [
        f"Under `recompute` memory does not depend on N, K, M or n: it is {min(under):.3f} to {max(under):.3f} GiB for all plans "
        f"above. Under `keep` all of a 50-step chain takes {whole:.0f} GiB for one image.",
        f"A guided call takes {named(share)} times what decoding and scoring one image takes. With `micro_batch` 1, decoding and "
        "scoring does not grow with the batch, but the call does. From a batch of two on, the call is the peak, whatever the "
        "method.",
        f"Decoding alone has {ratio([100 * v for v in decode.values()])}% of the peak of decoding and scoring. CLIP ViT-H mostly "
        "adds its weights, 1.2 GiB in bfloat16 without the text tower.",
        f'Recomputing block by block inside the call (memory="blocks") divides its peak by {named(gain)}. It costs one more '
        "forward pass of the live calls. This, and not the choice of a method, makes larger batches possible for the 1024-pixel "
        "models.",
    ]
    return "## What follows\n\n" + "\n".join(fill(f"* {line}", WIDTH, subsequent_indent="  ") for line in lines)


def measured(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    found = []
    for name, title in models(rows, published).items():
        for memory in MEMORIES:
            for key, label in LABELS.items():
                row = rows.get(f"cuda-{name}-{key}-{memory}")
                if row:
                    taken = f"{row['median']:.2f}" if row["median"] else "out of memory"
                    fits = [str(row["largest"].get(card, "-")) for card in ("24", "48", "80")]
                    peak = gib(row["peak"]) if row["peak"] else "-"
                    found.append((title, memory, label, row["device"], str(row["batch"]), taken, peak, *fits))
    about = (
        "Models with random weights are run on a GPU. A time is the median of several updates after one that is not counted. A "
        "peak is how far the allocator's (`torch.cuda.max_memory_allocated`) is above what it held before. The largest batch is "
        "the largest for which an update runs while the allocator may take the card's gigabytes less one for CUDA "
        "(`set_per_process_memory_fraction`)."
    )
    columns = ("model", "memory", "method", "device", "batch", "update, s", "peak, GiB", "in 24 GB", "48 GB", "80 GB")
    if found:
        return section("Measured", about, columns, found)
    command = "python -m benchmarks.sizes --device cuda --minutes 9"
    missing = f"No measurement has been made yet. Run `{command}` until it has nothing left to do, then `make sizes`."
    return f"## Measured\n\n{fill(about, WIDTH)}\n\n{missing}"


def page(folder: Path, published: dict[str, dict[str, str]], usable: float) -> str:
    """The whole page."""
    rows = read(folder)
    if not rows:
        raise SystemExit(f"error: no rows in {folder}; run python -m benchmarks.sizes --count first")
    versions = next(iter(rows.values()))["versions"]
    how = HOW.format(usable=usable, steps=next(iter(rows.values()))["steps"])
    made = "Made with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."
    sections = (
        how, compared(rows, published), counts(rows, published), parts(rows, published), growth(rows), findings(rows, published),
        measured(rows, published), configurations(rows, published), made,
    )  # fmt: skip
    return "\n\n".join(section.strip() for section in sections if section) + "\n"
