"""Fine-tuning an adapter by reward gradients. The training step is `Trainer.update`, whole."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from chainrule.adapters import Adapter
from chainrule.adapters.select import gradients
from chainrule.chain import Memory, Result, Score, backpropagate
from chainrule.errors import UserError
from chainrule.methods import Method
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.objective import divergence
from chainrule.plan import Plan
from chainrule.prompts import prompts as read_prompts
from chainrule.rewards import Reward, checked, probe, reward_of
from chainrule.runs import Run
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


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run shows while it trains: a grid of the same images, and the held-out reward on them."""

    prompts: list[str]
    seeds: list[int]
    held_out: Reward | None = None
    seen: list[float] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)

    @property
    def stale(self) -> int:
        """Looks since the best held-out reward."""
        return len(self.seen) - 1 - self.seen.index(max(self.seen)) if self.seen else 0

    def look(self, trainer: Trainer) -> tuple[Tensor, float | None]:
        s = trainer.settings
        images = trainer.model.render(self.prompts, self.seeds, s.sample_steps, s.guidance)
        if not self.held_out:
            return images, None
        with torch.no_grad():
            return images, float(self.held_out(images.to(trainer.model.device), self.prompts).mean())


def finetune(
    model: Model,
    method: Method,
    reward: Score,
    prompts: str | Sequence[str],
    *,
    out: str | Path,
    held_out: Score | None = None,
    watch: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_update: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Run:
    """Fine-tune an adapter so that its images score higher, and return the run it left behind.

    `options` are the fields of `chainrule.settings.Settings`: steps, batch, lr, rank, seed, sample_steps, guidance, ...
    `held_out` is a reward that is only watched (and stops the run early with `patience`). `watch` are the prompts of the
    sample grids. The folder `out` must be new or empty, unless `resume` (continues, bit for bit) or `overwrite`.
    Ctrl-C saves what is there and returns. Raises UserError for bad input before anything is written.
    """
    from chainrule.session import Session

    settings, said = Settings.make(options), read_prompts(prompts)
    scorer, judge = reward_of(reward), reward_of(held_out) if held_out else None
    if settings.patience and not judge:
        raise UserError("patience needs a held-out reward to watch; pass held_out")
    method.plan(model.grid(settings.sample_steps), Random(0))
    Run(Path(out)).check_place(resume=resume, overwrite=overwrite)
    for each in filter(None, (scorer, judge)):
        probe(each.to(model.device), model.image_size)
    config = {"model": model.name, "method": repr(method), "reward": scorer.name, "held_out": judge.name if judge else None,
              "prompts": prompts if isinstance(prompts, str) else said, **settings.model_dump()}  # fmt: skip
    accelerator = processes(settings, model.device, out)
    with accelerator.main_process_first():  # the others find the folder made
        main = accelerator.is_main_process
        run = Run.create(out, config, resume=resume, overwrite=overwrite) if main else Run(Path(out))
    trainer = build(model, method, scorer, said, settings, accelerator)
    shown = list(watch) if watch else said[:: max(1, len(said) // 8)][:8]
    try:
        return Session(run).train(trainer, Watch(shown, list(range(len(shown))), judge), resume, on_update)
    finally:
        model.active.pop(trainer.adapter.name, None)
        trainer.adapter.remove()
