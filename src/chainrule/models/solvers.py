"""Solvers by name, with the levels diffusers' scheduler of that name has."""

from __future__ import annotations

import itertools
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from chainrule.errors import UserError, unknown
from chainrule.noise import Schedule
from chainrule.plan import Grid
from chainrule.solve import DDIM, Consistency, DPMSolver, Prediction

SOLVERS = ("ddim", "dpm++", "lcm")


def check(name: str) -> None:
    """UserError for a solver that is not there."""
    if name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)


def made(scheduler: Any, name: str) -> dict[str, Any]:
    """`solver` and `levels` of a `Model`, from a pipeline's scheduler and a solver's name."""
    check(name)
    own = ddim(scheduler)
    end = 0 if name == "dpm++" or own.config.set_alpha_to_one else 1
    first = DDIM(Schedule.diffusion(own.alphas_cumprod, end), Prediction(own.config.prediction_type))
    if name == "ddim":
        return {"solver": first, "levels": lambda steps: levels(own, steps)}
    if name == "dpm++":
        multistep = DPMSolverMultistepScheduler.from_config(own.config, final_sigmas_type="zero")
        return {"solver": DPMSolver(first), "levels": lambda steps: _levels(multistep, steps)}
    consistent = LCMScheduler.from_config(own.config)
    return {"solver": Consistency(first), "levels": lambda steps: _levels(consistent, steps)}


def ddim(scheduler: Any) -> DDIMScheduler:
    """DDIM with this scheduler's betas and settings, as users get by swapping a pipeline's scheduler for DDIM."""
    config = dict(scheduler.config)
    if "alphas_cumprod" not in vars(scheduler):
        raise UserError(f"the scheduler {type(scheduler).__name__} is not a diffusion one; the nearest supported is DDIMScheduler")
    if not isinstance(scheduler, DDIMScheduler):
        config["clip_sample"] = False
    made: DDIMScheduler = DDIMScheduler.from_config(config)
    for option in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if getattr(made.config, option):
            raise UserError(f"the scheduler has {option}=True, which chains that are differentiated cannot use; set it to False")
    return made


def levels(scheduler: DDIMScheduler, steps: int) -> Grid:
    """The levels of diffusers' own timesteps, then 0."""
    fresh = DDIMScheduler.from_config(scheduler.config)
    fresh.set_timesteps(steps)
    times = [int(t) for t in fresh.timesteps]
    stride, total = scheduler.config.num_train_timesteps // steps, scheduler.config.num_train_timesteps
    if max(times) >= total:
        raise UserError(f"steps is {steps}, but with steps_offset={scheduler.config.steps_offset} it must be below {total}")
    for a, b in itertools.pairwise(times):
        if a - b != stride:
            raise UserError(
                f"steps is {steps}: with {scheduler.config.timestep_spacing} spacing diffusers' DDIM needs a divisor of {total}"
            )
    return (*(t + 1 for t in times), 0)


def _levels(scheduler: Any, steps: int) -> Grid:
    """A scheduler's own timesteps as levels, then 0."""
    fresh = type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(steps)
    except ValueError as error:
        raise UserError(f"steps is {steps}, which {type(scheduler).__name__} cannot do: {error}") from error
    found = [int(t) + 1 for t in fresh.timesteps]
    if len(found) != steps or any(a <= b for a, b in itertools.pairwise(found)):
        raise UserError(f"steps is {steps}, but {type(scheduler).__name__} has no {steps} different timesteps")
    return (*found, 0)
