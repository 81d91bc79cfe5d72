"""The gradient of a reward through a plan, and the trainer. The training step is `Trainer.update`, whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from chainrule.adapters import Adapter
from chainrule.adapters.lora import gradients
from chainrule.chain import Memory, Result, Score, backpropagate
from chainrule.errors import UserError
from chainrule.methods import Method
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.objective import divergence
from chainrule.plan import Plan
from chainrule.rewards import Reward, checked, reward_of
from chainrule.settings import Settings


def gradient(
    model: Model, plan: Plan, reward: Score, prompts: Sequence[str], seeds: Sequence[int], *,
    guidance: float | None = None, memory: str = "recompute", micro_batch: int = 8, kl: float = 0.0, scale: float = 1.0,
) -> Result:  # fmt: skip
    """Add the gradient of -mean(reward) over these prompts to `.grad` of the model's trainable leaves.

    Returns rewards (b,) and images (b, 3, h, w) in [0, 1]. `memory` is "recompute" or "keep"; it never changes a number.
    `kl` weighs the distance to the base model at the last call; `scale` multiplies the whole loss.
    """
    guidance = model.defaults.guidance if guidance is None else guidance
    chain = model.chain(prompts, seeds, guidance, Memory(memory))
    penalty = divergence(model.bare(guidance), chain.condition, kl * scale) if kl else None
    score = partial(checked, reward_of(reward))
    return backpropagate(
        chain, plan, model.noise(seeds), model.decode, score, prompts, part=micro_batch, penalty=penalty, scale=scale
    )


@dataclass(slots=True)
class Trainer:
    """Everything an update needs. Its whole state is the adapter, the optimizer, the average and `step`."""

    model: Model
    adapter: Adapter
    method: Method
    reward: Reward
    prompts: list[str]
    settings: Settings
    accelerator: Accelerator
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int = 0
    skipped: int = 0
    bad: int = 0

    def batch(self, step: int) -> tuple[list[str], list[int]]:
        """This process's share of the prompts and image seeds of an update: the same global batch for any number."""
        rng, size = Random(derive(self.settings.seed, "prompts", step)), self.settings.batch
        said = [rng.choice(self.prompts) for _ in range(size)]
        seeds = [derive(self.settings.seed, "image", step, k) for k in range(size)]
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return said[mine], seeds[mine]

    def update(self) -> dict[str, Any]:
        s, step, began = self.settings, self.step, time.perf_counter()
        weights = self.adapter.parameters()
        plan = self.method.plan(self.model.grid(s.sample_steps), Random(derive(s.seed, "plan", step)))
        prompts, seeds = self.batch(step)
        rewards = []
        for part in range(s.accumulate):
            some = slice(part, None, s.accumulate)
            rewards.append(
                gradient(
                    self.model, plan, self.reward, prompts[some], seeds[some], guidance=s.guidance, memory=s.memory,
                    micro_batch=s.micro_batch, kl=s.kl, scale=1 / s.accumulate,
                ).rewards
            )  # fmt: skip
        # Adapters are small: one flat mean over processes, zeros where the plan left a weight unused.
        flat = self.accelerator.reduce(gradients(weights), "mean")
        reward = float(self.accelerator.reduce(torch.cat(rewards).mean(), "mean"))
        norm = float(flat.norm())
        rate = s.lr * (min(10 / math.sqrt(step + 1), 1.0) if s.schedule == "sqrt" else 1.0)
        if math.isfinite(norm) and math.isfinite(reward):
            flat = flat * min(1.0, s.clip / (norm + 1e-12))
            for weight, piece in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                weight.grad = piece.view_as(weight).to(weight.dtype)
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            for name, weight in self.adapter.named_parameters().items():
                self.average[name].lerp_(weight.detach(), 1 - min(s.ema, (step + 1) / (step + 10)) if s.ema else 1.0)
            self.bad = 0
        else:
            self.skipped, self.bad = self.skipped + 1, self.bad + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - began
        return {"step": self.step, "reward": reward, "grad_norm": norm, "lr": rate, "seconds": seconds, "skipped": self.skipped}

    def tensors(self) -> dict[str, Tensor]:
        """The trainer's state as flat tensors."""
        found = {f"average/{k}": v for k, v in self.average.items()}
        for name, weight in self.adapter.named_parameters().items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"optimizer/{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.step, self.skipped = state["step"], state["skipped"]
        for name, weight in self.adapter.named_parameters().items():
            weight.data.copy_(tensors[f"weight/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            keys = [k.split("/")[1] for k in tensors if k.startswith("optimizer/") and k.endswith(f"/{name}")]
            self.optimizer.state[weight] = {key: tensors[f"optimizer/{key}/{name}"].clone() for key in keys}

    def save_adapter(self, folder: Path) -> None:
        """The averaged adapter, in the format plain diffusers loads."""
        kept = {name: weight.detach().clone() for name, weight in self.adapter.named_parameters().items()}
        self._put(self.average)
        self.adapter.save(folder)
        self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.adapter.named_parameters().items():
            weight.data.copy_(values[name])


def processes(settings: Settings, device: torch.device, out: str | Path) -> Accelerator:
    """The processes of this run, and its tracker. UserError for a batch they cannot share or a missing tracker."""
    tracker = None if settings.tracker == "none" else settings.tracker
    accelerator = Accelerator(log_with=tracker, cpu=device.type == "cpu", project_dir=out)
    if tracker and not accelerator.log_with:
        raise UserError(f"the tracker {tracker!r} is not installed; pip install {tracker}")
    if settings.batch % (accelerator.num_processes * settings.accumulate):
        raise UserError(f"batch is {settings.batch}, but must be divisible by {accelerator.num_processes} processes x accumulate")
    return accelerator


def build(
    model: Model, method: Method, reward: Reward, prompts: list[str], settings: Settings, accelerator: Accelerator
) -> Trainer:
    """A trainer at step 0."""
    adapter = model.adapt("default", rank=settings.rank, seed=settings.seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    average = {name: weight.detach().clone() for name, weight in adapter.named_parameters().items()}
    return Trainer(model, adapter, method, reward, prompts, settings, accelerator, optimizer, average)
