"""Fine-tuning as a task. The training step is `FinetuneTask.update`, whole."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from chainrule.adapters import LEARNED, Adapter, save_bands
from chainrule.balance import balanced, measured
from chainrule.errors import UserError
from chainrule.estimators import Batch, Estimator, Flat, Paths, estimator_of
from chainrule.gradient import Result
from chainrule.learnable import sampler_parts, trainable
from chainrule.learned import Learned
from chainrule.learner import Learner, gradients
from chainrule.loop import Row
from chainrule.methods import LikelihoodRatio, Method, needs, stages
from chainrule.models import Model
from chainrule.noise import derive
from chainrule.objective import KL, Objective
from chainrule.plan import Grid, Plan
from chainrule.processes import ALONE, Processes
from chainrule.rewards import Reward
from chainrule.settings import Finetuning


@dataclass(slots=True)
class Stage:
    """The stage a method is in, and what the end of that stage depends on."""

    number: int = 0  # counted from 0
    began: int = 0  # the update it began with
    smooth: float | None = None  # the reward of its updates, averaged over about the last ten
    best: float | None = None  # the highest of these
    best_at: int = 0

    def saw(self, reward: float, step: int) -> None:
        """Count a good update."""
        self.smooth = reward if self.smooth is None else 0.9 * self.smooth + 0.1 * reward
        if self.best is None or self.smooth > self.best:
            self.best, self.best_at = self.smooth, step


@dataclass(slots=True)
class Stages:
    """The stages of a method in turn, one for most: each with its number of updates, less if the reward stops rising."""

    methods: Sequence[Method]
    lengths: Sequence[int]
    plateau: int = 0  # end a stage after this many updates without a better reward; 0: never
    now: Stage = field(default_factory=Stage)

    @classmethod
    def of(cls, method: Method, settings: Finetuning) -> Stages:
        """Lengths as given, or equal shares, earlier ones with what is left over. Raises UserError if they do not fit."""
        turns, lengths = stages(method), settings.stage_steps
        count = len(turns)
        if settings.updates < count:
            raise UserError(
                f"updates is {settings.updates}, but the method has {count} stages; give every stage an update at least"
            )
        lengths = lengths or [settings.updates // count + (i < settings.updates % count) for i in range(count)]
        if len(lengths) != count:
            raise UserError(f"stage_steps has {len(lengths)} lengths, but the method has {count} stage{'s' * (count > 1)}")
        return cls(turns, lengths, settings.plateau)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def recorded(self) -> list[int] | None:
        """The lengths as a run's config holds them; None for a method of one stage."""
        return list(self.lengths) if len(self) > 1 else None

    @property
    def method(self) -> Method:
        """The stage's method."""
        return self.methods[self.now.number]

    def advance(self, step: int) -> None:
        """Go on to the next stage when this one has had its updates, or stopped getting better."""
        over = step - self.now.began >= self.lengths[self.now.number] or (self.plateau and step - self.now.best_at > self.plateau)
        if over and self.now.number + 1 < len(self):
            self.now = Stage(self.now.number + 1, began=step, best_at=step)


def group_of(method: Method, grid: Grid) -> int:
    """How many images of one prompt the method compares with each other; 1 for most."""
    estimator = needs(method, grid).estimator
    return estimator.group if isinstance(estimator, LikelihoodRatio) else 1


def draw(prompts: Sequence[str], settings: Finetuning, step: int, group: int) -> list[str]:
    """The prompts of one update, each for a group of images."""
    rng = Random(derive(settings.seed, "prompts", step))
    return [rng.choice(prompts) for _ in range(settings.batch // group)]


def drawn(prompts: Sequence[str], settings: Finetuning, groups: set[int]) -> list[str]:
    """The prompts that a run comes to, in their order: of a long list only those that its updates draw."""
    if settings.updates * settings.batch >= len(prompts):
        return list(prompts)
    used = {p for step in range(settings.updates) for group in groups for p in draw(prompts, settings, step, group)}
    return [prompt for prompt in prompts if prompt in used]


@dataclass(slots=True)
class FinetuneTask:
    """Everything an update needs. Its whole state is the learner's and the stage."""

    model: Model
    learner: Learner
    adapters: dict[str, Adapter]
    stages: Stages
    reward: Reward
    prompts: Sequence[str]
    settings: Finetuning
    processes: Processes = ALONE
    estimator: Estimator = field(default_factory=Paths)
    sizes: dict[str, float] = field(default_factory=dict)  # of the reward's terms, once they are measured
    watched: ClassVar[str] = "reward"

    @classmethod
    def start(
        cls, model: Model, method: Method, reward: Reward, prompts: Sequence[str], settings: Finetuning,
        processes: Processes = ALONE,
    ) -> FinetuneTask:  # fmt: skip
        """Put the method's fresh adapters into the model; `remove` takes them out again."""
        order, model = Stages.of(method, settings), model.guided(settings.guidance)
        grid, learn = model.grid(settings.sample_steps), settings.learned
        own = needs(method, grid)
        parts = sampler_parts(model, settings)
        model = model.embedded(drawn(prompts, settings, {group_of(stage, grid) for stage in order.methods}))
        estimator = estimator_of(own.estimator, model, reward, lr=settings.lr, clip=settings.clip, seed=settings.seed)
        adapters = {
            name: model.adapt(name, rank=settings.rank, seed=settings.seed + i, levels=levels)
            for i, (name, levels) in enumerate(own.adapters.items() if "adapter" in learn else ())
        }
        for name, part in parts.items():
            model = model.learning(name, part)
        learner = Learner.of({**adapters, **trainable(model.learned)}, settings.weight_decay)
        if settings.flat:
            estimator = Flat(estimator, settings.flat, lambda: [*learner.named_parameters().values()])
        return cls(model, learner, adapters, order, reward, prompts, settings, processes, estimator)

    @property
    def label(self) -> str:
        """What the progress bar calls the update."""
        return f"stage {self.stages.now.number + 1} of {len(self.stages)}" if len(self.stages) > 1 else "update"

    @property
    def batch(self) -> int:
        """Images per update."""
        return self.settings.batch

    @property
    def seed(self) -> int:
        """What draws of no seed of their own depend on."""
        return self.settings.seed

    @property
    def total(self) -> int:
        """Updates until it is done."""
        return self.settings.updates

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.learner.step

    @property
    def learned(self) -> dict[str, Learned]:
        """What is trained besides adapters."""
        return {name: part for name, part in self.learner.parts.items() if name not in self.adapters}

    @property
    def grid(self) -> Grid:
        """The levels of a sampling chain."""
        return self.model.grid(self.settings.sample_steps)

    def plan(self) -> Plan:
        """The plan of the next update, the same on every process."""
        return self.stages.method.plan(self.grid, Random(derive(self.settings.seed, "plan", self.step)))

    def share(self, step: int) -> tuple[list[str], list[int]]:
        """This process's prompts and image seeds of an update, a group's together: one batch for any number of processes."""
        s, group = self.settings, group_of(self.stages.method, self.grid)
        prompts = [prompt for prompt in draw(self.prompts, s, step, group) for _ in range(group)]
        seeds = [derive(s.seed, "image", step, k) for k in range(s.batch)]
        return self.processes.share(prompts), self.processes.share(seeds)

    @property
    def raised(self) -> Reward:
        """What is raised: the reward, its terms divided by their sizes where these are measured."""
        return balanced(self.reward, self.sizes) if self.sizes else self.reward

    def weigh(self) -> None:
        """Measure the reward's terms on the images of the first updates, if they are to be balanced and are not yet."""
        if self.settings.balance != "none" and not self.sizes:
            shares = [self.share(step) for step in range(min(self.settings.balance_batches, self.settings.updates))]
            self.sizes = measured(self.model, self.reward, shares, self.settings, self.processes)

    def objective(self) -> Objective:
        """The reward, and the distance to the model as it is without adapters."""
        objective = Objective.of(self.raised)
        if not self.settings.kl:
            return objective
        return objective.with_terms(KL(replace(self.model, active={}).cast()["base"], self.settings.kl))

    def update(self) -> Row:
        """Make one update and return its row of the log."""
        s, step, began = self.settings, self.step, time.perf_counter()
        self.weigh()
        plan, trained = self.plan(), needs(self.stages.method, self.grid).trained
        weights = self.learner.train_only((*trained, *self.learned))
        prompts, seeds = self.share(step)
        batch = Batch(prompts, seeds, s.accumulate, s.memory, s.micro_batch, self.processes)
        results = self.estimator.add(self.model, plan, self.objective(), batch)
        # Adapters are small: one flat mean over processes, zeros where the plan left a weight unused.
        flat = self.processes.mean(gradients(weights))
        reward = self.processes.mean_of(float(torch.cat([result.rewards for result in results]).mean()))
        rate = s.lr * (min(10 / math.sqrt(step + 1), 1.0) if s.schedule == "sqrt" else 1.0)
        undone = self._undone(result.images for result in results)
        norm, finite = self.learner.update(weights, flat, reward, lr=rate, clip=s.clip, ema=s.ema)
        self.estimator.settle(self.processes.mean)
        if finite and self.step == self.total:  # no update comes that would see what this one led to
            with self.learner.averaged():
                last = self.model.render(prompts[:: s.accumulate], seeds[:: s.accumulate], s.sample_steps)
            undone = self._undone([last])
        row: Row = {"step": self.step, "reward": reward, "grad_norm": norm, "lr": rate}
        row |= {"seconds": time.perf_counter() - began, "skipped": self.learner.skipped, "terms": self._terms(results)}
        row |= {"weights": {term.name: weight for weight, term in self.raised.weighted()}} if self.sizes else {}
        if undone:
            row["taken_back"] = True
        if len(self.stages) > 1:
            row["stage"] = self.stages.now.number + 1
        if finite:
            self.stages.now.saw(reward, step)
        self.stages.advance(self.step)
        return row

    def _undone(self, images: Iterable[Tensor]) -> bool:
        """Take the last update back if the images it led to are not finite on some process. Whether there was one to take back."""
        finite = all(bool(some.isfinite().all()) for some in images)
        undone = self.processes.agree(None if finite else "not finite") is not None and self.learner.take_back()
        self.learner.skipped += undone
        return undone

    def _terms(self, results: Sequence[Result]) -> dict[str, float]:
        """Every term's mean over the batch, and over all processes."""
        names = dict.fromkeys(name for result in results for name in result.terms)
        means = {name: [result.terms[name] for result in results if name in result.terms] for name in names}
        return {name: self.processes.mean_of(sum(values) / len(values)) for name, values in means.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a checkpoint needs: tensors, and values for JSON."""
        tensors, kept = self.estimator.state()
        kept |= {"stage": asdict(self.stages.now), "sizes": self.sizes}
        return {**self.learner.tensors(), **tensors}, {**self.learner.state, **kept}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a saved state. Raises KeyError, TypeError or RuntimeError when it is of another task."""
        self.stages.now, self.sizes = Stage(**state["stage"]), dict(state.get("sizes", {}))  # earlier versions had none
        self.learner.restore(tensors, state)
        self.estimator.restore(tensors, state)

    def save(self, folder: Path) -> None:
        """What was trained, as the folder `adapter`."""
        self.save_adapter(folder / "adapter")

    def save_adapter(self, folder: Path) -> None:
        """The averaged adapter, in the format plain diffusers loads; several by level in a folder each, with their levels.

        What else was trained is in `learned`, a folder each.
        """
        bands = needs(self.stages.method, self.grid).adapters
        alone = list(bands.values()) == [None]
        with self.learner.averaged():
            for name, adapter in self.adapters.items():
                adapter.save(folder if alone else folder / name)
            for name, part in self.learned.items():
                part.save(folder / LEARNED / name)
        if self.adapters and not alone:
            save_bands(folder, bands)

    def remove(self) -> None:
        """Give the model back without the adapters, and the reward without a critic."""
        self.estimator.remove()
        for adapter in self.adapters.values():
            self.model.drop(adapter)
