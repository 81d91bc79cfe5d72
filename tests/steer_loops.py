"""What steering is held to: the papers' loops written with diffusers' own schedulers, on random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from pipelines import score
from torch import Tensor

import chainrule as cr
from chainrule.chain import Memory
from chainrule.denoise import Condition
from chainrule.objective import Objective
from chainrule.steer.kinds import Over
from chainrule.steer.problem import Problem

STEPS, GUIDANCE, SEEDS, PROMPTS = 5, 3.0, [4, 9], ["a fox", "two bees"]
close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)


def problem(model: cr.Model, over: str = "latent", steps: int = STEPS, memory: str = "recompute") -> tuple[Problem, Tensor]:
    chain = model.guided(GUIDANCE).chain(PROMPTS, SEEDS, Memory(memory))
    grid = Over.parse(over).grid(model.grid(steps))
    return Problem(chain, grid, model.codec.decode, PROMPTS, Objective.of(score)), model.noise(SEEDS)


def network(model: cr.Model, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
    """What a person would write: the two branches of guidance, one after the other."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        u, c = (model.pipe.unet(x, t, encoder_hidden_states=e.states).sample for e in (condition.negative, condition.positive))
        return u + GUIDANCE * (c - u)

    return call


def paper_loop(
    model: cr.Model, scheduler: Any, condition: Condition, x: Tensor, live: Callable[[int], bool], first: int = 0
) -> Tensor:  # fmt: skip
    """SDO's Fig. 4 and 5: diffusers' scheduler steps with the graph, the network only where `live`. The summed losses."""
    call = network(model, condition)
    for i, t in enumerate(scheduler.timesteps[first:]):
        with torch.set_grad_enabled(live(i)):
            answer = call(x, t)
        x = scheduler.step(answer, t, x).prev_sample
    return -score(model.codec.decode(x), PROMPTS).sum()


def near(ours: Tensor, theirs: Tensor, solver: str) -> None:
    """The same up to the arithmetic of diffusers' scheduler, which for DPM-Solver++ is float32."""
    assert theirs.norm() > 1e-8
    assert float((ours - theirs).norm() / theirs.norm()) < (1e-8 if solver == "ddim" else 2e-6)


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero", "solver_order": 3}),
}


def scheduler_of(model: cr.Model, name: str, steps: int = STEPS) -> Any:
    kind, options = SCHEDULERS[name]
    made = kind.from_config(model.pipe.scheduler.config, **options)
    made.alphas_cumprod = made.alphas_cumprod.double()  # diffusers computes its scales in float32, the laws are in float64
    made.set_timesteps(steps)
    if name == "ddim":
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    else:
        squared = made.alphas_cumprod[made.timesteps]
        made.sigmas = torch.cat([((1 - squared) / squared).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return made
