"""Images of any number of prompts, written into an album as they are made: a batch is in memory, and not all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from chainrule.album import Album
from chainrule.baselines import BestOf
from chainrule.guidance import AnyGuidance, specification
from chainrule.models import Model
from chainrule.processes import ALONE, Processes
from chainrule.rewards import Reward, checked

BATCH = 16


def facts_of_model(model: Model, steps: int | None = None, guidance: AnyGuidance = None) -> dict[str, Any]:
    """How the images of a model are made, as their facts hold it: steps, guidance, size, solver, dtype, quantize."""
    guided = model.guided(guidance)
    return {"steps": len(guided.grid(steps)) - 1, "guidance": specification(guided.guidance), **guided.opening}


def rounds(album: Album, maker: Model | BestOf, processes: Processes, done: Mapping[int, Any]) -> int:
    """How many batches of network calls this process makes, for a progress bar."""
    size, each = (1, -(-maker.n // BATCH)) if isinstance(maker, BestOf) else (BATCH, 1)
    return each * sum(1 for at in processes.batches(len(album.pairs), size, done) if at)


@torch.no_grad()
def fill(
    album: Album, maker: Model | BestOf, common: Mapping[str, Any], rewards: Sequence[Reward] = (), *, steps: int | None = None,
    guidance: AnyGuidance = None, on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
    done: Mapping[int, Any],
) -> None:  # fmt: skip
    """Make the images of an album that are not `done`, and write each with its facts: `common` ones, its own and its rewards.

    Each of several `processes` writes its share; the main one writes the list and the contact sheets.
    """
    prompts, seeds = [prompt for prompt, _ in album.pairs], [seed for _, seed in album.pairs]
    for reward in rewards:
        reward.to(maker.device)
    for some in maker.finished(prompts, seeds, steps, guidance, BATCH, on_call, processes, done):
        scores = _scores(rewards, some.images.to(maker.device), [prompts[number] for number in some.at]) if some.at else []
        lines = []
        for number, seed, picture, scored in zip(some.at, some.seeds, some.pictures, scores, strict=True):
            if number not in done:
                facts = {"prompt": prompts[number], "seed": seed, **common, "rewards": scored or None}
                lines.append(album.add(number, picture, {key: value for key, value in facts.items() if value is not None}))
        every = processes.gather([lines])
        if processes.main:
            album.extend_list([line for each in every for line in each])
    processes.main_does(album.finish)


def _scores(rewards: Sequence[Reward], images: Tensor, prompts: Sequence[str]) -> list[dict[str, float | None]]:
    """The rewards of each image, by their names; None for one that is not finite."""
    columns = {reward.name: checked(reward, images, prompts).float().tolist() for reward in rewards}
    return [{name: column[k] if isfinite(column[k]) else None for name, column in columns.items()} for k in range(len(images))]
