"""docs/performance.md from the rows that `sizes.py` left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainrule.report.tables import markdown

Row = dict[str, Any]
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

**The numbers of the first part are counts, not measurements.** The models are built on PyTorch's meta device, where a
tensor has a shape and no numbers, and one update goes through the library's own walker, decoder, reward and optimizer. Every
operation, forwards and backwards, says how many bytes it makes; a tensor's bytes count until it is freed, and the peak is the
most that was held at once.

* Counted: the weights of the denoiser, the VAE, the text encoders and the reward; adapters with AdamW's two moments and the
  averaged weights; gradients; activations; all that an operation returns.
* Not counted: scratch space inside kernels (workspaces of convolutions and matrix products, attention's backward pass in
  float32), the allocator's fragmentation, the CUDA context, encoding the prompts. A batch "fits" where the count is at most
  {usable:.0%} of the card's gigabytes, 10^9 bytes each; a card sold as 80 GB may have a few percent more.
* Attention counts as a fused kernel (flash or memory-efficient), which keeps q, k, v, its output and a float32 per row. The
  meta device would otherwise take it apart, with a matrix of all pairs of tokens; so would a GPU where no fused kernel serves.
* bfloat16 weights, except the reward's and the adapters', which the library holds in float32. LoRAs of rank 8 (four of them for
  ShortFT, and a frozen student's of rank 64), {steps} steps, the pipeline's own guidance, one image at a time decoded and scored
  (`micro_batch` 1; the trainer's default is 8, fewer for large images), PickScore's CLIP ViT-H/14.
* `tests/test_sizes.py` holds the count against the same update of tiny models with real numbers: the same to the byte in
  float32, within 1% in bfloat16, where a CPU keeps the statistics of layer norms in less.
"""


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
    said = "Built from the published configurations; the numbers of parameters tell whether they are those."
    return f"## The models\n\n{said}\n\n{markdown(columns, found)}"


def further(peaks: dict[str, int]) -> str:
    """What one more image adds, from the two largest batches counted."""
    points = sorted((int(batch), peak) for batch, peak in peaks.items())
    if len(points) < 2:
        return "-"
    (a, low), (b, high) = points[-2:]
    return gib((high - low) / (b - a))


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
    said = (
        '"Before" is what lies there between updates: weights and the adapters\' state. "One image" is an update\'s peak above '
        'that for a batch of one, "each further" what another image adds. The last columns are the largest batch.'
    )
    return f"## Counted: one update\n\n{said}\n\n{markdown(columns, found)}"


def parts(rows: dict[str, Row], published: dict[str, dict[str, str]]) -> str:
    names = (
        "call without gradient", "call", "call, adapters in the network's type", "call, blocks recomputed", "decode",
        "decode and reward", "decode and reward, blocks recomputed",
    )  # fmt: skip
    found = [
        (title, *(gib(rows[f"count-{name}-pieces"]["pieces"][each]) for each in names))
        for name, title in models(rows, published).items()
        if f"count-{name}-pieces" in rows
    ]
    said = (
        "Peaks for one image, GiB. A call is the guided one (both halves; FLUX.1 reads its guidance and has one), forwards and "
        'backwards. "Blocks recomputed" is gradient checkpointing inside the network and the decoder, which memory="blocks" '
        'switches on; "adapters in the network\'s type" are LoRAs in bfloat16.'
    )
    return f"## Counted: what an image is made of\n\n{said}\n\n{markdown(('model', *names), found)}"


def growth(rows: dict[str, Row]) -> str:
    found = []
    for number, label in enumerate(GROWTH):
        row = rows.get(f"count-sd15-growth-{number}")
        if row:
            found.append((label, *(f"{row['growth'][memory] / 2**30:.3f}" for memory in ("recompute", "keep"))))
    said = "Stable Diffusion 1.5, one image: the peak above the weights in GiB, along steps N, live calls K and M, and copies n."
    return f"## Counted: what memory does not depend on\n\n{said}\n\n{markdown(('plan', 'recompute', 'keep'), found)}"


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
    cast = {name: 1 - piece["call, adapters in the network's type"] / piece["call"] for name, piece in made.items()}
    decode = {name: piece["decode"] / piece["decode and reward"] for name, piece in made.items()}
    whole = grown[1]["keep"] / 2**30
    lines = [
        f"Under `recompute` memory does not depend on N, K, M or n: {min(under):.3f} to {max(under):.3f} GiB for all plans above. "
        f"Under `keep` all of a 50-step chain takes {whole:.0f} GiB for one image.",
        f"A guided call takes {named(share)} times what decoding and scoring one image takes. With `micro_batch` 1 the latter does "
        "not grow with the batch, the former does: from a batch of two on, the call is the peak, whatever the method.",
        f"Decoding alone has {ratio([100 * v for v in decode.values()])}% of the peak of decoding and scoring. CLIP ViT-H adds its "
        "weights above all: 3.7 GiB in float32, the text tower included.",
        "peft casts the input of every adapted layer to the adapter's float32 and keeps it: with adapters in the network's own "
        f"type a call's peak is {ratio([100 * v for v in cast.values()])}% lower, but updates are rounded.",
        f'Recomputing block by block inside the call (memory="blocks") divides its peak by {named(gain)}. That, not the method, '
        "is what lets the 1024-pixel models have larger batches; it costs one more forward pass of the live calls.",
    ]
    return "## What follows\n\n" + "\n".join(f"* {line}" for line in lines)


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
    said = (
        "Random weights on a GPU: the median of several updates after one that is not counted; the allocator's peak "
        "(`torch.cuda.max_memory_allocated`) above what was there before; the largest batch for which an update runs while "
        "the allocator may take no more than the card's gigabytes less one for CUDA (`set_per_process_memory_fraction`)."
    )
    columns = ("model", "memory", "method", "device", "batch", "update, s", "peak, GiB", "in 24 GB", "48 GB", "80 GB")
    command = "python -m benchmarks.sizes --device cuda --minutes 9"
    rest = markdown(columns, found) if found else f"Nothing yet. `{command}`, as often as it takes, then `make sizes`."
    return f"## Measured\n\n{said}\n\n{rest}"


def page(folder: Path, published: dict[str, dict[str, str]], usable: float) -> str:
    """The whole page."""
    rows = read(folder)
    if not rows:
        raise SystemExit(f"error: no rows in {folder}; run python -m benchmarks.sizes --count first")
    versions = next(iter(rows.values()))["versions"]
    how = HOW.format(usable=usable, steps=next(iter(rows.values()))["steps"])
    made = "Made with " + ", ".join(f"{name} {number}" for name, number in versions.items()) + "."
    sections = (
        how, counts(rows, published), parts(rows, published), growth(rows), findings(rows, published),
        measured(rows, published), configurations(rows, published), made,
    )  # fmt: skip
    return "\n\n".join(section.strip() for section in sections if section) + "\n"
