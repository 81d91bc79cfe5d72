"""A critic: the reward's own network with a LoRA, which foresees a finished image's reward after one call of its chain.

The network is called once for both of its uses: its gradient at the images leads the adapter, and the squared error of what it
foresaw leads the LoRA (DRaFT C.2, arXiv:2309.17400).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from chainrule import half
from chainrule.adapters import Adapter, inject, selected, unused_name
from chainrule.adapters.lora import every_layer
from chainrule.chain import Memory
from chainrule.errors import UserError
from chainrule.estimators.batch import Batch
from chainrule.gradient import AtCalls, Result
from chainrule.learner import Learner, gradients
from chainrule.methods import Critic
from chainrule.models import Model
from chainrule.objective import Objective, look, micro_batches
from chainrule.plan import Plan
from chainrule.rewards import Reward

STATE = "critic/"


@dataclass(slots=True)
class ActorCritic:
    """An estimator with a critic of its own, which one rollout teaches and asks."""

    learner: Learner
    adapters: Mapping[str, Adapter]
    lr: float
    clip: float
    pairs: list[tuple[float, float]] = field(default_factory=list)  # of the update: foreseen, and returned
    error: float = 0.0

    @classmethod
    def of(cls, kind: Critic, model: Model, reward: Reward, *, lr: float, clip: float, seed: int) -> ActorCritic:
        """A fresh critic, which says what the reward says. Raises UserError for a reward without a network."""
        adapters: dict[str, Adapter] = {}
        for i, (network, layers) in enumerate(networks(reward, model.size, model.device).items()):
            name = unused_name(network, "critic")
            adapters[str(i)] = inject(network, name, rank=kind.rank, seed=seed + i, targets=layers, component="reward")
        if not adapters:
            raise UserError(f"the reward {reward.name!r} has no network that a critic could be made of; take another method")
        return cls(Learner.of(adapters, 0.0), adapters, lr * kind.rate, clip)

    def add(self, model: Model, plan: Plan, objective: Objective, batch: Batch) -> list[Result]:
        """Add the critic's gradient at the actions to the model's leaves, and the critic's own to its. A result for each part."""
        self.pairs, self.error = [], 0.0
        results = [self._part(model, plan, objective, batch, prompts, seeds) for prompts, seeds in batch.split()]
        foreseen, returned = zip(*batch.processes.gather(self.pairs), strict=True)
        told = {"critic correlation": correlation(foreseen, returned)}
        return [replace(result, terms={**result.terms, **told}) for result in results]

    def _part(
        self, model: Model, plan: Plan, objective: Objective, batch: Batch, prompts: list[str], seeds: list[int]
    ) -> Result:  # fmt: skip
        memory, micro = Memory(batch.memory), batch.micro_batch or model.micro_batch
        chain, share = model.chain(prompts, seeds, memory), 1 / len(prompts) / batch.parts
        at_calls = AtCalls(objective.on_calls, chain, share)
        with model.blockwise(memory):
            walks = chain.walk(plan, model.noise(seeds))
            finished = next(walks)
            reading = look(model.codec.decode, objective, finished.image, prompts, micro)
            acted = next(walks)
            upstream, error = self._ask(model, objective, acted.image, prompts, -reading.loss, micro, share)
            acted.pull(share * upstream, at_calls)
        chain.pull_computed()
        self.error += share * error
        terms = {name: float(values.mean()) for name, values in reading.terms.items()} | at_calls.means()
        terms["critic error"] = error / len(prompts)
        return Result(reading.rewards, reading.images, (float(reading.rewards.mean()),), terms)

    def _ask(
        self, model: Model, objective: Objective, latents: Tensor, prompts: Sequence[str], returns: Tensor, micro: int, share: float
    ) -> tuple[Tensor, float]:  # fmt: skip
        """d(sum of -foreseen)/d(latents), and the sum of squared errors, whose mean's gradient goes to the critic."""
        found, total = [], 0.0
        weights = self.learner.train_only(self.adapters)  # whoever made a reward of the same network since has frozen it
        for rows in micro_batches(latents, micro):
            leaf = latents[rows].detach().requires_grad_()
            with torch.enable_grad():
                images = model.codec.decode(leaf)
                pixels = images.detach().requires_grad_()
                with self.on():
                    foreseen = -objective.of_images(pixels, prompts[rows], rows).loss
                error = (foreseen - returns[rows]).square().sum()
                (upstream,) = torch.autograd.grad(-foreseen.sum(), pixels, retain_graph=True)
                (share * error).backward(inputs=weights)
            found.append(half.gradient(images, leaf, upstream))
            total += float(error)
            self.pairs += zip(foreseen.tolist(), returns[rows].tolist(), strict=True)
        return torch.cat(found), total

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within the block the reward's networks answer as the critic."""
        with ExitStack() as stack:
            for adapter in self.adapters.values():
                stack.enter_context(selected(adapter.network, {adapter.name: 1.0}))
            yield

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """One update of the critic."""
        weights = self.learner.train_only(self.adapters)
        self.learner.update(weights, mean(gradients(weights)), self.error, lr=self.lr, clip=self.clip, ema=0.0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The critic's weights and its optimizer's state."""
        return {STATE + name: value for name, value in self.learner.tensors().items()}, {"critic": self.learner.state}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError when it is of another critic."""
        own = {name.removeprefix(STATE): value for name, value in tensors.items() if name.startswith(STATE)}
        self.learner.restore(own, state["critic"])

    def remove(self) -> None:
        """Give the reward its networks back, bit for bit."""
        for adapter in self.adapters.values():
            adapter.remove()


def networks(reward: Reward, size: tuple[int, int], device: torch.device) -> dict[nn.Module, tuple[str, ...]]:
    """The networks through which a reward sees an image, and the linear layers of each that it calls, by name.

    What reads the prompt alone is not among them: it is asked once for each prompt.
    """
    called: dict[nn.Module, None] = {}

    def saw(module: nn.Module, given: object, answer: object) -> None:
        parts = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, tuple) else (answer,)
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            called[module] = None

    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    hook = register_module_forward_hook(saw)
    try:
        with torch.enable_grad():
            reward(image, ["a photo of a cat"])
    finally:
        hook.remove()
    inside = {part for module in called for part in module.modules() if part is not module}
    found = {}
    for module in called:
        own = {name: module.get_submodule(name) for name in every_layer(module) if name}  # another critic's LoRA may be in it
        layers = tuple(n for n, layer in own.items() if layer in called and type(getattr(layer, "base_layer", layer)) is nn.Linear)
        if module not in inside and layers:
            found[module] = layers
    return found


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's, 0 where one of the two does not vary."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else 0.0
