"""One batch of images on their way to a lower loss: the variable, its optimizer, and the best of every image so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from random import Random
from typing import Any

import torch
from torch import Tensor

from chainrule.adapters import Adapter
from chainrule.chain import Memory
from chainrule.errors import UserError
from chainrule.models import Model
from chainrule.models.pictures import pictures
from chainrule.noise import derive
from chainrule.objective import Distance, Objective, distance
from chainrule.plan import walk
from chainrule.processes import Processes
from chainrule.rewards import Reward
from chainrule.settings import Steering
from chainrule.steer.found import Steered
from chainrule.steer.gradients import GRADIENTS
from chainrule.steer.guided_sampling import GUIDES
from chainrule.steer.images import invert
from chainrule.steer.problem import Problem, Seen
from chainrule.steer.variables import Over

OPTIMIZERS = {
    "adam": lambda leaves, lr: torch.optim.Adam(leaves, lr=lr),
    "sgd": lambda leaves, lr: torch.optim.SGD(leaves, lr=lr),
    "momentum": lambda leaves, lr: torch.optim.SGD(leaves, lr=lr, momentum=0.9),
}


def updates_of(settings: Steering) -> int:
    """How many updates a batch has: one where a single run is guided."""
    return 1 if settings.gradient in GUIDES else settings.updates


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch is made of: its prompts and seeds, and the pictures (b, 3, h, w) in [0, 1] it starts from, if any."""

    prompts: list[str]
    seeds: list[int]
    pictures: Tensor | None = None

    def share(self, processes: Processes) -> Batch:
        """This process's images: every `count`-th one."""
        mine = slice(processes.index, None, processes.count)
        return Batch(self.prompts[mine], self.seeds[mine], None if self.pictures is None else self.pictures[mine])


@dataclass(slots=True)
class Best:
    """The best of every image so far: losses, rewards, distances and the number of updates it was found after, (b,) each."""

    losses: Tensor
    rewards: Tensor
    distances: Tensor
    updates: Tensor
    images: Tensor


class Search:
    """One batch: its chain, its variable, and the best of every image so far. All of it runs without a gradient but the calls."""

    def __init__(self, model: Model, settings: Steering, over: Over, reward: Reward, batch: Batch, adapter: Adapter | None) -> None:
        self.settings, self.over, self.way = settings, over, GRADIENTS.get(settings.gradient)
        chain = model.guided(settings.guidance).chain(batch.prompts, batch.seeds, Memory(settings.memory))
        levels = model.grid(settings.sample_steps)
        grid = over.grid(levels, model.solver.process.schedule.offset)
        reference = None
        if batch.pictures is not None:
            latents = model.codec.encode(batch.pictures).to(model.device, model.dtype)
            x, reference = invert(chain, latents, grid), model.codec.decode(latents)
        else:
            head = takewhile(lambda jump: jump.start != grid[0], walk(levels))
            x = chain.end(model.noise(batch.seeds), tuple(head))
        self.start = x.clone()
        self.variable, self.x = over.kind.start(chain, x, grid, adapter)
        self.optimizer = OPTIMIZERS[settings.optimizer](list(self.variable.named_parameters().values()), settings.lr)
        self.reward = Objective.of(reward).scaled(1 - settings.keep)
        self.problem = Problem(self.variable.into(chain), grid, model.codec.decode, batch.prompts, self.reward)
        latent = (self.way.end if self.way else GRADIENTS["full"].end)(self.problem, self.x)
        if reference is None:
            reference = torch.cat([model.codec.decode(part) for part in latent.split(self.problem.part)])
        self._hold(reference)
        first = self.problem.read(latent)
        if not bool(first.losses.isfinite().all()):
            raise UserError(f"the loss is {first.losses.tolist()} before the first update; it must be finite")
        self.inverted = distance(first.images, reference).tolist()
        rewards, far, losses = self.numbers(first)
        self.best = Best(losses, rewards, far, torch.zeros(len(losses), dtype=torch.long), first.images)
        self.rows = [_row(0, rewards, losses, far)]
        self.number = self.idle = 0

    def _hold(self, reference: Tensor) -> None:
        """Compare with these images, (b, 3, h, w): in rewards that look at them, and in the distance that is kept."""
        self.reference, objective = reference, self.reward.against(reference)
        if self.settings.keep:
            objective = objective.with_terms(Distance(reference, self.settings.keep))
        self.problem = replace(self.problem, objective=objective)

    @property
    def done(self) -> bool:
        """Whether it has had its updates, or no image got better for long enough."""
        return self.number >= updates_of(self.settings) or bool(self.settings.patience and self.idle >= self.settings.patience)

    def update(self) -> tuple[Seen, float]:
        """One update; returns what was seen before it, and the gradient's norm. Nothing moves where that is not finite."""
        if self.settings.gradient in GUIDES:
            seen = GUIDES[self.settings.gradient][1](self.settings.strength)(self.problem, self.x.detach())
            self.number += 1
            self._look(seen, self.number)
            return seen, 0.0
        assert self.way is not None
        self.optimizer.zero_grad()
        seen = self.way.make(self.over.kind)(self.problem, self.x, Random(derive(0, "call", self.number)))
        if self.x.requires_grad:
            self.x.grad = seen.gradient
        if self.number:  # the first image is the one before
            self._look(seen, self.number)
            self.idle = 0 if bool((self.best.updates == self.number).any()) else self.idle + 1
        norm = self._norm()
        if math.isfinite(norm):
            self.optimizer.step()
            self._project()
        elif not self.number:
            raise UserError(f"the gradient {self.settings.gradient!r} of this reward is not finite at the first update")
        self.number += 1
        return seen, norm

    def _norm(self) -> float:
        """Of the gradient of all leaves. Raises UserError where the image does not depend on any."""
        grads = [weight.grad for weight in self.variable.named_parameters().values() if weight.grad is not None]
        if not grads:
            raise UserError(f"the image does not depend on the {self.over.kind.name} here; steer something else")
        return float(torch.stack([grad.double().norm() for grad in grads]).norm())

    def finish(self) -> None:
        """Look at the image of the variable after its last update."""
        if self.way is not None:
            self._look(self.problem.read(self.way.end(self.problem, self.x)), self.number)

    def numbers(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, distances and losses of what was seen, (b,) on the CPU."""
        rewards = (seen.rewards / (1 - self.settings.keep)).float().cpu()
        return rewards, distance(seen.images, self.reference).float().cpu(), seen.losses.float().cpu()

    def _look(self, seen: Seen, number: int) -> None:
        """Keep what got better; add a row of the curve."""
        rewards, far, losses = self.numbers(seen)
        better = (losses < self.best.losses) & losses.isfinite()
        where = better.to(seen.images.device).view(-1, 1, 1, 1)
        self.best.losses = torch.where(better, losses, self.best.losses)
        self.best.rewards = torch.where(better, rewards, self.best.rewards)
        self.best.distances = torch.where(better, far, self.best.distances)
        self.best.images = torch.where(where, seen.images, self.best.images)
        self.best.updates[better] = number
        self.rows.append(_row(number, rewards, losses, far))

    def _project(self) -> None:
        s = self.settings
        renormalized = s.renormalize
        if renormalized is None:
            renormalized = bool(self.way and self.way.renormalizes and self.over.kind.is_state)
        if s.bound:
            self.x.copy_(self.start + (self.x - self.start).clamp(-s.bound, s.bound))
        elif renormalized:
            norms = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (self.start, self.x)]
            self.x.mul_(norms[0] / norms[1])

    def found(self, prompts: list[str]) -> Steered:
        """What this batch has found so far."""
        return Steered(
            prompts, pictures(self.best.images), pictures(self.reference), self.best.rewards.tolist(), self._before().tolist(),
            self.best.distances.tolist(), self.best.updates.tolist(), self.inverted, list(self.rows),
        )  # fmt: skip

    def _before(self) -> Tensor:
        """The reward of the images as they were: for a given picture its own, not that of what its latent samples."""
        problem, values = self.problem, []
        for start in range(0, len(self.reference), problem.part):
            rows = slice(start, start + problem.part)
            values.append(problem.objective.of_images(self.reference[rows], problem.prompts[rows], rows).rewards)
        return torch.cat(values) / (1 - self.settings.keep)

    def tensors(self) -> dict[str, Tensor]:
        """The variable, its optimizer's state and the best so far, as flat tensors."""
        kept = {f"best/{name}": getattr(self.best, name) for name in Best.__slots__}
        for name, weight in self.variable.named_parameters().items():
            kept[f"variable/{name}"] = weight.detach()
            moments = {k: v for k, v in self.optimizer.state[weight].items() if isinstance(v, Tensor)}
            kept |= {f"optimizer/{key}/{name}": value for key, value in moments.items()}
        return kept

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Back to a saved state. Raises KeyError or RuntimeError when it is of another batch."""
        self.number, self.idle, self.rows = state["number"], state["idle"], state["rows"]
        for name in Best.__slots__:
            setattr(self.best, name, tensors[f"best/{name}"].to(getattr(self.best, name)))
        for name, weight in self.variable.named_parameters().items():
            weight.data.copy_(tensors[f"variable/{name}"])
            keys = [key.split("/")[1] for key in tensors if key.startswith("optimizer/") and key.endswith(f"/{name}")]
            moments = {key: tensors[f"optimizer/{key}/{name}"] for key in keys}
            self.optimizer.state[weight] = {k: v.clone() if k == "step" else v.to(weight, copy=True) for k, v in moments.items()}


def _row(number: int, rewards: Tensor, losses: Tensor, far: Tensor) -> dict[str, float]:
    return {"step": number, "reward": _mean(rewards), "loss": _mean(losses), "distance": _mean(far), "count": len(losses)}


def _mean(values: Tensor) -> float:
    value = float(values.mean())
    return value if math.isfinite(value) else math.nan
