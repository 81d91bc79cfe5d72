"""Policy gradients: the likelihood of a rollout's steps is raised by how good its image is. The reward needs no gradient.

A stochastic step is x' = a x + b m + d noise, so the log-likelihood of where it led to is -|x' - a x - b m|^2 / (2 d^2), and
its gradient at the answer m is b / d times the noise. The walker pulls that back as it pulls a reward's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chainrule.chain import Chain, Memory
from chainrule.errors import UserError
from chainrule.estimators.batch import Batch
from chainrule.gradient import AtCalls, Result
from chainrule.methods import LikelihoodRatio
from chainrule.models import Model
from chainrule.noise import Noise
from chainrule.objective import Call, Objective, look
from chainrule.plan import Path, Plan
from chainrule.solve import moves

LAST, ENOUGH = 32, 16  # of a prompt's rewards that are remembered, and how many there must be to judge by them
SMALL = 1e-6  # added to a standard deviation


@dataclass(frozen=True, slots=True)
class Policy:
    """Minus the clipped surrogate of each image's advantage, at the steps of a rollout (arXiv:1707.06347, Eq. 7).

    `before` has the log-likelihoods per number of the latent that the steps had when they were taken, (b,), by the level they
    start at. Times the numbers in a latent, so that on policy the gradient is that of -advantage log-likelihood.
    """

    advantages: Tensor
    before: Mapping[float, Tensor]
    clip: float
    weight: float = 1.0
    name: str = "policy"

    def of_call(self, call: Call) -> Tensor | None:
        """The value of each image at this call, (b,); None for a step that adds no noise."""
        if not call.move.d or call.after is None:
            return None
        noise = (call.after - call.move.a * call.state - call.move.b * call.answer) / call.move.d
        ratio = (log_likelihood(noise) - self.before[call.jump.start]).exp()
        cut = ratio.clamp(1 - self.clip, 1 + self.clip)
        return -torch.minimum(self.advantages * ratio, self.advantages * cut) * noise[0].numel()


def log_likelihood(noise: Tensor) -> Tensor:
    """Of steps that drew this noise (b, ...), per number of the latent and but for a constant, (b,)."""
    return -noise.flatten(1).square().mean(1) / 2


@dataclass(slots=True)
class Rollout:
    """Finished chains of all processes: where every step led to, how likely it was, and how good the images were.

    `states` (n, steps + 1, c, h, w), `likelihoods` (n, steps), `advantages` and `rewards` (n,), `terms` (n,) each.
    """

    prompts: list[str]
    seeds: list[int]
    states: Tensor
    likelihoods: Tensor
    rewards: Tensor
    advantages: Tensor
    terms: dict[str, Tensor]
    used: int = 0  # updates it has served


@dataclass(slots=True)
class Rollouts:
    """An estimator that makes a rollout, and updates from it `kind.reuse` times."""

    kind: LikelihoodRatio
    history: dict[str, list[float]] = field(default_factory=dict)  # the last rewards of a prompt
    last: Rollout | None = None

    @classmethod
    def of(cls, kind: LikelihoodRatio, model: Model) -> Rollouts:
        """Before the first rollout. Raises UserError for a sampler that draws no noise."""
        if not model.solver.stochastic:
            raise UserError(
                f"the sampler {model.sampler.name} draws no noise, so its steps have no likelihood to raise; pass solver sde, "
                "or ddpm or euler-a where the model is no flow"
            )
        return cls(kind)

    def add(self, model: Model, plan: Plan, objective: Objective, batch: Batch) -> list[Result]:
        """Add the gradient of minus the surrogate's mean over the batch. A result for each part."""
        images = torch.empty(0)
        if self.last is None or self.last.used == self.kind.reuse:
            self.last, images = self._roll(model, plan.branches[0], objective, batch)
        # One with a reward that is not finite serves for nothing, and no update follows from it.
        self.last.used = self.last.used + 1 if bool(self.last.rewards.isfinite().all()) else self.kind.reuse
        mine = batch.processes.share(range(len(self.last.prompts)))
        return [
            self._part(model, plan, objective, batch, mine[part :: batch.parts], images[part :: batch.parts])
            for part in range(batch.parts)
        ]

    def _part(
        self, model: Model, plan: Plan, objective: Objective, batch: Batch, rows: list[int], images: Tensor
    ) -> Result:  # fmt: skip
        """The gradient of some of the rollout's images, along the steps that were taken."""
        assert self.last is not None
        last, path, memory = self.last, plan.branches[0], Memory(batch.memory)
        chain = model.chain([last.prompts[i] for i in rows], [last.seeds[i] for i in rows], memory)
        states = list(last.states[rows].to(model.device).unbind(1))
        likelihoods = dict(zip((jump.start for jump in path), last.likelihoods[rows].to(states[0]).unbind(1), strict=True))
        policy = Policy(last.advantages[rows].to(states[0]), likelihoods, self.kind.clip)
        at_calls = AtCalls(objective.on_calls.with_terms(policy), chain, 1 / len(rows) / batch.parts)
        with model.blockwise(memory):
            chain.along(path, states).pull(torch.zeros_like(states[-1]), at_calls)
        chain.pull_computed()
        rewards = last.rewards[rows]
        terms = {name: float(values[rows].mean()) for name, values in last.terms.items()} | at_calls.means()
        return Result(rewards, images, (float(rewards.mean()),), terms)

    def _roll(self, model: Model, path: Path, objective: Objective, batch: Batch) -> tuple[Rollout, Tensor]:
        """A rollout of every process's batch, which all get, and the images of this one."""
        made: list[Any] = [None] * len(batch.prompts)
        images = list(made)
        for part, (prompts, seeds) in enumerate(batch.split()):
            chain, start = model.chain(prompts, seeds), model.noise(seeds)
            walked = torch.stack([start, *chain.states(start, path)], 1)
            reading = look(model.codec.decode, objective, walked[:, -1], prompts, batch.micro_batch or model.micro_batch)
            columns = walked.cpu(), drawn_likelihoods(chain, path), -reading.loss.cpu(), *(v.cpu() for v in reading.terms.values())
            made[part :: batch.parts] = zip(prompts, seeds, *columns, strict=True)
            images[part :: batch.parts] = reading.images
        names, numbers, *tensors = zip(*batch.processes.gather(made), strict=True)
        states, likelihoods, rewards, *terms = map(torch.stack, tensors)
        advantages = self._advantages(names, rewards.tolist())
        told = dict(zip(reading.terms, terms, strict=True))
        return Rollout([*names], [*numbers], states, likelihoods, rewards, advantages, told), torch.stack(images)

    def _advantages(self, prompts: Sequence[str], rewards: Sequence[float]) -> Tensor:
        """Each image's reward against those it is compared with, in standard deviations, (n,)."""
        size = self.kind.group
        if size > 1:
            groups = [rewards[i - i % size :][:size] for i in range(len(rewards))]
        else:
            for prompt, reward in zip(prompts, rewards, strict=True):
                if math.isfinite(reward):
                    self.history[prompt] = [*self.history.get(prompt, []), reward][-LAST:]
            known = [self.history.get(prompt, []) for prompt in prompts]
            groups = [last if len(last) >= ENOUGH else rewards for last in known]
        return torch.stack([_standard(reward, group) for reward, group in zip(rewards, groups, strict=True)])

    def settle(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Nothing is learned here."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The prompts' last rewards, and a rollout that is to serve another update."""
        kept: dict[str, Any] = {"history": self.history}
        if self.last is None or self.last.used == self.kind.reuse:
            return {}, kept
        last = self.last
        kept |= {"prompts": last.prompts, "seeds": last.seeds, "used": last.used}
        tensors = {f"rollout/{name}": getattr(last, name) for name in ("states", "likelihoods", "rewards", "advantages")}
        return tensors | {f"rollout/terms/{name}": values for name, values in last.terms.items()}, kept

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Back to a saved state. Raises KeyError when it is of another estimator."""
        self.history, self.last = state["history"], None
        if "used" in state:
            told = {name: tensors[f"rollout/{name}"] for name in ("states", "likelihoods", "rewards", "advantages")}
            head = "rollout/terms/"
            terms = {name.removeprefix(head): values for name, values in tensors.items() if name.startswith(head)}
            self.last = Rollout(state["prompts"], state["seeds"], **told, terms=terms, used=state["used"])

    def remove(self) -> None:
        """Nothing was put in."""


def drawn_likelihoods(chain: Chain, path: Path) -> Tensor:
    """The log-likelihood of each step of a chain that was walked, per number of the latent, (b, steps); 0 where none is drawn."""
    noise, draws, found = Noise(chain.noise.seeds, chain.noise.shape), 0, []
    for move in moves(chain.solver, path):
        found.append(log_likelihood(noise.stream(draws).double()) if move.d else torch.zeros(len(noise.seeds)))
        draws += bool(move.d)
    return torch.stack(found, 1)


def _standard(reward: float, group: Sequence[float]) -> Tensor:
    values = torch.tensor(group, dtype=torch.float64)
    return (reward - values.mean()) / (values.std(correction=0) + SMALL)
