"""Samplers: a solver with the levels and the settings of diffusers' scheduler of that kind."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chainrule.errors import Note, UserError, unknown
from chainrule.noise import Diffusion, Flow
from chainrule.plan import Grid
from chainrule.solve import DDIM, TCD, Ancestral, Consistency, DPMSolver, Prediction, Process, Solver

Spacing = Callable[[Any, int], None]  # (scheduler, steps): sets its timesteps


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a model is sampled: `levels(steps)` is the grid of that many calls, `start` the scale of the initial noise."""

    name: str
    solver: Solver
    levels: Callable[[int], Grid]
    scheduler: Any  # diffusers' own, which this equals
    spacing: Spacing
    start: float = 1.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A solver by name: diffusers' scheduler of that kind, what of its configuration can be differentiated, how to make it."""

    scheduler: str
    solver: Callable[[Process, Any], Solver]
    needs: Mapping[str, object]  # settings, and the only value each may have; None: nothing switched on
    strides: bool = False  # whether its step to the next timestep is always 1000 // steps, whatever its timesteps are


# Whatever the kind: these change the timesteps, the noise scales or the image in ways that no solver here has.
OFF = (
    "clip_sample", "thresholding", "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "use_flow_sigmas", "invert_sigmas", "stochastic_sampling",
)  # fmt: skip
MULTISTEP = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "zero"}
KINDS: Mapping[str, Kind] = {
    "ddim": Kind("DDIMScheduler", lambda process, config: DDIM(process), {}, strides=True),
    "ddpm": Kind(
        "DDPMScheduler", lambda process, config: Ancestral(process), {"variance_type": "fixed_small"}, strides=True
    ),
    "euler": Kind(
        "EulerDiscreteScheduler", lambda process, config: DDIM(process),
        {"interpolation_type": "linear", "timestep_type": "discrete"},
    ),
    "euler-a": Kind("EulerAncestralDiscreteScheduler", lambda process, config: Ancestral(process), {}),
    "dpm++": Kind("DPMSolverMultistepScheduler", lambda process, config: DPMSolver(process), MULTISTEP | {"solver_order": 2}),
    "dpm++3m": Kind(
        "DPMSolverMultistepScheduler",
        lambda process, config: DPMSolver(process, 3, settle=15 if config.lower_order_final else 0),
        MULTISTEP | {"solver_order": 3},
    ),
    # The stochastic equation of the same marginals: DDIM with eta = 1; flows have it too.
    "sde": Kind("DDIMScheduler", lambda process, config: Ancestral(process), {}, strides=True),
    "lcm": Kind("LCMScheduler", lambda process, config: Consistency(process, config.timestep_scaling), {}),
    "tcd": Kind("TCDScheduler", lambda process, config: TCD(process), {}),
}  # fmt: skip
SOLVERS = tuple(KINDS)
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_SOLVERS: Mapping[str, Callable[[Process], Solver]] = {"euler": DDIM, "sde": Ancestral}
# Schedulers that are not here, and the solver that comes nearest; all others: ddim.
NEAREST = {
    "UniPCMultistepScheduler": "dpm++", "DEISMultistepScheduler": "dpm++",
    "DPMSolverSinglestepScheduler": "dpm++", "HeunDiscreteScheduler": "euler", "LMSDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "euler",
}  # fmt: skip


# Schedulers whose pipelines are sampled by another solver over the same number of steps, which a warning says.
REPLACED = {"PNDMScheduler": "ddim"}  # Stable Diffusion 1.x as it ships; the papers sample it by DDIM


def check(name: str | None) -> None:
    """Raises UserError for a solver that is not there."""
    if name is not None and name not in KINDS:
        raise unknown("solver", name, SOLVERS)


def own_spacing(scheduler: Any, steps: int, **options: Any) -> None:
    """The timesteps the scheduler itself takes for a number of steps."""
    scheduler.set_timesteps(steps, **options)


def check_scheduler(scheduler: str, name: str | None) -> None:
    """Raises UserError for a pipeline's scheduler, by its class, that has no solver here, unless another one is asked for."""
    if scheduler == FLOW and name not in (None, *FLOW_SOLVERS):
        raise UserError(f"the solver {name} is for diffusion models, and this one is a flow; its solvers are euler and sde")
    if name is None and scheduler not in (FLOW, *REPLACED, *(kind.scheduler for kind in KINDS.values())):
        nearest = NEAREST.get(scheduler, "ddim")
        raise UserError(f"the scheduler {scheduler} is not supported; sample with the nearest solver, {nearest}")


def shifted(tokens: int, top: float, spacing: Callable[..., None] | None = None) -> Spacing:
    """Timesteps of a flow, shifted by the number of the image's tokens where the scheduler is configured so.

    The shift grows linearly from `base_shift` at `base_image_seq_len` tokens to `max_shift` (`top` where it is not said) at
    `max_image_seq_len`, as Stable Diffusion 3.5's and FLUX's pipelines compute it.
    """

    def set_timesteps(scheduler: Any, steps: int) -> None:
        own, options = scheduler.config, {}
        if own.get("use_dynamic_shifting"):
            few, many = own.get("base_image_seq_len", 256), own.get("max_image_seq_len", 4096)
            low, high = own.get("base_shift", 0.5), own.get("max_shift", top)
            options = {"mu": low + (high - low) * (tokens - few) / (many - few)}
        (spacing or own_spacing)(scheduler, steps, **options)

    return set_timesteps


def sampler_of(
    scheduler: Any, name: str | None = None, spacing: Spacing = own_spacing, settings: Mapping[str, object] | None = None,
) -> Sampler:  # fmt: skip
    """The sampler of a pipeline's scheduler as it is configured, or by another solver over the same noise schedule.

    `spacing` sets the timesteps as the pipeline does, `settings` change the scheduler's own. Raises UserError for a scheduler or a
    setting no solver here has.
    """
    check(name)
    check_scheduler(type(scheduler).__name__, name)
    if settings:
        scheduler = _remade(scheduler, type(scheduler), **settings)
    if type(scheduler).__name__ == FLOW:
        return _flow(scheduler, spacing, name or "euler")
    own = _own(scheduler)
    if "alphas_cumprod" not in vars(scheduler):
        raise UserError(f"the scheduler {type(scheduler).__name__} is not supported; the nearest supported is {FLOW}")
    if not name and not own:
        own_class = type(scheduler).__name__
        name = REPLACED[own_class]
        warnings.warn(f"the scheduler {own_class} is replaced: sampled by {name} over the same number of steps", Note, stacklevel=2)
    name = name or own
    kind = KINDS[name]
    if name != own:  # as users do who swap a pipeline's scheduler
        import diffusers

        scheduler = _remade(scheduler, getattr(diffusers, kind.scheduler), **{"clip_sample": False, **kind.needs})
    _check(scheduler, kind.needs)
    table, prediction = scheduler.alphas_cumprod, Prediction(scheduler.config.prediction_type)
    process = Process(Diffusion.of(table, _end(name, scheduler)), prediction)
    # Euler's initial noise has the scale sigma, in units of the image 1 / alpha, where its first level is the highest.
    scaled = name in ("euler", "euler-a") and scheduler.config.timestep_spacing != "leading"
    start = process.schedule(process.schedule.top)[1] if scaled else 1.0
    levels = lambda steps: _levels(scheduler, steps, own_spacing, 1, kind.strides)
    return Sampler(name, kind.solver(process, scheduler.config), levels, scheduler, spacing, start)


def _remade(scheduler: Any, kind: Any, **settings: object) -> Any:
    """A fresh scheduler of this class with another's settings, and these.

    diffusers notes which settings were defaults, and gives a class its own instead of them. A pipeline that mends an old
    configuration (steps_offset, clip_sample) leaves its mended values under that note; here they are kept.
    """
    config, own = dict(scheduler.config), inspect.signature(type(scheduler)).parameters
    defaults = [key for key in config.get("_use_default_values", ()) if key in own and config.get(key) == own[key].default]
    return kind.from_config(config | {"_use_default_values": defaults}, **settings)


def _own(scheduler: Any) -> str:
    """The solver a pipeline's scheduler is: of those over its class, the one with the fewest settings against it; "" if none."""
    names = [name for name, kind in KINDS.items() if kind.scheduler == type(scheduler).__name__]
    return min(names, key=lambda name: len(_against(scheduler, KINDS[name].needs)), default="")


def _against(scheduler: Any, needs: Mapping[str, object]) -> list[str]:
    """The settings a scheduler has otherwise than a solver needs them."""
    return [option for option, value in needs.items() if scheduler.config.get(option, value) != value]


def _end(name: str, scheduler: Any) -> int:
    """The level a sampler's last step lands on."""
    config, own = scheduler.config, inspect.signature(type(scheduler)).parameters
    lowest = "final_sigmas_type" in own and config.final_sigmas_type == "sigma_min"
    return int(name == "tcd" or (name in ("ddim", "sde") and not config.set_alpha_to_one) or lowest)


def _flow(scheduler: Any, spacing: Spacing, name: str) -> Sampler:
    _check(scheduler, {})
    process = Process(Flow(scheduler.config.num_train_timesteps), Prediction.FLOW)
    return Sampler(
        name, FLOW_SOLVERS[name](process), lambda steps: _levels(scheduler, steps, spacing, 0, False), scheduler, spacing
    )


def _check(scheduler: Any, needs: Mapping[str, object]) -> None:
    config = scheduler.config
    for option in inspect.signature(type(scheduler)).parameters:  # a config also keeps what another scheduler left in it
        if option in OFF and config.get(option):
            cannot = "which chains that are differentiated cannot use"
            raise UserError(f"the scheduler has {option}=True, {cannot}; set it to False, or take another solver")
    for option in _against(scheduler, needs):
        here = f"the scheduler has {option}={config[option]!r}"
        raise UserError(f"{here}, but only {needs[option]!r} is supported; set it, or take another solver")


def _levels(scheduler: Any, steps: int, spacing: Spacing, offset: int, strides: bool) -> Grid:
    """The levels of diffusers' own timesteps, then 0. Raises UserError for a number of steps the scheduler does wrong."""
    fresh, total = _remade(scheduler, type(scheduler)), scheduler.config.num_train_timesteps
    try:
        spacing(fresh, steps)
    except (ValueError, IndexError) as error:
        raise UserError(f"steps is {steps}, which {type(scheduler).__name__} cannot do: {str(error).splitlines()[0]}") from error
    times = [int(t) if float(t).is_integer() else float(t) for t in fresh.timesteps]
    if max(times) + offset > total:
        raise UserError(f"steps is {steps}, but with steps_offset={scheduler.config.steps_offset} it must be below {total}")
    if len(times) != steps or any(a <= b for a, b in itertools.pairwise(times)) or times[-1] + offset <= 0:
        raise UserError(f"steps is {steps}, but {type(scheduler).__name__} has no {steps} different timesteps")
    if strides and any(a - b != total // steps for a, b in itertools.pairwise(times)):
        spacing, name = scheduler.config.timestep_spacing, type(scheduler).__name__
        advice = f"take a divisor of {total} with leading or trailing spacing, or the solver euler"
        raise UserError(f"steps is {steps}: with {spacing} spacing diffusers' {name} steps past its timesteps; {advice}")
    return (*(t + offset for t in times), 0)
