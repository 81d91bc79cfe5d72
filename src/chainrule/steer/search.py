"""One batch of images on their way to a lower loss: the variable, its optimizer, and the best of every image so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from chainrule.noise import derive
from chainrule.objective import Distance, Objective, distance
from chainrule.pictures import pictures
from chainrule.plan import walk
from chainrule.processes import ALONE, Processes
from chainrule.rewards import Reward
from chainrule.settings import Steering
from chainrule.steer.found import Steered
from chainrule.steer.gradients import GRADIENTS
from chainrule.steer.guided_sampling import GUIDES
from chainrule.steer.images import invert
from chainrule.steer.kinds import Over
from chainrule.steer.problem import Problem, Seen
from chainrule.steer.share import Share
from chainrule.steer.variables import Variable

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

    prompts: Sequence[str]
    seeds: Sequence[int]
    pictures: Tensor | None = None

    def of(self, images: Sequence[int]) -> Batch:
        """Some of the images."""
        pictures = None if self.pictures is None else self.pictures[list(images)]
        return Batch([self.prompts[k] for k in images], [self.seeds[k] for k in images], pictures)

    def parts(self, size: int) -> list[Batch]:
        """The images in batches of at most this size."""
        numbers = range(len(self.prompts))
        return [self.of(numbers[first : first + size]) for first in numbers[::size]]


@dataclass(slots=True)
class Best:
    """The best of every image so far: losses, rewards, distances and the number of updates it was found after, (b,) each."""

    losses: Tensor
    rewards: Tensor
    distances: Tensor
    updates: Tensor
    images: Tensor


class Search:
    """One batch: its variable, and the best of every image so far. All of it runs without a gradient but the calls.

    Every process holds the whole of it. The images of a pass are shared among the processes: `problem` is that of this
    process's images, and what each has seen is put together before anything is made of it.
    """

    def __init__(
        self, model: Model, settings: Steering, over: Over, reward: Reward, batch: Batch, adapter: Adapter | None = None,
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.settings, self.over, self.way = settings, over, GRADIENTS.get(settings.gradient)
        self.share = Share(len(batch.prompts), processes)
        mine, model = batch.of(self.share.images), model.guided(settings.guidance)
        chain = model.chain(mine.prompts, mine.seeds, Memory(settings.memory))
        levels = model.grid(settings.sample_steps)
        grid = over.grid(levels, model.solver.process.schedule.offset)
        reference = None
        if mine.pictures is not None:
            latents = model.codec.encode(mine.pictures).to(model.device, model.dtype)
            x, reference = invert(chain, latents, grid), model.codec.decode(latents)
        else:
            head = takewhile(lambda jump: jump.start != grid[0], walk(levels))
            x = chain.end(model.noise(mine.seeds), tuple(head))
        self.start = self.share.rows(x).clone()
        whole = chain if processes.count == 1 else model.chain(batch.prompts, batch.seeds)
        self.variable, self.x = over.kind.start(whole, self.start, grid, adapter)
        self.optimizer = OPTIMIZERS[settings.optimizer](list(self.variable.named_parameters().values()), settings.lr)
        self.problem = Problem(chain, grid, model.codec.decode, mine.prompts, Objective.of(reward).scaled(1 - settings.keep))
        latent = self._end()
        if reference is None:
            reference = torch.cat([model.codec.decode(part) for part in latent.split(self.problem.part)])
        self._hold(reference)
        first = self.share.seen(self.problem.read(latent))
        if not bool(first.losses.isfinite().all()):
            raise UserError(f"the loss is {first.losses.tolist()} before the first update; it must be finite")
        self.inverted = distance(first.images, self.reference).tolist()
        rewards, far, losses = self.numbers(first)
        self.best = Best(losses, rewards, far, torch.zeros(len(losses), dtype=torch.long), first.images)
        self.rows = [_row(0, rewards, losses, far)]
        self.number = self.idle = 0

    def _hold(self, reference: Tensor) -> None:
        """Compare with these images of this process, (n, 3, h, w): in rewards that look at them, and in the distance kept."""
        objective = self.problem.objective.against(reference)
        if self.settings.keep:
            objective = objective.with_terms(Distance(reference, self.settings.keep))
        self.problem = replace(self.problem, objective=objective)
        self.reference, self.before = self.share.rows(reference), self.share.rows(self._rewards(reference)).tolist()

    @property
    def done(self) -> bool:
        """Whether it has had its updates, or no image got better for long enough."""
        return self.number >= updates_of(self.settings) or bool(self.settings.patience and self.idle >= self.settings.patience)

    def _mine(self) -> tuple[Variable, Problem, Tensor]:
        """This process's images: the variable with leaves of its own, the problem that it is part of, and the first state."""
        part = self.variable.of(self.share.images)
        return part, replace(self.problem, chain=part.into(self.problem.chain)), self.x.detach()[self.share.images]

    def _end(self) -> Tensor:
        """Where the chains of this process's images lead, without gradient."""
        _, problem, x = self._mine()
        return (self.way or GRADIENTS["full"]).end(problem, x)

    def update(self) -> tuple[Seen, float]:
        """One update; returns what was seen before it, and the gradient's norm.

        Nothing moves, and no image counts as better, where that or the mean reward is not finite.
        """
        part, problem, x = self._mine()
        if self.way is None:
            seen = self.share.seen(GUIDES[self.settings.gradient][1](self.settings.strength)(problem, x))
            self.number += 1
            self._look(seen)
            return seen, 0.0
        self.optimizer.zero_grad()
        seen = self.share.seen(self.way.make(self.over.kind)(problem, x, Random(derive(0, "call", self.number))))
        norm = self._gather(part, seen)
        finite = math.isfinite(norm) and bool(seen.rewards.mean().isfinite())
        if self.number:  # the first image is the one before
            better = self._look(seen, keep=finite)
            self.idle = 0 if better else self.idle + finite
        if finite:
            self.optimizer.step()
            self._project()
        elif not self.number:
            raise UserError(f"the gradient {self.settings.gradient!r} of this reward is not finite at the first update")
        self.number += 1
        return seen, norm

    def _gather(self, part: Variable, seen: Seen) -> float:
        """Give the variable the gradients of all its parts; returns their norm. Raises UserError where there are none."""
        join = self.share.total if self.variable.shared else self.share.rows
        weights = self.variable.named_parameters()
        for name, leaf in part.named_parameters().items():
            if leaf.grad is not None:
                weights[name].grad = join(leaf.grad)
        if self.over.kind.is_state:
            self.x.grad = seen.gradient
        grads = [weight.grad for weight in weights.values() if weight.grad is not None]
        if not grads:
            raise UserError(f"the image does not depend on the {self.over.kind.name} here; steer something else")
        return float(torch.stack([grad.double().norm() for grad in grads]).norm())

    def finish(self) -> None:
        """Look at the image of the variable after its last update."""
        if self.way is not None:
            self._look(self.share.seen(self.problem.read(self._end())))

    def numbers(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, distances and losses of what was seen, (b,) on the CPU."""
        rewards = (seen.rewards / (1 - self.settings.keep)).float().cpu()
        return rewards, distance(seen.images, self.reference).float().cpu(), seen.losses.float().cpu()

    def _look(self, seen: Seen, keep: bool = True) -> bool:
        """Add a row to the curve, and with `keep` keep what got better; returns whether anything did."""
        rewards, far, losses = self.numbers(seen)
        self.rows.append(_row(self.number, rewards, losses, far))
        better = (losses < self.best.losses) & losses.isfinite() & keep
        where = better.to(seen.images.device).view(-1, 1, 1, 1)
        self.best.losses = torch.where(better, losses, self.best.losses)
        self.best.rewards = torch.where(better, rewards, self.best.rewards)
        self.best.distances = torch.where(better, far, self.best.distances)
        self.best.images = torch.where(where, seen.images, self.best.images)
        self.best.updates[better] = self.number
        return bool(better.any())

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

    def found(self, prompts: Sequence[str]) -> Steered:
        """What this batch has found so far."""
        return Steered(
            list(prompts), pictures(self.best.images), pictures(self.reference), self.best.rewards.tolist(), self.before,
            self.best.distances.tolist(), self.best.updates.tolist(), self.inverted, list(self.rows),
        )  # fmt: skip

    def _rewards(self, images: Tensor) -> Tensor:
        """The rewards of this process's images as they were: of a given picture, not of what its latent samples."""
        problem, values = self.problem, []
        for start in range(0, len(images), problem.part):
            rows = slice(start, start + problem.part)
            values.append(problem.objective.of_images(images[rows], problem.prompts[rows], rows).rewards)
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
