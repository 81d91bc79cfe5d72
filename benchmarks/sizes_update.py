"""One update of a method by the trainer, counted on the meta device or measured, and what an image is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import chainrule as cr
from benchmarks.sizes_models import Architecture, open_model, open_reward
from chainrule import adapters
from chainrule.adapters import Active, Band
from chainrule.cast import Member
from chainrule.chain import Memory
from chainrule.footprint import fixed_bytes, flash_attention
from chainrule.guidance import of_number
from chainrule.meters import LiveBytes
from chainrule.methods import Method, needs
from chainrule.objective import Objective, read
from chainrule.rewards import Reward, reward_of
from chainrule.settings import Finetuning
from chainrule.training import FinetuneTask

RANK, STUDENT_RANK = 8, 64  # the trainer's default; what the published few-step LoRAs have
MICRO_BATCH = 1


def settings(steps: int, memory: str = "recompute", batch: int = 1) -> Finetuning:
    """The trainer's settings of every row."""
    own = {"ema": 0.99, "rank": RANK, "micro_batch": MICRO_BATCH, "updates": 10**9}
    return Finetuning(sample_steps=steps, memory=memory, batch=batch, **own)


@dataclass
class Bench:
    """An architecture, its reward, and a method with its adapters under AdamW: everything an update needs."""

    task: FinetuneTask
    reward: Reward

    def update(self, batch: int, memory: str, steps: int) -> None:
        """One update of the trainer."""
        self.task.settings = settings(steps, memory, batch)
        self.task.update()

    def forget(self) -> None:
        """Drop the gradients of an update that did not end."""
        self.task.learner.optimizer.zero_grad(set_to_none=True)

    def fixed(self) -> dict[str, int]:
        """Bytes that are there before an update."""
        return fixed_bytes(self.task, self.reward)


def opened(
    shape: Architecture, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> tuple[cr.Model, Reward]:  # fmt: skip
    """The model and its reward, which every method of this architecture shares."""
    return open_model(shape, device, dtype, quantize), open_reward(shape, device, dtype)


@contextmanager
def with_student(model: cr.Model, method: Method, steps: int) -> Iterator[cr.Model]:
    """Within the block the model has a frozen student, if the method jumps by one."""
    if "student" not in needs(method, model.grid(steps)).members:
        yield model
        return
    student = adapters.inject(model.network, "student", rank=STUDENT_RANK, component=model.component)
    for weight in student.parameters():
        weight.requires_grad_(False)
    try:
        yield model.with_member("student", Member(model.denoiser, of_number(model.denoiser, 1.0), Active({"student": Band()})))
    finally:
        student.remove()


@contextmanager
def benched(model: cr.Model, reward: Reward, method: Method, steps: int) -> Iterator[Bench]:
    """Within the block the method's adapters are in the model, and their optimizer has its state."""
    with with_student(model, method, steps) as taught:
        task = FinetuneTask.start(taught, method, reward, ["a fox"], settings(steps))
        bench = Bench(task, reward)
        try:
            with LiveBytes(model.device):  # AdamW makes its moments at its first step
                bench.update(1, "blocks" if hasattr(model.network, "enable_gradient_checkpointing") else "recompute", 2)
            yield bench
        finally:
            task.remove()


def pieces(model: cr.Model, reward: Reward) -> dict[str, int]:
    """What one image takes at the most, bytes: a network call with its gradient, decoding, decoding and scoring, and variants."""
    adapter = model.adapt("counted", rank=RANK)
    x, condition, level = model.noise([0]), model.embed(["a fox"]), model.grid(50)[0]

    def call(live: bool = True) -> None:
        with torch.set_grad_enabled(live):
            answer = model.cast()["base"](x.clone().requires_grad_(live), level, condition)
            if live:
                answer.backward(torch.empty_like(answer))

    def image(score: Reward) -> None:
        read(model.codec.decode, Objective.of(score), x, ["a fox"], MICRO_BATCH)

    def peak(run: Callable[[], None]) -> int:
        for weight in adapter.parameters():
            weight.grad = None
        with flash_attention(), LiveBytes(model.device) as meter:
            run()
        return meter.peak

    plain = reward_of(lambda images, prompts: images.mean((1, 2, 3)), name="plain")
    found = {"call": peak(call), "call without gradient": peak(lambda: call(False))}
    found |= {"decode": peak(lambda: image(plain)), "decode and reward": peak(lambda: image(reward))}
    with model.blockwise(Memory.BLOCKS):
        found |= {"call, blocks recomputed": peak(call), "decode and reward, layers recomputed": peak(lambda: image(reward))}
    model.drop(adapter)
    return found
