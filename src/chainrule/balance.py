"""How large the terms of a reward are, measured once on the images of the first updates, so that weights are ratios.

A sum w_1 r_1 + w_2 r_2 becomes w_1 r_1 / s_1 + w_2 r_2 / s_2, with a size s of each reward by one of the `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from chainrule.chain import Memory
from chainrule.errors import UserError
from chainrule.models import Model
from chainrule.noise import derive, drawing
from chainrule.objective import Decode, Objective, RewardTerm, look, read
from chainrule.processes import ALONE, Processes
from chainrule.rewards import Reward, Sum, reward_of
from chainrule.settings import Finetuning

Share: TypeAlias = tuple[Sequence[str], Sequence[int]]  # prompts and image seeds
See: TypeAlias = Callable[[Decode, Reward, Tensor, Sequence[str], int], dict[str, Tensor]]


def balanced(reward: Reward, sizes: Mapping[str, float]) -> Reward:
    """The sum with every term divided by its size, which its name finds; the weights given by hand stay as ratios."""
    return Sum(tuple((weight / sizes[term.name], term) for weight, term in reward.weighted()))


def reweighted(reward: Reward, weights: Mapping[str, float]) -> Reward:
    """What a run raised, under the name that its config has: the same terms with the weights that its metrics say."""
    return reward_of(Sum(tuple((weights.get(term.name, weight), term) for weight, term in reward.weighted())).__call__, reward.name)


def in_words(weights: Mapping[str, float]) -> str:
    """Weights by name, in words."""
    return ", ".join(f"{weight:.4g} of {name}" for name, weight in weights.items())


def measured(
    model: Model, reward: Reward, batches: Iterable[Share], settings: Finetuning, processes: Processes = ALONE
) -> dict[str, float]:  # fmt: skip
    """The size of every term of a reward, by its name, on the images that these prompts and seeds give; by `settings.balance`.

    `batches` are this process's; every process gets the sizes over all. Raises UserError for a term whose size is not a
    positive number: it says the same of every image, or has no gradient.
    """
    see, size = RULES[settings.balance]
    found: dict[str, list[float]] = {term.name: [] for _, term in reward.weighted()}
    count, micro = settings.accumulate, settings.micro_batch or model.micro_batch
    parts = [(some[i::count], seeds[i::count]) for some, seeds in batches for i in range(count)]
    with drawing(derive(settings.seed, "balance", processes.index)):
        for prompts, seeds in parts:
            with torch.no_grad():
                *_, latents = model.states(prompts, seeds, settings.sample_steps)
            with model.blockwise(Memory(settings.memory)):
                seen = see(model.codec.decode, reward, latents, prompts, micro)
            for name, values in seen.items():
                found[name] += values.tolist()
    everyone = {name: [value for some in processes.gather([mine]) for value in some] for name, mine in found.items()}
    sizes = {name: size(values) if all(map(math.isfinite, values)) else math.nan for name, values in everyone.items()}
    if bad := next((name for name in sizes if not 0 < sizes[name] < math.inf), None):
        what = f"the {settings.balance} of reward {bad!r} over {len(everyone[bad])} images is {sizes[bad]:g}"
        raise UserError(f"{what}, so balance cannot divide by it; leave that reward out, or balance")
    return sizes


def values(decode: Decode, reward: Reward, latents: Tensor, prompts: Sequence[str], micro_batch: int) -> dict[str, Tensor]:
    """What each term says of the images of finished latents (b, c, h, w), (b,) each."""
    return dict(look(decode, Objective.of(reward), latents, prompts, micro_batch).terms)


def slopes(decode: Decode, reward: Reward, latents: Tensor, prompts: Sequence[str], micro_batch: int) -> dict[str, Tensor]:
    """The norm of each term's gradient at finished latents (b, c, h, w), (b,) each."""
    terms = [Objective((RewardTerm(term),)) for _, term in reward.weighted()]
    return {term.terms[0].name: read(decode, term, latents, prompts, micro_batch)[1].flatten(1).norm(dim=1) for term in terms}


def deviation(numbers: Sequence[float]) -> float:
    """The standard deviation, with n - 1. Sums are exact, so the order of the numbers is not seen."""
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


def root_mean_square(numbers: Sequence[float]) -> float:
    """Of norms, this is the norm of the whole batch's gradient over the root of its images."""
    return math.sqrt(math.fsum(x * x for x in numbers) / len(numbers))


RULES: Mapping[str, tuple[See, Callable[[Sequence[float]], float]]] = {
    "deviation": (values, deviation),
    "gradient": (slopes, root_mean_square),
}
"""By name: what is seen of every image, and the size that follows from it.

`deviation`: rewards have unit standard deviation. `gradient`: rewards have gradients of unit norm at the finished latent, which
all of them pass, as GradNorm (arXiv:1711.02257) has it for the weights of the last shared layer. Differs from the paper: sizes
are measured once, before training, and not learned along with it; there is no exponent for tasks that train faster; the weights
are not made to sum to their number.
"""
