"""The training loop every stage of the recipe shares: Muon, EMA, one progress line, resumable checkpoints.

Runs in one process, or in several under `torchrun` (gradients are averaged by one flat all-reduce). Batches are
drawn from (stage, step, rank), so a stage killed and started again sees the data it would have seen.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chainrule.errors import UserError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def orthogonalize(matrix: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest semi-orthogonal matrix (Muon, Jordan et al. 2024)."""
    x = matrix.bfloat16()
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


@dataclass
class Muon:
    """Muon on every weight with two or more dimensions (flattened to (out, rest)), Adam on the rest.

    Weights whose names hold a word of `by_adam` get Adam too. torch.optim.Muon takes matrices only, and convolutions are
    most of what is trained here.
    """

    named: dict[str, nn.Parameter]
    lr: float
    adam_lr: float = 1e-3
    by_adam: tuple[str, ...] = ("embedding", "logit_scale")
    state: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, number: int, decay: float) -> None:
        """Update the weights and clear their gradients. `number` is the step, from 0; `decay` scales the learning rates."""
        for name, weight in self.named.items():
            grad = weight.grad
            if grad is None:
                continue
            first = self.state.setdefault(f"{name}/first", torch.zeros_like(weight))
            if weight.ndim >= 2 and not any(word in name for word in self.by_adam):
                first.mul_(0.95).add_(grad)
                update = orthogonalize((grad + 0.95 * first).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view_as(weight), alpha=-self.lr * decay * scale)
            else:
                second = self.state.setdefault(f"{name}/second", torch.zeros_like(weight))
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.01)
                scale = (second / (1 - 0.99 ** (number + 1))).sqrt().add_(1e-8)
                weight.addcdiv_(first, scale, value=-self.adam_lr * decay / (1 - 0.9 ** (number + 1)))
            weight.grad = None


def _average_gradients(named: dict[str, nn.Parameter]) -> None:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in named.values()]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for weight, mean in zip(named.values(), flat.div_(WORLD).split([g.numel() for g in grads]), strict=True):
        weight.grad = mean.view_as(weight)


def _load(saved: Path, named: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: Muon) -> int:
    """Load a checkpoint into the weights, their averages and the optimizer. Returns its step."""
    stored = load_file(saved, device=str(DEVICE))
    for name, weight in named.items():
        weight.data.copy_(stored[f"weight/{name}"])
        average[name].copy_(stored[f"average/{name}"])
    optimizer.state = {k.removeprefix("state/"): v for k, v in stored.items() if k.startswith("state/")}
    return int(stored["step"])


def _save(saved: Path, named: dict[str, nn.Parameter], average: dict[str, Tensor], optimizer: Muon, step: int) -> None:
    tensors = {f"weight/{n}": p.detach() for n, p in named.items()}
    tensors |= {f"average/{n}": p for n, p in average.items()}
    tensors |= {f"state/{n}": p for n, p in optimizer.state.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()} | {"step": torch.tensor(step)}, f"{saved}.part")
    os.replace(f"{saved}.part", saved)


def train(
    stage: str,
    module: nn.Module,
    loss: Callable[[random.Random], Tensor],
    out: Path,
    *,
    steps: int,
    lr: float,
    flat: float = 0.45,
    ema: float = 0.997,
    every: int = 200,
    check: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train `module` in place, ending on its averaged weights; continue from `out/STAGE.safetensors` if it is there.

    The learning rate is flat for the first `flat` of `steps`, then falls linearly to 0. `check` measures the
    averaged weights every `every` steps; the curve goes to `out/STAGE.jsonl`.
    """
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer, average = Muon(named, lr), {n: p.detach().clone() for n, p in named.items()}
    saved = out / f"{stage}.safetensors"
    start = _load(saved, named, average, optimizer) if saved.exists() else 0
    began, seen = time.time(), 0.0
    for step in range(start, steps):
        value = loss(random.Random(f"{stage}/{step}/{RANK}"))
        value.backward()
        if WORLD > 1:
            _average_gradients(named)
        optimizer.step(step, min(1.0, (1 - step / steps) / (1 - flat)))
        keep = min(ema, (step + 1) / (step + 10))
        for name, weight in named.items():
            average[name].lerp_(weight.detach(), 1 - keep)
        seen += (value.item() - seen) * max(0.02, 1 / (step - start + 1))
        done = step + 1
        if RANK == 0 and (done % every == 0 or done == steps):
            _save(saved, named, average, optimizer, done)
            row = {"step": done, "loss": round(seen, 5), "minutes": round((time.time() - began) / 60, 2)}
            if check:
                with swapped(named, average):
                    row |= check()
            with (out / f"{stage}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(stage, row, f"of {steps}", flush=True)
    for name, weight in named.items():
        weight.data.copy_(average[name])


def start(stage: str, module: nn.Module, out: Path, step: int) -> None:
    """Write the checkpoint of a stage after `step` steps, with `module`'s weights and without optimizer state."""
    tensors = {
        f"{kind}/{n}": p.detach().float().contiguous() for kind in ("weight", "average") for n, p in module.named_parameters()
    }
    save_file({k: v.clone() for k, v in tensors.items()} | {"step": torch.tensor(step)}, out / f"{stage}.safetensors")


def restore(stage: str, module: nn.Module, out: Path) -> int:
    """Load a stage's averaged weights into `module`. Returns the steps it was trained for. Raises UserError if there are none."""
    saved = out / f"{stage}.safetensors"
    if not saved.exists():
        name = "judges" if stage.startswith("judge-") else stage
        raise UserError(f"{saved} is missing; train it first with: python -m chainrule.tiny {name} --out {out}")
    stored = load_file(saved, device=str(DEVICE))
    averages = {k.removeprefix("average/"): v for k, v in stored.items() if k.startswith("average/")}
    for name, weight in module.named_parameters():
        weight.data.copy_(averages[name])
    return int(stored["step"])


class swapped:
    """A context in which a module has its averaged weights."""

    def __init__(self, named: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self.named, self.average = named, average

    def _swap(self) -> None:
        for name, weight in self.named.items():
            kept = weight.detach().clone()
            weight.data.copy_(self.average[name])
            self.average[name].copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
