"""What is learned: adapters, their optimizer and average, how far it has come, and all of that as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.adapters import Adapter


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
class Learner:
    """Adapters under AdamW, and the average of their weights that is saved."""

    adapters: dict[str, Adapter]
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of(cls, adapters: dict[str, Adapter], lr: float, weight_decay: float) -> Learner:
        weights = [weight for adapter in adapters.values() for weight in adapter.parameters()]
        made = cls(adapters, torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay), {})
        made.average = {name: weight.detach().clone() for name, weight in made.named_parameters().items()}
        return made

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every adapter's weights, the frozen ones too."""
        return {f"{name}/{key}": w for name, adapter in self.adapters.items() for key, w in adapter.named_parameters().items()}

    def train_only(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Train these adapters and freeze the others, whose optimizer state stays; returns the trained weights."""
        chosen = set(names)
        for name, adapter in self.adapters.items():
            for weight in adapter.parameters():
                weight.requires_grad_(name in chosen)
        return [weight for name in self.adapters if name in chosen for weight in self.adapters[name].parameters()]

    def step(self, weights: list[nn.Parameter], gradient: Tensor, *, lr: float, clip: float, ema: float) -> None:
        """One AdamW step of these weights along a flat gradient, clipped to the norm `clip`; then the average."""
        gradient = gradient * min(1.0, clip / (float(gradient.norm()) + 1e-12))
        for weight, piece in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
            weight.grad = piece.view_as(weight).to(weight.dtype)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        step = self.progress.step
        for name, weight in self.named_parameters().items():
            self.average[name].lerp_(weight.detach(), 1 - min(ema, (step + 1) / (step + 10)) if ema else 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, with `state`, as flat tensors."""
        found = {f"average/{k}": v for k, v in self.average.items()}
        for name, weight in self.named_parameters().items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"optimizer/{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    @property
    def state(self) -> dict[str, Any]:
        return asdict(self.progress)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state. KeyError, TypeError or RuntimeError when it is of other adapters."""
        self.progress = Progress(**state)
        for name, weight in self.named_parameters().items():
            weight.data.copy_(tensors[f"weight/{name}"])
            self.average[name].copy_(tensors[f"average/{name}"])
            keys = [k.split("/")[1] for k in tensors if k.startswith("optimizer/") and k.endswith(f"/{name}")]
            # AdamW counts its steps on the CPU whatever the weights are on.
            self.optimizer.state[weight] = {
                key: tensors[f"optimizer/{key}/{name}"].to("cpu" if key == "step" else weight.device, copy=True) for key in keys
            }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the adapters carry their averages."""
        kept = {name: weight.detach().clone() for name, weight in self.named_parameters().items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.named_parameters().items():
            weight.data.copy_(values[name])
