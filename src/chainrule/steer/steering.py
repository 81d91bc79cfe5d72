"""Steering: the images of a model moved towards a reward, no weight changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chainrule.errors import UserError, unknown
from chainrule.models import Model
from chainrule.rewards import Reward, RewardFunction, probe, reward_of
from chainrule.runs import Run
from chainrule.settings import Steering
from chainrule.solve import DDIM, Consistency
from chainrule.steer.found import Steered, together
from chainrule.steer.gradients import GRADIENTS
from chainrule.steer.guidance import GUIDES
from chainrule.steer.images import check_image, encoded
from chainrule.steer.record import save
from chainrule.steer.search import Bar, Search
from chainrule.steer.variables import Over

Source = str | Path | Image.Image


def check(settings: Steering) -> Over:
    """The variable, if it goes together with the gradient and the rest. Raises UserError."""
    over = Over.parse(settings.over if settings.gradient != "flowgrad" or settings.over != "latent" else "controls")
    if settings.gradient not in {**GRADIENTS, **GUIDES}:
        raise unknown("gradient", settings.gradient, {**GRADIENTS, **GUIDES})
    kinds = GRADIENTS[settings.gradient][1] if settings.gradient in GRADIENTS else ("latent",)
    if over.kind not in kinds:
        raise UserError(f"over is {over.kind!r}, but the gradient {settings.gradient!r} is for {' and '.join(kinds)}")
    if over.kind != "latent" and (settings.bound or settings.renormalize):
        raise UserError(f"over is {over.kind!r}, but bound and renormalize are for a latent; leave them out")
    return over


def steer(
    model: Model, prompts: Sequence[str], reward: Reward | RewardFunction, *, seed: int = 0,
    seeds: Sequence[int] | None = None, images: Sequence[Source] | None = None, out: str | Path | None = None,
    overwrite: bool = False, on_update: Callable[[dict[str, float]], None] | None = None, **options: Any,
) -> Steered:  # fmt: skip
    """Optimize a latent, an embedding or controls of each image, or weights, by gradients of a reward through the chain.

    One image per prompt, with `seeds` (default: seed, seed + 1, ...). `images` are pictures to start from instead of noise:
    they enter by DDIM inversion, and stay what `keep` holds on to; then `prompts` say what they show, "" if nothing.
    `options` are the fields of `chainrule.settings.Steering`: over ("latent"), gradient ("sdo"), updates (50), lr, keep,
    bound, ... With `out`, a folder gets the images, the curve and a report. Ctrl-C keeps the best so far and returns.
    An image does not depend on the others it is steered with. Raises UserError for bad input before anything runs.
    """
    settings = Steering.make(options)
    over, scorer = check(settings), reward_of(reward)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    pictures_in = list(images) if images is not None else None
    if not prompts:
        raise UserError("no prompts: give at least one")
    if pictures_in is not None and len(prompts) == 1:
        prompts = prompts * len(pictures_in)
    numbers = list(seeds) if seeds is not None else [seed + k for k in range(len(prompts))]
    for what, count in (("seeds", len(numbers)), ("images", len(pictures_in) if pictures_in is not None else len(prompts))):
        if count != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {count} {what}; give one each")
    over.grid(model.grid(settings.steps))
    if not isinstance(model.solver, DDIM) and settings.gradient not in ("sdo", "full", "flowgrad"):
        raise UserError(f"the gradient {settings.gradient!r} is for DDIM; sample with the solver ddim, or take sdo or full")
    if pictures_in is not None and isinstance(model.solver, Consistency):
        raise UserError("images enter by DDIM inversion, which consistency sampling does not follow; use the solver ddim")
    if over.kind == "weights" and len(prompts) > settings.batch:
        raise UserError(f"batch is {settings.batch}, but over weights all {len(prompts)} images are steered together; raise it")
    for place in pictures_in or ():
        if not isinstance(place, Image.Image):
            check_image(place)
    scorer = scorer.to(model.device)
    probe(scorer, model.image_size, model.device)
    run = _open(out, model, scorer, settings, prompts, numbers, overwrite) if out is not None else None
    found, tables = Steered(prompts), []
    bar = Bar(settings, -(-len(prompts) // settings.batch), on_update)
    with bar.shown(), torch.no_grad():
        for start in range(0, len(prompts), settings.batch):
            part = slice(start, start + settings.batch)
            given = encoded(model, pictures_in[part]) if pictures_in is not None else None
            search = Search(model, settings, over, scorer, prompts[part], numbers[part], given)
            try:
                tables.append(search.run(bar))
                search.report(found)
                if search.adapter and run is not None:
                    search.adapter.save(run.adapter)
            finally:
                if search.adapter:
                    search.adapter.remove()
            if bar.stopped:
                break
    found.prompts = prompts[: len(found.images)]
    found.curve = together(tables)
    if run is not None:
        save(found, run)
    return found


def _open(
    out: str | Path, model: Model, scorer: Reward, settings: Steering, prompts: list[str], seeds: list[int], overwrite: bool
) -> Run:
    config: dict[str, Any] = {
        "model": model.name,
        "kind": "steered",
        "method": f"{settings.gradient} over {settings.over}",
        "reward": scorer.name,
    }
    config |= {"prompts": prompts, "seeds": seeds, **settings.model_dump()}
    return Run.create(out, config, overwrite=overwrite)
