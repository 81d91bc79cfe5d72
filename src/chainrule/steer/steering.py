"""Steering: the images of a model moved towards a reward, no weight changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from chainrule.adapters import whole
from chainrule.asked import numbers, texts
from chainrule.config import SteerConfig
from chainrule.errors import UserError, unknown
from chainrule.guidance import value_among
from chainrule.loop import Listener, Row, complete, open_run, told
from chainrule.models import Model
from chainrule.processes import Processes
from chainrule.rewards import AnyReward, Reward, as_reward, probe
from chainrule.settings import Opening, Steering, chosen
from chainrule.solve import DDIM, Prediction
from chainrule.steer.found import Steered
from chainrule.steer.gradients import GRADIENTS, check_defined
from chainrule.steer.guided_sampling import GUIDES
from chainrule.steer.images import Picture, read_image
from chainrule.steer.kinds import CONTROLS, LATENT, Over
from chainrule.steer.search import Batch
from chainrule.steer.task import SteerTask


def check(settings: Steering) -> Over:
    """The variable, if it goes together with the gradient and the rest. Raises UserError."""
    over, way = Over.parse(settings.over), GRADIENTS.get(settings.gradient)
    if settings.gradient not in {**GRADIENTS, **GUIDES}:
        raise unknown("gradient", settings.gradient, {**GRADIENTS, **GUIDES})
    kinds = way.kinds if way else (LATENT,)
    if over == Over() and kinds == (CONTROLS,):  # nobody asked for the latent: it is the default
        over = Over(CONTROLS)
    check_defined(settings.gradient, over.kind, kinds)
    if not over.kind.is_state and (settings.bound or settings.renormalize):
        raise UserError(f"over is {over.kind.name!r}, but bound and renormalize are for a latent; leave them out")
    if settings.bound and settings.renormalize:
        raise UserError("bound and renormalize cannot both be held; leave one out")
    if not way and (settings.bound or settings.renormalize):
        raise UserError(f"{settings.gradient} guides a run and holds no latent; leave bound and renormalize out")
    return over


def steer(
    model: Model, prompts: str | Sequence[str], reward: AnyReward, settings: Steering | None = None, *,
    seed: int = 0, seeds: int | Sequence[int] | None = None, images: Picture | Sequence[Picture] | None = None,
    out: str | Path | None = None, resume: bool = False, overwrite: bool = False,
    on_update: Callable[[Row], None] | None = None, watch: Callable[[Steered], str | None] | None = None, **options: Any,
) -> Steered:  # fmt: skip
    """Optimize a latent, an embedding or controls of each image, or weights, by gradients of a reward through the chain.

    One image per prompt, with `seeds` (default: seed, seed + 1, ...). `images` are pictures to start from instead of noise:
    they enter by DDIM inversion, and stay what `keep` holds on to; then `prompts` say what they show, "" if nothing.
    `settings`, or `options` instead of it, are a `chainrule.settings.Steering`: over ("latent"), gradient ("sdo"),
    updates (50), lr, keep, bound, ... With `out`, a folder gets the images, the curve and a report; it must be new or empty,
    unless `resume` (continues, bit for bit) or `overwrite`. Ctrl-C, SIGTERM and SIGHUP keep the best so far and return.
    `watch` gets what was found so far after every update; what it returns, if anything, is a reason to stop.
    An image does not depend on the others it is steered with, unless `patience` ends a batch or they share weights; then the
    adapter that is saved is the last update's, the images the best of any. With DPM-Solver++ a chain from the middle starts at
    first order.
    Raises UserError for bad input before anything runs.
    """
    guidance, options = value_among(options)
    settings = chosen(Steering, settings, options)
    model, over, reward = model.guided(guidance or settings.guidance), check(settings), as_reward(reward)
    asked = Images.of(prompts, seed, seeds, images)
    _check_together(model, settings, over, asked)
    batch = asked.read(model)
    model = model.embedded(asked.prompts)  # a word the model does not know is found here
    reward = reward.to(model.device)
    probe(reward, model.size, model.device)
    processes = Processes.here(model.device, settings.timeout)
    recorded = settings.model_copy(update={"over": str(over), "guidance": model.guidance_spec})
    kept = lambda place: open_run(place, asked.config(model, reward, recorded), processes, resume=resume, overwrite=overwrite)
    with kept(out) if out is not None else nullcontext() as run:
        task = SteerTask.start(model, reward, settings, over, batch, processes)
        looking = (Listener(updated=lambda row: watch(task.result())),) if watch else ()
        listeners = (*told(on_update), *looking)
        try:
            complete(task, run, listeners=listeners, save_every=settings.save_every, resume=resume, processes=processes)
        except BaseException:  # what was found before an error is kept
            if run and processes.main:
                task.save(run.folder)
            raise
        finally:
            task.remove()
    return task.result()


@dataclass(frozen=True, slots=True)
class Images:
    """What is steered: a prompt and a seed for each image, and the pictures to start from, if any."""

    prompts: list[str]
    seeds: list[int]
    sources: list[Picture] | None

    @classmethod
    def of(
        cls, prompts: str | Sequence[str], seed: int, seeds: int | Sequence[int] | None, images: Picture | Sequence[Picture] | None
    ) -> Images:  # fmt: skip
        """From what a user gives. Raises UserError where the numbers of them do not fit."""
        wanted = texts(prompts)
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
            images = [images]
        sources = None if images is None else list(images)
        if sources and len(wanted) == 1:
            wanted = wanted * len(sources)
        if not wanted or sources == []:
            raise UserError("nothing to steer: give at least one prompt, and at least one image if any")
        chosen_seeds = numbers([seed + k for k in range(len(wanted))] if seeds is None else seeds)
        for what, count in (("seeds", len(chosen_seeds)), ("images", len(sources) if sources else len(wanted))):
            if count != len(wanted):
                raise UserError(f"{len(wanted)} prompts but {count} {what}; give one each")
        return cls(wanted, chosen_seeds, sources)

    def read(self, model: Model) -> Batch:
        """With the pictures read and fitted to the model. Raises UserError for one that cannot be read."""
        pictures = torch.stack([read_image(source, model.size) for source in self.sources]) if self.sources else None
        return Batch(self.prompts, self.seeds, pictures)

    def config(self, model: Model, reward: Reward, settings: Steering) -> SteerConfig:
        """What the run keeps."""
        pictures = [str(source) if isinstance(source, (str, Path)) else "a picture" for source in self.sources or ()]
        return SteerConfig(
            model=model.name, opening=Opening(**model.opening), adapter=whole(model.base_adapters), reward=reward.name,
            prompts=tuple(self.prompts), seeds=tuple(self.seeds), image=tuple(pictures), settings=settings,
        )  # fmt: skip


def _check_together(model: Model, settings: Steering, over: Over, images: Images) -> None:
    """What can only be told with the model at hand. Raises UserError."""
    levels, solver, way = model.grid(settings.sample_steps), model.solver, GRADIENTS.get(settings.gradient)
    over.grid(levels, solver.process.schedule.offset)
    model.check_bands(levels)
    if not isinstance(solver, DDIM) and not (way and way.any_solver):
        raise UserError(f"the gradient {settings.gradient!r} is for DDIM; sample with the solver ddim, or take sdo or full")
    if solver.stochastic and (images.sources or over.time is not None):
        raise UserError(
            "pictures enter by DDIM inversion and latent@t continues a trajectory, "
            f"which {model.sampler.name} has not; use the solver ddim"
        )
    guide = None if way else GUIDES[settings.gradient][1](settings.strength)
    if guide and guide.needs_signal and not solver.process.schedule(levels[0])[0]:
        raise UserError("universal guidance divides by the signal, of which a flow's first level has none; take freedom")
    forgets = solver.process.prediction is Prediction.SAMPLE and not solver.process.schedule(0, finish=True)[1]
    if forgets and (images.sources or (way and way.inverts)):
        raise UserError(
            "a model that predicts the image forgets the state in its last step, so that it cannot be inverted; take sdo or full"
        )
    over.kind.check(model, len(images.prompts), settings.batch)
