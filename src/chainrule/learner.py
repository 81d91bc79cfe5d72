"""What is learned: parts under one optimizer, the average of their weights, and all of that as tensors for a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.learned import Learned


@dataclass(slots=True)
class Learner:
    """Parts under one AdamW, a group each, and the average of their weights that is saved."""

    parts: Mapping[str, Learned]
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int = 0  # updates done
    skipped: int = 0  # of them without a finite value or gradient
    before: dict[str, Tensor] | None = None  # weights and average before the last update, until it is known to be sound

    @classmethod
    def of(cls, parts: Mapping[str, Learned], weight_decay: float) -> Learner:
        """A learner before its first update."""
        groups = [
            {"params": [*part.named_parameters().values()], "rate": part.rate, "weight_decay": weight_decay * part.decay}
            for part in parts.values()
        ]
        found = cls(parts, torch.optim.AdamW(groups), {})
        found.average = {name: weight.detach().clone() for name, weight in found.named_parameters().items()}
        return found

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every part's weights, the frozen ones too."""
        return {f"{name}/{key}": w for name, part in self.parts.items() for key, w in part.named_parameters().items()}

    def train_only(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Train these parts and freeze the others, whose optimizer state stays; returns the trained weights."""
        chosen = set(names)
        for name, part in self.parts.items():
            for weight in part.named_parameters().values():
                weight.requires_grad_(name in chosen)
        return [weight for name in self.parts if name in chosen for weight in self.parts[name].named_parameters().values()]

    def update(
        self, weights: list[nn.Parameter], gradient: Tensor, value: float, *, lr: float, clip: float, ema: float
    ) -> tuple[float, bool]:
        """One AdamW step of these weights along a flat gradient, clipped to the norm `clip`; then the average.

        Nothing moves, and the update counts as skipped, where the gradient or the `value` it is of is not finite, or the
        weights would not be. Returns the gradient's norm and whether the step was made.
        """
        norm = float(gradient.norm())
        finite = math.isfinite(norm) and math.isfinite(value)
        if finite:
            self.before = self._copy()
            self._step(weights, gradient * min(1.0, clip / (norm + 1e-12)), lr)
            kept = min(ema, (self.step + 1) / (self.step + 10)) if ema else 0.0
            for name, weight in self.named_parameters().items():
                self.average[name].lerp_(weight.detach(), 1 - kept)
            if not all(bool(weight.isfinite().all()) for weight in weights):
                self.take_back()
                finite = False
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.skipped = self.step + 1, self.skipped + (not finite)
        return norm, finite

    def take_back(self) -> bool:
        """Undo the last update, because of what its weights led to. False if it is undone already, or was before a resume."""
        before, self.before = self.before, None
        if before:
            for name, weight in self.named_parameters().items():
                weight.data.copy_(before[f"weight/{name}"])
                self.average[name].copy_(before[f"average/{name}"])
        return before is not None

    def _copy(self) -> dict[str, Tensor]:
        """The weights and their average, where memory is cheap."""
        found = {f"weight/{name}": weight.detach() for name, weight in self.named_parameters().items()}
        found |= {f"average/{name}": value for name, value in self.average.items()}
        return {name: value.to("cpu", copy=True) for name, value in found.items() if not value.is_meta}

    def _step(self, weights: list[nn.Parameter], gradient: Tensor, lr: float) -> None:
        for weight, piece in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
            weight.grad = piece.view_as(weight).to(weight)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, with `state`, as flat tensors."""
        found = {f"average/{k}": v for k, v in self.average.items()}
        for name, weight in self.named_parameters().items():
            found[f"weight/{name}"] = weight.detach()
            found |= {f"optimizer/{key}/{name}": value for key, value in self.optimizer.state[weight].items()}
        return found

    @property
    def state(self) -> dict[str, Any]:
        """The counts, for JSON."""
        return {"step": self.step, "skipped": self.skipped}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError when it is of other parts."""
        self.step, self.skipped = state["step"], state["skipped"]
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
        """Within the block the parts carry their averages."""
        kept = {name: weight.detach().clone() for name, weight in self.named_parameters().items()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.named_parameters().items():
            weight.data.copy_(values[name])


def gradients(weights: list[nn.Parameter]) -> Tensor:
    """All gradients as one flat vector on the first weight's device, zeros where a plan left a weight unused."""
    flat = [(w.grad if w.grad is not None else torch.zeros_like(w)).flatten() for w in weights]
    return torch.cat([piece.to(flat[0].device) for piece in flat])
