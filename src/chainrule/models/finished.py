"""Finished images of any number of prompts, a batch at a time, so that a batch is in memory and not all of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from chainrule.asked import pairs
from chainrule.models.codec import Codec
from chainrule.pictures import Finished
from chainrule.processes import Processes

PIXELS = 2**20  # decoded at a time


@torch.no_grad()
def finished(
    states: Callable[[list[str], list[int]], Iterator[Tensor]], codec: Codec, prompts: Sequence[str], seeds: Sequence[int],
    batch: int, processes: Processes, done: Container[int], together: bool = False,
) -> Iterator[Finished]:  # fmt: skip
    """The images at the ends of `states`, (b, c, h, w) latents of a batch after every step. See `Model.finished`.

    With `together` a process that has no image left in a round makes calls all the same, and nothing of them.
    """
    prompts, seeds = pairs(prompts, seeds)
    size = codec.height, codec.width
    for each in processes.rounds(len(prompts), batch, done):
        made, images = each.along(together), [torch.empty(0, 3, *size, dtype=torch.float32)]
        final = None
        for latents in states([prompts[k] for k in made], [seeds[k] for k in made]) if made else ():
            final = latents
        # Decoding takes far more memory than a call without a graph: large images one after the other.
        for some in () if final is None or not each.own else final.split(max(1, PIXELS // prod(size))):
            images.append(codec.decode(some).float().cpu())
        yield Finished(each.own, [seeds[k] for k in each.own], torch.cat(images))
