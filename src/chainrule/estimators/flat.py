"""RSA-FT: the gradient is that of a nearby worse adapter on nearby worse images (arXiv:2603.21175), around any estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from chainrule.estimators.batch import Batch, Estimator
from chainrule.gradient import Result
from chainrule.learner import gradients
from chainrule.models import Model
from chainrule.objective import Objective, RewardTerm
from chainrule.plan import Plan
from chainrule.rewards import Nearby


@dataclass(slots=True)
class Flat:
    """An estimator around another: it asks twice, and the second time where the loss is `radius` of the weights away higher.

    The rewards are read at nearby images of the same radius. `weights` are what is trained; they are as they were afterwards.
    """

    inner: Estimator
    radius: float
    weights: Callable[[], list[nn.Parameter]]

    def add(self, model: Model, plan: Plan, objective: Objective, batch: Batch) -> list[Result]:
        """Add the gradient at the nearby weights to `.grad` of the model's leaves. A result for each part."""
        terms = [
            replace(term, reward=Nearby(term.reward, self.radius)) if isinstance(term, RewardTerm) and term.weight < 0 else term
            for term in objective.terms
        ]
        near, weights = Objective(tuple(terms)), [weight for weight in self.weights() if weight.requires_grad]
        self.inner.add(model, plan, near, batch)
        flat = batch.processes.mean(gradients(weights))
        step = self.radius * flat / flat.norm().clamp(min=1e-30)
        kept = [weight.detach().clone() for weight in weights]
        for weight, piece in zip(weights, step.split([w.numel() for w in weights]), strict=True):
            weight.data.add_(piece.view_as(weight).to(weight))
            weight.grad = None
        try:
            return self.inner.add(model, plan, near, batch)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.data.copy_(before)

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """The update is made."""
        self.inner.settle(mean)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs of the other."""
        return self.inner.state()

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state of the other."""
        self.inner.restore(tensors, state)

    def remove(self) -> None:
        """Take out what the other has put into networks."""
        self.inner.remove()
