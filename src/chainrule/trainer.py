"""The gradient of a reward through a plan, and the trainer. The training step is `Trainer.update`, whole."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator

from chainrule.adapters import save_bands
from chainrule.adapters.lora import gradients
from chainrule.chain import Memory, Result, Score, backpropagate
from chainrule.errors import UserError
from chainrule.learner import Learner
from chainrule.methods import Method, needs, stages
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.objective import divergence
from chainrule.plan import Plan
from chainrule.rewards import Reward, checked, reward_of
from chainrule.settings import Finetuning


def gradient(
    model: Model, plan: Plan, reward: Score, prompts: Sequence[str], seeds: Sequence[int], *,
    guidance: float | None = None, memory: str = "recompute", micro_batch: int | None = None, kl: float = 0.0, scale: float = 1.0,
) -> Result:  # fmt: skip
    """Add the gradient of -mean(reward) over these prompts to `.grad` of the model's trainable leaves.

    Returns rewards (b,) and images (b, 3, h, w) in [0, 1]. `memory` is "recompute", "blocks" or "keep"; it never changes a number.
    `micro_batch` images are decoded and scored at a time (default: 8, fewer where they are large).
    `kl` weighs the distance to the base model at the last call; `scale` multiplies the whole loss.
    """
    check_cast(model, {jump.via for jump in plan.jumps})
    guidance = model.defaults.guidance if guidance is None else guidance
    chain = model.chain(prompts, seeds, guidance, Memory(memory))
    penalty = divergence(model.bare(guidance), chain.condition, kl * scale) if kl else None
    score = partial(checked, reward_of(reward))
    with model.blockwise(Memory(memory)):
        return backpropagate(
            chain, plan, model.noise(seeds), model.decode, score, prompts, part=micro_batch or model.micro_batch, penalty=penalty,
            scale=scale,
        )  # fmt: skip


@dataclass(slots=True)
class Trainer:
    """Everything an update needs. Its whole state is the learner's."""

    model: Model
    learner: Learner
    stages: tuple[Method, ...]
    lengths: list[int]  # updates of each stage
    reward: Reward
    prompts: list[str]
    settings: Finetuning
    accelerator: Accelerator
    bad: int = 0  # updates skipped in a row

    @property
    def step(self) -> int:
        return self.learner.progress.step

    def plan(self) -> Plan:
        """The plan of the next update, the same on every process."""
        method = self.stages[self.learner.progress.stage]
        return method.plan(self.model.grid(self.settings.sample_steps), Random(derive(self.settings.seed, "plan", self.step)))

    def batch(self, step: int) -> tuple[list[str], list[int]]:
        """This process's share of the prompts and image seeds of an update: the same global batch for any number."""
        rng, size = Random(derive(self.settings.seed, "prompts", step)), self.settings.batch
        said = [rng.choice(self.prompts) for _ in range(size)]
        seeds = [derive(self.settings.seed, "image", step, k) for k in range(size)]
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return said[mine], seeds[mine]

    def update(self) -> dict[str, Any]:
        s, step, began = self.settings, self.step, time.perf_counter()
        plan, progress = self.plan(), self.learner.progress
        weights = self.learner.train_only(needs(self.stages[progress.stage], self.model.grid(s.sample_steps)).trained)
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
            self.learner.step(weights, flat, lr=rate, clip=s.clip, ema=s.ema)
            self.bad = 0
            progress.saw(reward)
        else:
            progress.skipped, self.bad = progress.skipped + 1, self.bad + 1
        self.learner.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        row = {"step": self.step, "reward": reward, "grad_norm": norm, "lr": rate}
        row |= {"seconds": time.perf_counter() - began, "skipped": progress.skipped}
        if len(self.stages) > 1:
            row["stage"] = progress.stage + 1
            self._advance()
        return row

    def _advance(self) -> None:
        """Go on to the next stage when this one has had its updates, or stopped getting better."""
        s, now = self.settings, self.learner.progress
        over = now.step - now.began >= self.lengths[now.stage] or (s.plateau and now.step - now.best_at > s.plateau)
        if over and now.stage + 1 < len(self.stages):
            now.next_stage()

    def save_adapter(self, folder: Path) -> None:
        """The averaged adapter, in the format plain diffusers loads; several by level in a folder each, with their levels."""
        bands = needs(self.stages[0], self.model.grid(self.settings.sample_steps)).adapters
        alone = list(bands.values()) == [None]
        with self.learner.averaged():
            for name, adapter in self.learner.adapters.items():
                adapter.save(folder if alone else folder / name)
        if not alone:
            save_bands(folder, bands)

    def remove(self) -> None:
        """Give the model back without the adapters."""
        for adapter in self.learner.adapters.values():
            self.model.drop(adapter)


def stage_lengths(settings: Finetuning, count: int) -> list[int]:
    """The updates of each stage: as given, or equal shares, earlier ones with what is left over. UserError if it does not fit."""
    if settings.updates < count:
        raise UserError(f"updates is {settings.updates}, but the method has {count} stages; give every stage an update at least")
    lengths = settings.stage_steps or [settings.updates // count + (i < settings.updates % count) for i in range(count)]
    if len(lengths) != count:
        raise UserError(f"stage_steps has {len(lengths)} lengths, but the method has {count} stage{'s' * (count > 1)}")
    return lengths


def check_cast(model: Model, members: Iterable[str]) -> None:
    """UserError for members that jump by a student when the model has none."""
    if not model.student and "student" in members:
        raise UserError("this plan jumps by a student, and the model has none; use model.with_student(...)")


def processes(settings: Finetuning, device: torch.device, out: str | Path) -> Accelerator:
    """The processes of this run, and its tracker. UserError for a batch they cannot share or a missing tracker."""
    tracker = None if settings.tracker == "none" else settings.tracker
    accelerator = Accelerator(log_with=tracker, cpu=device.type == "cpu", project_dir=out)
    if tracker and not accelerator.log_with:
        raise UserError(f"the tracker {tracker!r} is not installed; pip install {tracker}")
    if settings.batch % (accelerator.num_processes * settings.accumulate):
        raise UserError(f"batch is {settings.batch}, but must be divisible by {accelerator.num_processes} processes x accumulate")
    return accelerator


def build(
    model: Model, method: Method, reward: Reward, prompts: list[str], settings: Finetuning, accelerator: Accelerator
) -> Trainer:
    """A trainer at step 0."""
    turns = stages(method)
    lengths = stage_lengths(settings, len(turns))
    bands = needs(method, model.grid(settings.sample_steps)).adapters
    adapters = {
        name: model.adapt(name, rank=settings.rank, seed=settings.seed + i, levels=levels)
        for i, (name, levels) in enumerate(bands.items())
    }
    learner = Learner.of(adapters, settings.lr, settings.weight_decay)
    return Trainer(model, learner, turns, lengths, reward, prompts, settings, accelerator)
