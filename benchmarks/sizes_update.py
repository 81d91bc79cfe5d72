"""One update of a method, as the trainer makes it, and how many bytes it takes: counted on the meta device, or measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import chainrule as cr
from benchmarks.sizes_count import Rehearsed, flash_attention
from benchmarks.sizes_models import Architecture, load, reward
from chainrule import adapters
from chainrule.adapters import Active, Band
from chainrule.adapters.select import recompute
from chainrule.cast import Member
from chainrule.chain import Memory
from chainrule.gradient import backpropagate
from chainrule.guidance import of_number
from chainrule.learner import Learner, gradients
from chainrule.meters import LiveBytes
from chainrule.methods import Method, needs
from chainrule.objective import Objective, read
from chainrule.plan import Plan
from chainrule.rewards import RewardFunction

RANK, STUDENT_RANK = 8, 64  # the trainer's default; what the published few-step LoRAs have
MICRO_BATCH = 1


def size_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Bench:
    """An architecture, its reward, and a method with its adapters under AdamW: everything an update needs."""

    model: cr.Model
    judge: nn.Module
    score: RewardFunction
    method: Method
    steps: int
    learner: Learner

    @property
    def dtype(self) -> torch.dtype:
        return next(weight.dtype for weight in self.model.network.parameters())

    @property
    def guidance(self) -> float:
        return self.model.defaults.guidance

    def plan(self, number: int = 0) -> Plan:
        return self.method.plan(self.model.grid(self.steps), Random(number))

    def update(self, batch: int, memory: str, meter: LiveBytes | None = None, number: int = 0) -> None:
        """The gradient, the clipping, AdamW's step and the average of the weights, as `FinetuneTask.update` has them."""
        plan, prompts, seeds = self.plan(number), ["a fox"] * batch, range(batch)
        weights = self.learner.train_only(needs(self.method, self.model.grid(self.steps)).trained)
        chain = self.model.chain(prompts, seeds, Memory(memory))
        if meter:
            cast: Any = {name: Rehearsed(member, meter) for name, member in chain.cast.items()}
            chain = replace(chain, cast=cast)
        noise = self.model.noise(seeds)
        with self.model.blockwise(Memory(memory)):
            backpropagate(chain, plan, noise, self.model.codec.decode, self.score, prompts, micro_batch=MICRO_BATCH)
        self.learner.update(weights, gradients(weights), 0.0, lr=0.0, clip=1.0, ema=0.99)

    def fixed(self) -> dict[str, int]:
        """Bytes that are there before an update: the weights of every part, and the adapters with all they need."""
        parts = {name: part for name, part in self.model.pipe.components.items() if isinstance(part, nn.Module)}
        own = list(self.learner.named_parameters().values())
        loras = {id(weight) for weight in own}
        found = {name: size_of([w for w in part.parameters() if id(w) not in loras]) for name, part in parts.items()}
        moments = [t for state in self.learner.optimizer.state.values() for t in state.values() if t.numel() > 1]
        return found | {"reward": size_of([*self.judge.parameters()]), "adapters": size_of(own + moments + self.averages())}

    def averages(self) -> list[Tensor]:
        return list(self.learner.average.values())


def open_bench(shape: Architecture, device: torch.device, dtype: torch.dtype) -> tuple[cr.Model, nn.Module, RewardFunction]:
    """The model and its reward, which every method of this architecture shares."""
    return load(shape, device, dtype), *reward(shape, device)


@contextmanager
def adapted(model: cr.Model, judge: nn.Module, score: RewardFunction, method: Method, steps: int) -> Iterator[Bench]:
    """Within the block the method's adapters are in the model, a student's too, and their optimizer has its state."""
    own, student = needs(method, model.grid(steps)), None
    with model.device:
        trained = {
            name: model.adapt(name, rank=RANK, seed=i, levels=levels) for i, (name, levels) in enumerate(own.adapters.items())
        }
        if "student" in own.members:
            student = adapters.inject(model.network, "student", rank=STUDENT_RANK, component=model.component)
            for weight in student.parameters():
                weight.requires_grad_(False)
            member = Member(model.denoiser, of_number(model.denoiser, 1.0), Active({"student": Band()}))
            model = model.with_member("student", member)
    learner = Learner.of(trained, weight_decay=0.0)
    every = learner.train_only(trained)
    with LiveBytes(model.device):  # AdamW makes its moments at its first step
        learner.update(every, torch.zeros_like(gradients(every)), 0.0, lr=0.0, clip=1.0, ema=0.99)
    try:
        yield Bench(model, judge, score, method, steps, learner)
    finally:
        for adapter in [*trained.values(), *([student] if student else [])]:
            model.drop(adapter)


def counted(bench: Bench, batch: int, memory: str, *, rehearse: bool = True) -> int:
    """The most bytes an update holds above what was there before it, by its operations' results."""
    with flash_attention(), LiveBytes(bench.model.device) as meter:
        bench.update(batch, memory, meter if rehearse else None)
    return meter.peak


def pieces(bench: Bench) -> dict[str, int]:
    """What one image takes at the most, bytes: a network call with its gradient, decoding, decoding and scoring, and variants."""
    model, prompts = bench.model, ["a fox"]
    x, condition, level = model.noise([0]), model.embed(["a fox"]), model.grid(bench.steps)[0]

    def call(live: bool = True) -> None:
        with torch.set_grad_enabled(live):
            answer = model.cast()["base"](x.clone().requires_grad_(live), level, condition)
            if live:
                answer.backward(torch.empty_like(answer))

    def image(score: RewardFunction) -> None:
        read(model.codec.decode, Objective.of(score), x, prompts, MICRO_BATCH)

    def peak(run: Callable[[], None]) -> int:
        bench.learner.optimizer.zero_grad(set_to_none=True)
        with flash_attention(), LiveBytes(model.device) as meter:
            run()
        return meter.peak

    plain: RewardFunction = lambda images, prompts: images.mean((1, 2, 3))
    found = {"call": peak(call), "call without gradient": peak(lambda: call(False))}
    found |= {"decode": peak(lambda: image(plain)), "decode and reward": peak(lambda: image(bench.score))}
    network: Any = model.network
    network.enable_gradient_checkpointing(recompute)
    model.pipe.vae.enable_gradient_checkpointing()
    found |= {"call, blocks recomputed": peak(call), "decode and reward, blocks recomputed": peak(lambda: image(bench.score))}
    network.disable_gradient_checkpointing()
    model.pipe.vae.disable_gradient_checkpointing()
    with _halved(bench):
        found["call, adapters in the network's type"] = peak(call)
    return found


@contextmanager
def _halved(bench: Bench) -> Iterator[None]:
    """Within the block the adapters' weights have the network's type."""
    weights = [weight for adapter in bench.learner.adapters.values() for weight in adapter.parameters()]
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.grad, weight.data = None, weight.data.to(bench.dtype)
    try:
        yield
    finally:
        for weight, before in zip(weights, kept, strict=True):
            weight.grad, weight.data = None, before
