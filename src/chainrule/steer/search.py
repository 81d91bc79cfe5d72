"""One batch of images on their way to a lower loss: the variable, its optimizer, and the best of every image so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from random import Random

import torch
from torch import Tensor

from chainrule.adapters import Adapter
from chainrule.chain import Memory
from chainrule.errors import UserError
from chainrule.loop import progress_bar, stop_signals
from chainrule.models import Model
from chainrule.models.pictures import pictures
from chainrule.noise import derive
from chainrule.objective import Distance, Objective, distance
from chainrule.plan import walk
from chainrule.rewards import Reward
from chainrule.settings import Steering
from chainrule.steer.found import Steered
from chainrule.steer.gradients import gradient_of, image_of
from chainrule.steer.guidance import GUIDES
from chainrule.steer.images import invert
from chainrule.steer.problem import Problem, Seen
from chainrule.steer.variables import Controlled, Over

OPTIMIZERS = {
    "adam": lambda leaves, lr: torch.optim.Adam(leaves, lr=lr),
    "sgd": lambda leaves, lr: torch.optim.SGD(leaves, lr=lr),
    "momentum": lambda leaves, lr: torch.optim.SGD(leaves, lr=lr, momentum=0.9),
}


class Search:
    """One batch: its chain, its variable, and the best of every image so far."""

    def __init__(
        self, model: Model, settings: Steering, over: Over, scorer: Reward, prompts: list[str], seeds: list[int],
        given: Tensor | None, adapter: Adapter | None,
    ) -> None:  # fmt: skip
        self.settings, self.over = settings, over
        chain = model.guided(settings.guidance).chain(prompts, seeds, Memory(settings.memory))
        levels = model.grid(settings.sample_steps)
        self.grid = over.grid(levels, model.solver.process.schedule.offset)
        if given is not None:
            latents = model.codec.encode(given).to(model.device, model.dtype)
            self.x = invert(chain, latents, self.grid)
            self.reference: Tensor | None = model.codec.decode(latents)
        else:
            head = takewhile(lambda jump: jump.start != self.grid[0], walk(levels))
            self.x, self.reference = chain.end(model.noise(seeds), tuple(head)), None
        self.start, self.leaves = self.x.clone(), [self.x]
        if over.kind in ("prompt", "negative"):
            side = {"prompt": "positive", "negative": "negative"}[over.kind]
            embedding = getattr(chain.condition, side).states
            if not embedding.is_floating_point():
                raise UserError(f"over is {over.kind!r}, but {model.name} has classes instead of embeddings; use latent")
            self.leaves = [embedding.clone().requires_grad_()]
            words = replace(getattr(chain.condition, side), states=self.leaves[0])
            chain = replace(chain, condition=replace(chain.condition, **{side: words}))
        if adapter:
            self.leaves = [*adapter.parameters()]
        if over.kind == "controls":
            controls = {level: torch.zeros_like(self.x, requires_grad=True) for level in self.grid[:-1]}
            self.leaves = list(controls.values())
            chain = replace(chain, cast={"base": Controlled(chain.cast["base"], controls)})

        self.reward = Objective.of(scorer).scaled(1 - settings.keep)
        self.problem = Problem(chain, self.grid, model.codec.decode, prompts, self.reward)
        self.best: Seen | None = None
        self.first: Seen | None = None
        self.updates, self.far = torch.zeros(len(prompts), dtype=torch.long), torch.zeros(len(prompts))
        self.values = torch.zeros(len(prompts))

    def run(self, bar: Bar) -> list[dict[str, float]]:
        """Update to the end, or until nothing gets better, or Ctrl-C; the rows of the curve."""
        s = self.settings
        if self.reference is not None:
            self._hold(self.reference)
        rows = [self._look(self._sampled(), 0)]
        if s.gradient in GUIDES:
            rows.append(self._look(GUIDES[s.gradient][1](strength=s.strength)(self.problem, self.x), 1))
            bar.advance(rows[-1])
            return rows
        gradient = gradient_of(s.gradient, self.over.kind)
        optimizer = OPTIMIZERS[s.optimizer](self.leaves, s.lr)
        idle = 0
        for number in range(s.updates):
            if bar.stopped or (s.patience and idle >= s.patience):
                break
            optimizer.zero_grad()
            seen = gradient(self.problem, self.x, Random(derive(0, "call", number)))
            if number:  # the first image is the one before
                rows.append(self._look(seen, number))
                idle = 0 if bool((self.updates == number).any()) else idle + 1
            if self.over.kind == "latent":
                self.x.grad = seen.gradient
            if not any(leaf.grad is not None for leaf in self.leaves):
                raise UserError(f"the image does not depend on the {self.over.kind} here; steer something else")
            if not all(leaf.grad is None or bool(leaf.grad.isfinite().all()) for leaf in self.leaves):
                if number:
                    return rows
                raise UserError(f"the gradient {s.gradient!r} of this reward is not finite at the first update")
            optimizer.step()
            self._project()
            bar.advance(rows[-1])
        if not bar.stopped:
            rows.append(self._look(self._sampled(), len(rows)))
        return rows

    def report(self, found: Steered) -> None:
        assert self.first is not None and self.best is not None and self.reference is not None
        found.images += pictures(self.best.images)
        found.before += pictures(self.reference)
        found.rewards += self.values.tolist()
        found.rewards_before += self._before().tolist()
        found.distances += self.far.tolist()
        found.updates += self.updates.tolist()
        found.inverted += distance(self.first.images, self.reference).tolist()

    def _before(self) -> Tensor:
        """The reward of the images as they were: for a given picture its own, not that of what its latent samples."""
        assert self.reference is not None
        problem, values = self.problem, []
        for start in range(0, len(self.reference), problem.part):
            rows = slice(start, start + problem.part)
            values.append(problem.objective.of_images(self.reference[rows], problem.prompts[rows], rows).rewards)
        return torch.cat(values) / (1 - self.settings.keep)

    def _hold(self, reference: Tensor) -> None:
        self.reference = reference
        objective = self.reward.against(reference)
        if self.settings.keep:
            objective = objective.with_terms(Distance(reference, self.settings.keep))
        self.problem = replace(self.problem, objective=objective)

    def _sampled(self) -> Seen:
        """The image of the variable as it is, without a gradient."""
        latent = image_of(self.settings.gradient, self.problem, self.x)
        if self.reference is None:
            self._hold(torch.cat([self.problem.decode(part) for part in latent.split(self.problem.part)]))
        return self.problem.read(latent)

    def _look(self, seen: Seen, number: int) -> dict[str, float]:
        """Keep what got better; a row of the curve."""
        assert self.reference is not None
        rewards, far = (seen.rewards / (1 - self.settings.keep)).float().cpu(), distance(seen.images, self.reference).float().cpu()
        losses = seen.losses.float().cpu()
        if self.best is None:
            if not bool(losses.isfinite().all()):
                raise UserError(f"the loss is {losses.tolist()} before the first update; it must be finite")
            self.first = self.best = seen
            self.values, self.far = rewards, far
        else:
            better = (losses < self.best.losses.float().cpu()) & losses.isfinite()
            where = better.to(seen.losses.device)
            self.best = replace(
                self.best, losses=torch.where(where, seen.losses, self.best.losses),
                images=torch.where(where.view(-1, 1, 1, 1), seen.images, self.best.images),
            )  # fmt: skip
            self.values, self.far = torch.where(better, rewards, self.values), torch.where(better, far, self.far)
            self.updates[better] = number
        return {"step": number, "reward": _mean(rewards), "loss": _mean(losses), "distance": _mean(far), "count": len(losses)}

    def _project(self) -> None:
        s = self.settings
        if s.bound:
            self.x.copy_(self.start + (self.x - self.start).clamp(-s.bound, s.bound))
        elif s.renormalize or (s.renormalize is None and s.gradient == "invertible" and self.over.kind == "latent"):
            norms = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (self.start, self.x)]
            self.x.mul_(norms[0] / norms[1])


class Bar:
    """Progress over all batches, and whether Ctrl-C was pressed."""

    def __init__(self, settings: Steering, batches: int, on_update: Callable[[dict[str, float]], None] | None) -> None:
        self.total = batches * (1 if settings.gradient in GUIDES else settings.updates)
        self.on_update, self.asked = on_update, lambda: False

    @property
    def stopped(self) -> bool:
        return self.asked()

    @contextmanager
    def shown(self) -> Iterator[None]:
        with stop_signals() as self.asked, progress_bar("reward") as self.bar:
            self.task = self.bar.add_task("steer", total=self.total, value="-", speed="-")
            yield

    def advance(self, row: dict[str, float]) -> None:
        self.bar.update(self.task, advance=1, value=f"{row['reward']:.4g}")
        if self.on_update:
            self.on_update(row)


def _mean(values: Tensor) -> float:
    value = float(values.mean())
    return value if math.isfinite(value) else math.nan
