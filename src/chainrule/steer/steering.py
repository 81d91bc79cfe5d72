"""Steering: the images of a model moved towards a reward, no weight changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from chainrule.adapters import Adapter, Band, inject, unused_name
from chainrule.adapters.lora import every_layer
from chainrule.chain import Memory
from chainrule.config import SteerConfig
from chainrule.denoise import guidance_is_input
from chainrule.errors import UserError, unknown
from chainrule.guidance import reads_negative
from chainrule.models import Model
from chainrule.rewards import Reward, RewardFunction, probe, reward_of
from chainrule.runs import Run
from chainrule.settings import Opening, Steering, chosen
from chainrule.solve import DDIM, Prediction
from chainrule.steer.found import Steered, together
from chainrule.steer.gradients import GRADIENTS
from chainrule.steer.guidance import GUIDES
from chainrule.steer.images import read_image
from chainrule.steer.record import save
from chainrule.steer.search import Bar, Search
from chainrule.steer.variables import Over

Source = str | Path | Image.Image


def check(settings: Steering) -> Over:
    """The variable, if it goes together with the gradient and the rest. Raises UserError."""
    over = Over.parse("controls" if settings.gradient == "flowgrad" and settings.over == "latent" else settings.over)
    if settings.gradient not in {**GRADIENTS, **GUIDES}:
        raise unknown("gradient", settings.gradient, {**GRADIENTS, **GUIDES})
    kinds = GRADIENTS[settings.gradient][1] if settings.gradient in GRADIENTS else ("latent",)
    if over.kind not in kinds:
        raise UserError(f"over is {over.kind!r}, but the gradient {settings.gradient!r} is for {' and '.join(kinds)}")
    if over.kind != "latent" and (settings.bound or settings.renormalize):
        raise UserError(f"over is {over.kind!r}, but bound and renormalize are for a latent; leave them out")
    if settings.bound and settings.renormalize:
        raise UserError("bound and renormalize cannot both be held; leave one out")
    if settings.gradient in GUIDES and (settings.bound or settings.renormalize):
        raise UserError(f"{settings.gradient} guides a run and holds no latent; leave bound and renormalize out")
    return over


def steer(
    model: Model, prompts: Sequence[str], reward: Reward | RewardFunction, settings: Steering | None = None, *, seed: int = 0,
    seeds: Sequence[int] | None = None, images: Source | Sequence[Source] | None = None, out: str | Path | None = None,
    overwrite: bool = False, on_update: Callable[[dict[str, float]], None] | None = None, **options: Any,
) -> Steered:  # fmt: skip
    """Optimize a latent, an embedding or controls of each image, or weights, by gradients of a reward through the chain.

    One image per prompt, with `seeds` (default: seed, seed + 1, ...). `images` are pictures to start from instead of noise:
    they enter by DDIM inversion, and stay what `keep` holds on to; then `prompts` say what they show, "" if nothing.
    `settings`, or `options` instead of it, are a `chainrule.settings.Steering`: over ("latent"), gradient ("sdo"),
    updates (50), lr, keep, bound, ... With `out`, a folder gets the images, the curve and a report. Ctrl-C keeps the best so
    far and returns. An image does not depend on the others it is steered with, unless `patience` ends a batch or they share
    weights; then the adapter that is saved is the last update's, the images the best of any. With DPM-Solver++ a chain from
    the middle starts at first order. Raises UserError for bad input before anything runs.
    """
    settings = chosen(Steering, settings, options)
    over, scorer = check(settings), reward_of(reward)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    sources = [images] if isinstance(images, (str, Path, Image.Image)) else None if images is None else list(images)
    if sources and len(prompts) == 1:
        prompts = prompts * len(sources)
    if not prompts or sources == []:
        raise UserError("nothing to steer: give at least one prompt, and at least one image if any")
    numbers = list(seeds) if seeds is not None else [seed + k for k in range(len(prompts))]
    for what, count in (("seeds", len(numbers)), ("images", len(sources) if sources else len(prompts))):
        if count != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {count} {what}; give one each")
    _check_together(model, settings, over, len(prompts), bool(sources))
    given = torch.stack([read_image(source, model.size) for source in sources]) if sources else None
    for start in range(0, len(prompts), settings.batch):  # a word the model does not know is found here
        model.embed(prompts[start : start + settings.batch])
    scorer = scorer.to(model.device)
    probe(scorer, model.size, model.device)
    run = _open(out, model, scorer, settings, over, prompts, numbers, sources, overwrite) if out is not None else None
    found, tables = Steered(prompts), []
    bar = Bar(settings, -(-len(prompts) // settings.batch), on_update)
    try:
        with bar.shown(), torch.no_grad(), _trained(model, settings, over) as (steered, adapter):
            for start in range(0, len(prompts), settings.batch):
                part = slice(start, start + settings.batch)
                pictures = None if given is None else given[part]
                search = Search(steered, settings, over, scorer, prompts[part], numbers[part], pictures, adapter)
                with steered.blockwise(Memory(settings.memory)):
                    tables.append(search.run(bar))
                search.report(found)
                if bar.stopped:
                    break
            if adapter and run is not None:
                adapter.save(run.adapter)
    finally:  # what was found before an error is kept
        found.prompts, found.curve = prompts[: len(found.images)], together(tables)
        if run is not None and found.images:
            save(found, run)
            reason = "interrupted" if bar.stopped else "finished"
            run.write_text("stopped.txt", f"{reason} at update {len(found.curve) - 1}\n")
    return found


def _check_together(model: Model, settings: Steering, over: Over, count: int, pictures: bool) -> None:
    """What can only be told with the model at hand. Raises UserError."""
    levels, solver = model.grid(settings.sample_steps), model.solver
    over.grid(levels, solver.process.schedule.offset)
    model.check_bands(levels)
    exact = settings.gradient in ("sdo", "full", "flowgrad")
    if not isinstance(solver, DDIM) and not exact:
        raise UserError(f"the gradient {settings.gradient!r} is for DDIM; sample with the solver ddim, or take sdo or full")
    if solver.stochastic and (pictures or over.time is not None):
        raise UserError(
            "pictures enter by DDIM inversion and latent@t continues a trajectory, "
            f"which {model.sampler.name} has not; use the solver ddim"
        )
    if settings.gradient == "universal" and not solver.process.schedule(levels[0])[0]:
        raise UserError("universal guidance divides by the signal, of which a flow's first level has none; take freedom")
    if (
        solver.process.prediction is Prediction.SAMPLE
        and not solver.process.schedule(0, finish=True)[1]
        and (pictures or settings.gradient in ("adjoint", "invertible"))
    ):
        raise UserError(
            "a model that predicts the image forgets the state in its last step, so that it cannot be inverted; take sdo or full"
        )
    guidance = model.guided(settings.guidance).guidance
    if over.kind == "negative" and guidance_is_input(model.denoiser):
        raise UserError(f"over is 'negative', but {model.name} reads its guidance and no negative embedding; use prompt")
    if over.kind == "negative" and not reads_negative(guidance):
        raise UserError(f"guidance is {guidance}, with which the negative embedding is not used; give more than 1")
    if (
        over.kind in ("prompt", "negative")
        and not model.embed([""] if not model.defaults.labels else model.defaults.labels[:1]).positive.states.is_floating_point()
    ):
        raise UserError(f"over is {over.kind!r}, but {model.name} has classes instead of embeddings; use latent")
    if over.kind == "weights" and count > settings.batch:
        raise UserError(f"batch is {settings.batch}, but over weights all {count} images are steered together; raise it")


@contextmanager
def _trained(model: Model, settings: Steering, over: Over) -> Iterator[tuple[Model, Adapter | None]]:
    """The model with a LoRA on every layer while its weights are steered; otherwise the model."""
    if over.kind != "weights":
        yield model, None
        return
    name, targets = unused_name(model.network, "steered"), every_layer(model.network)
    adapter = inject(model.network, name, rank=settings.rank, targets=targets, component=model.component)
    try:
        yield replace(model, active={**model.active, name: Band()}), adapter
    finally:
        adapter.remove()


def _open(
    out: str | Path, model: Model, scorer: Reward, settings: Steering, over: Over, prompts: list[str], seeds: list[int],
    sources: list[Source] | None, overwrite: bool,
) -> Run:  # fmt: skip
    pictures = [str(source) if isinstance(source, (str, Path)) else "a picture" for source in sources or ()]
    config = SteerConfig(
        model=model.name, opening=Opening(**model.opening), adapter=model.base_adapters, reward=scorer.name, prompts=tuple(prompts),
        seeds=tuple(seeds), image=tuple(pictures), settings=settings.model_copy(update={"over": str(over)}),
    )  # fmt: skip
    return Run.create(out, config, overwrite=overwrite)
