"""The gradient of a reward through a plan, and the trainer. The training step is `Trainer.update`, whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from chainrule.adapters import Adapter, save_bands
from chainrule.adapters.lora import gradients
from chainrule.chain import Memory, Result, Score, backpropagate
from chainrule.errors import UserError
from chainrule.methods import Method, stages
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
class Progress:
    """How far a run has come: its updates, the stage it is in, and what the end of that stage depends on."""

    step: int = 0
    skipped: int = 0
    stage: int = 0  # counted from 0
    began: int = 0  # the update the stage began with
    smooth: float | None = None  # the reward of the stage's updates, averaged over about the last ten
    best: float | None = None
    best_at: int = 0

    def saw(self, reward: float) -> None:
        """Count an update of this reward."""
        self.smooth = reward if self.smooth is None else 0.9 * self.smooth + 0.1 * reward
        if self.best is None or self.smooth > self.best:
            self.best, self.best_at = self.smooth, self.step

    def next_stage(self) -> None:
        self.stage, self.began, self.smooth, self.best, self.best_at = self.stage + 1, self.step, None, None, self.step


@dataclass(slots=True)
class Trainer:
    """Everything an update needs. Its whole state is the adapters, the optimizer, the averages and `progress`."""

    model: Model
    adapters: dict[str, Adapter]
    stages: tuple[Method, ...]
    reward: Reward
    prompts: list[str]
    settings: Settings
    accelerator: Accelerator
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)
    bad: int = 0

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def method(self) -> Method:
        """What is trained now."""
        return self.stages[self.progress.stage]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every adapter's weights, the frozen ones too."""
        return {f"{name}/{key}": w for name, adapter in self.adapters.items() for key, w in adapter.named_parameters().items()}

    def plan(self, step: int) -> Plan:
        """The plan of an update, the same on every process."""
        return self.method.plan(self.model.grid(self.settings.sample_steps), Random(derive(self.settings.seed, "plan", step)))

    def batch(self, step: int) -> tuple[list[str], list[int]]:
        """This process's share of the prompts and image seeds of an update: the same global batch for any number."""
        rng, size = Random(derive(self.settings.seed, "prompts", step)), self.settings.batch
        said = [rng.choice(self.prompts) for _ in range(size)]
        seeds = [derive(self.settings.seed, "image", step, k) for k in range(size)]
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return said[mine], seeds[mine]

    def update(self) -> dict[str, Any]:
        s, step, began = self.settings, self.step, time.perf_counter()
        plan = self.plan(step)
        weights = self._thaw(plan.trained or tuple(self.adapters))
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
            for name, weight in self.named_parameters().items():
                self.average[name].lerp_(weight.detach(), 1 - min(s.ema, (step + 1) / (step + 10)) if s.ema else 1.0)
            self.bad = 0
            self.progress.saw(reward)
        else:
            self.progress.skipped, self.bad = self.progress.skipped + 1, self.bad + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        row = {"step": self.step, "reward": reward, "grad_norm": norm, "lr": rate}
        row |= {"seconds": time.perf_counter() - began, "skipped": self.progress.skipped}
        if len(self.stages) > 1:
            row["stage"] = self.progress.stage + 1
            self._advance()
        return row

    def _thaw(self, trained: tuple[str, ...]) -> list[nn.Parameter]:
        """Train these adapters and freeze the others; returns the trained weights. Their optimizer state stays."""
        for name, adapter in self.adapters.items():
            for weight in adapter.parameters():
                weight.requires_grad_(name in trained)
        return [weight for name in self.adapters if name in trained for weight in self.adapters[name].parameters()]

    def _advance(self) -> None:
        """Go on to the next stage when this one has had its updates, or stopped getting better."""
        s, now = self.settings, self.progress
        length = s.stage_steps[now.stage] if s.stage_steps else _share(s.steps, len(self.stages), now.stage)
        over = now.step - now.began >= length or (s.plateau and now.step - now.best_at > s.plateau)
        if over and now.stage + 1 < len(self.stages):
            now.next_stage()

    def tensors(self) -> dict[str, Tensor]:
        """The trainer's state as flat tensors."""
        found = {f"average/{k}": v for k, v in self.average.items()}
        for name, weight in self.named_parameters().items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"optimizer/{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.progress = Progress(**state)
        for name, weight in self.named_parameters().items():
            weight.data.copy_(tensors[f"weight/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            keys = [k.split("/")[1] for k in tensors if k.startswith("optimizer/") and k.endswith(f"/{name}")]
            self.optimizer.state[weight] = {key: tensors[f"optimizer/{key}/{name}"].clone() for key in keys}

    def save_adapter(self, folder: Path) -> None:
        """The averaged adapter, in the format plain diffusers loads; several by level in a folder each, with their levels."""
        kept = {name: weight.detach().clone() for name, weight in self.named_parameters().items()}
        self._put(self.average)
        levels = self.plan(0).adapters
        for name, adapter in self.adapters.items():
            adapter.save(folder / name if levels else folder)
        if levels:
            save_bands(folder, levels)
        self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.named_parameters().items():
            weight.data.copy_(values[name])

    def remove(self) -> None:
        """Give the model back without the adapters."""
        for adapter in self.adapters.values():
            self.model.drop(adapter)


def _share(steps: int, stages: int, stage: int) -> int:
    """The updates of one stage when all get the same, earlier ones what is left over."""
    return steps // stages + (stage < steps % stages)


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
    turns = stages(method)
    levels = turns[0].plan(model.grid(settings.sample_steps), Random(0)).adapters
    if settings.stage_steps and len(settings.stage_steps) != len(turns):
        raise UserError(f"stage_steps has {len(settings.stage_steps)} lengths, but {method} has {len(turns)} stages")
    adapters = {
        name: model.adapt(name, rank=settings.rank, seed=settings.seed + i, levels=levels.get(name))
        for i, name in enumerate(levels or ("default",))
    }
    weights = [weight for adapter in adapters.values() for weight in adapter.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay)
    made = Trainer(model, adapters, turns, reward, prompts, settings, accelerator, optimizer, {})
    made.average = {name: weight.detach().clone() for name, weight in made.named_parameters().items()}
    return made
