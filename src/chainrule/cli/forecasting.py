"""What an update would take of a card, by counting; the second half of `plan`."""

from __future__ import annotations

import re

import typer

from chainrule.cli.app import progress
from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.methods import Method, stages

MOST = 4096  # a batch beyond which nobody asks


def card_size(text: str) -> float:
    """The bytes of "24GB", 10^9 each, or "24GiB". Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"memory-of is {text!r}, but must be a size as 24GB")
    return float(found[1]) * (2**30 if (found[2] or "").lower() == "gib" else 10**9)


def forecast(config: FinetuneConfig, method: Method, card: float) -> None:
    """Print what fine-tuning takes under every memory policy, and the largest batch; from the model's configuration alone.

    Raises UserError where not even one image fits, with what it takes at the least.
    """
    from chainrule.cli.opened import Source
    from chainrule.evaluate import aligned
    from chainrule.footprint import BATCHES, POLICIES, USABLE, count, gigabytes, in_shards
    from chainrule.models.outline import outline
    from chainrule.rewards import parse
    from chainrule.size import size_of
    from chainrule.standins import stand_in

    opening, own = config.opening, config.settings
    if opening.network == "shard" and not opening.shards:
        raise UserError("network is 'shard', of which plan has to know the processes that hold one copy; pass --shards")
    reward = stand_in(parse(config.reward or "pickscore", Source(config.model).reward_source))
    size = None if opening.size is None else size_of(opening.size)
    model = outline(
        config.model, dtype=opening.dtype, size=size, solver=opening.solver, quantize=opening.quantize, network=opening.network
    )
    model = model.guided(own.guidance)
    policies = POLICIES if own.memory == "auto" or "memory" not in own.model_fields_set else (own.memory,)
    turns = stages(method)
    found = {}
    with progress("counting", len(policies) * len(turns) * len(BATCHES)) as advance:
        for policy in policies:
            settings = own.model_copy(update={"memory": policy})
            found[policy] = [count(model, turn, reward, settings, on_batch=advance) for turn in turns]
            if opening.shards:
                found[policy] = [in_shards(each, model.network, opening.shards) for each in found[policy]]
    taken = {policy: max(each.total(1) for each in of) for policy, of in found.items()}
    largest = {policy: min(each.largest(USABLE * card, MOST) for each in of) for policy, of in found.items()}
    fixed = next(iter(found.values()))[0].fixed
    parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in fixed.items() if size)
    rows = [["memory", "one image", "largest batch"]]
    rows += [[policy, gigabytes(taken[policy]), _batch(largest[policy])] for policy in found]
    typer.echo(f"{config.model}, {model.size[0]}x{model.size[1]} pixels, {opening.dtype}: {parts}\n{aligned(rows)}")
    fits = [policy for policy in found if largest[policy]]
    if not fits:
        least = min(taken.values()) / USABLE
        advice = "--dtype bfloat16, --quantize 4bit, --network cpu or shard take less, and so does a smaller --size"
        raise UserError(f"{gigabytes(card)} are too few even so; {gigabytes(least)} would do for one image; {advice}")
    batch = f"a batch of up to {_batch(largest[fits[0]])}"
    typer.echo(f"{gigabytes(card)}, {USABLE:.0%} of it used: --memory {fits[0]} and {batch}; text encoders stay on the CPU")


def _batch(largest: int) -> str:
    return "none" if not largest else f"{MOST} or more" if largest >= MOST else str(largest)
