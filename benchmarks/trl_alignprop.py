"""An update of ours beside one of TRL 0.23.1's AlignProp: K = 1 and all calls.

    make bench-trl        (makes an environment of its own, .venv-trl, and runs this there)

The same model, batch, steps, guidance, reward and LoRA (rank 4 on the attention's layers, which TRL does not let one choose), one
thread, in turns after a round that is not counted. TRL recomputes the network's calls; ours are kept or recomputed, eager or
compiled. Writes benchmarks/trl_alignprop.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from accelerate import PartialState

PartialState(cpu=True)  # TRL's trainer logs before it makes one, which is an error

from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline  # noqa: E402

import chainrule as cr  # noqa: E402
from benchmarks.bench import machine, race  # noqa: E402
from chainrule.adapters import Adapter, Band, inject  # noqa: E402
from chainrule.methods import DRaFT  # noqa: E402
from chainrule.models.compiled import check_compiler, compiled  # noqa: E402
from chainrule.report.tables import markdown  # noqa: E402
from chainrule.rewards import Symmetry  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # where TRL puts its LoRA
WANTED = {"K = 1": 0.90, "all calls": 0.65}


def theirs(folder: Path, args: argparse.Namespace, adapter: Adapter, last: bool) -> Callable[[int], object]:
    """An update of TRL's trainer."""
    config = AlignPropConfig(
        num_epochs=1, train_gradient_accumulation_steps=1, train_batch_size=args.batch, sample_num_steps=args.steps,
        truncated_backprop_rand=False, truncated_backprop_timestep=args.steps - 1 if last else 0, mixed_precision="no",
        save_freq=10**9, sample_guidance_scale=args.guidance, train_learning_rate=1e-5, seed=0,
    )  # fmt: skip
    said = iter(_prompts(args) * 10**4)
    pipe = DefaultDDPOStableDiffusionPipeline(str(folder), use_lora=True)
    reward = Symmetry()
    trainer = AlignPropTrainer(config, lambda images, prompts, _: (reward(images, prompts), {}), lambda: (next(said), {}), pipe)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    count = sum(weight.numel() for weight in pipe.unet.parameters() if weight.requires_grad)
    assert count == sum(weight.numel() for weight in adapter.parameters()), "both train the same layers"
    return lambda number: trainer.step(0, number + 2)


def ours(model: cr.Model, args: argparse.Namespace, adapter: Adapter, method: DRaFT, memory: str) -> Callable[[int], object]:
    """The same update here."""
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)

    def update(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        plan = method.plan(model.grid(args.steps), Random(number))
        cr.gradient(model, plan, Symmetry(), _prompts(args), range(args.batch), guidance=args.guidance, memory=memory)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

    return update


def _prompts(args: argparse.Namespace) -> list[str]:
    return cr.prompts("emoji")[: args.batch]


def measured(args: argparse.Namespace) -> list[tuple[str, str, list[float]]]:
    """(which gradient, which way, our ratios to TRL's time, round by round)."""
    cpu, found = torch.device("cpu"), []
    with tempfile.TemporaryDirectory() as folder:
        cr.load("tiny-emoji", device="cpu").pipe.save_pretrained(folder)
        model = cr.load("tiny-emoji", device="cpu")
        adapter = inject(model.network, "mine", rank=4, targets=LAYERS)
        model.active["mine"] = Band()
        for name, last in (("K = 1", True), ("all calls", False)):
            method = DRaFT(1) if last else DRaFT()
            peer = theirs(Path(folder), args, adapter, last)
            for ending in ("", ", compiled") if args.compile else ("",):
                if ending and last:
                    compiled(model)
                ways = {f"{memory}{ending}": ours(model, args, adapter, method, memory) for memory in ("keep", "recompute")}
                seconds = race({"TRL": peer, **ways}, args.rounds, cpu)
                for way in ways:
                    found.append((name, way, [a / b for a, b in zip(seconds[way], seconds["TRL"], strict=True)]))
    return found


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("rounds", 5), ("batch", 4), ("steps", 50), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.compile:
        check_compiler("cpu")
    rows = [
        [name, way, f"{median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{WANTED[name]:.2f}"]
        for name, way, ratios in measured(args)
    ]
    facts: dict[str, Any] = machine(torch.device("cpu"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "diffusers", "transformers", "peft", "chainrule"))
    text = (
        "# Beside TRL's AlignProp\n\n"
        f"Made by `make bench-trl` on {date.today()}: {facts['cpu']}, {args.threads} thread; {packages}. tiny-emoji, a batch "
        f"of {args.batch}, {args.steps} steps, guidance {args.guidance:g}, reward symmetry, the same LoRA (rank 4, attention's "
        f"layers). A ratio is our time over TRL's in the same round: the middle one of {args.rounds}, the least and the most. "
        "TRL recomputes every call.\n\n"
        + markdown(["gradient through", "ours", "time / TRL's", "least to most", "wanted"], rows)
        + "\n"
    )
    print(text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
