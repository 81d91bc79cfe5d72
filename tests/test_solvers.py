"""Solvers: diffusers' own pipeline under every scheduler configuration, orders of convergence, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep as multistep
from families import CASES, sd3
from pipelines import make_pipeline
from torch import Tensor

import chainrule as cr
from chainrule.adapters import selected
from chainrule.cast import Member
from chainrule.chain import Chain
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.models.compared import pipeline_images
from chainrule.noise import Diffusion, Flow, Noise
from chainrule.plan import Grad, Jump, Path, Plan, walk
from chainrule.solve import DDIM, TCD, Ancestral, DPMSolver, Prediction, Process, Step

PROMPTS, SEEDS = ["a fox", "two bees"], [3, 8]
SPACINGS, PREDICTIONS = ("leading", "trailing", "linspace"), ("epsilon", "v_prediction", "sample")


def every() -> dict[str, tuple[str, dict[str, Any], int]]:
    """Scheduler, what its configuration changes, steps."""
    found: dict[str, tuple[str, dict[str, Any], int]] = {}
    for spacing, prediction in itertools.product(SPACINGS, PREDICTIONS):
        options = {"timestep_spacing": spacing, "prediction_type": prediction}
        if prediction != "sample":  # diffusers' Euler has no step for it
            found[f"euler-{spacing}-{prediction}"] = ("EulerDiscreteScheduler", options, 7)
            found[f"euler-a-{spacing}-{prediction}"] = ("EulerAncestralDiscreteScheduler", options, 7)
        found[f"dpm++-{spacing}-{prediction}"] = ("DPMSolverMultistepScheduler", options, 7)
        found[f"dpm++3m-{spacing}-{prediction}"] = ("DPMSolverMultistepScheduler", options | {"solver_order": 3}, 7)
        if spacing != "linspace":
            found[f"ddim-{spacing}-{prediction}"] = ("DDIMScheduler", options | {"set_alpha_to_one": spacing == "trailing"}, 8)
            found[f"ddpm-{spacing}-{prediction}"] = ("DDPMScheduler", options, 8)
    found["dpm++-20"] = ("DPMSolverMultistepScheduler", {}, 20)
    found["euler-sigma-min"] = ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, 7)
    found["ddim-offset-0"] = ("DDIMScheduler", {"steps_offset": 0}, 10)
    for prediction in ("epsilon", "v_prediction"):
        found[f"lcm-{prediction}"] = ("LCMScheduler", {"prediction_type": prediction}, 4)
        found[f"tcd-{prediction}"] = ("TCDScheduler", {"prediction_type": prediction}, 4)
    return found


EVERY = every()


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' multistep scheduler as it is, but for its float32, which is float64."""
    monkeypatch.setattr(multistep, "torch", SimpleNamespace(**vars(torch) | {"float32": torch.float64}))
    monkeypatch.setattr(multistep, "np", SimpleNamespace(**vars(np) | {"float32": np.float64}))


def dpm_pipeline(order: int, **options: Any) -> Any:
    pipe = make_pipeline()
    pipe.scheduler = multistep.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=order, **options)
    return pipe


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15])
@pytest.mark.parametrize("options", [{}, {"lower_order_final": False}, {"euler_at_final": True}], ids=str)
@pytest.mark.parametrize("order", [2, 3])
def test_a_multistep_solver_is_diffusers_at_every_step(exactly: None, order: int, options: dict[str, Any], steps: int) -> None:
    """In float64, with the orders of the first and the last steps: fewer than 15 end otherwise than 15."""
    pipe, theirs = dpm_pipeline(order, **options), []
    model = cr.load(pipe)
    assert model.sampler.name == {2: "dpm++", 3: "dpm++3m"}[order]
    ours = list(model.states(PROMPTS, SEEDS, steps, 3.0))
    pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=3.0, latents=model.noise(SEEDS), output_type="latent",
        callback_on_step_end=lambda pipe, step, time, seen: theirs.append(seen["latents"]) or {},
    )  # fmt: skip
    assert len(ours) == len(theirs) == steps
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).abs().max()) < 1e-11


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("live", ["######", "##----", "#-=-#-", "======", "---###", "-#---#", "-----#"])
def test_a_multistep_solvers_gradient_is_plain_autograds_through_the_pipeline(
    exactly: None, monkeypatch: pytest.MonkeyPatch, live: str, order: int, memory: str
) -> None:
    """The pipeline's own code with its graph, cut where a call is dead; the leading dead calls are the plan's trunk."""
    pipe, steps = dpm_pipeline(order), len(live)
    model = cr.load(pipe)
    adapter = model.adapt("mine", rank=2)
    for seed, weight in enumerate(adapter.parameters()):
        weight.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    score = lambda images, prompts: -(images - 0.4).square().mean((1, 2, 3))
    path = tuple(replace(jump, grad=Grad(grad)) for jump, grad in zip(walk(model.grid(steps)), live, strict=True))
    dead = len(live) - len(live.lstrip("-"))
    cr.gradient(model, Plan(path[:dead], (path[dead:],)), score, PROMPTS, SEEDS, guidance=3.0, memory=memory)
    named = adapter.named_parameters()
    ours, grads, forward = {key: weight.grad for key, weight in named.items()}, iter(live), pipe.unet.forward

    def cut(sample: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor]:
        grad = next(grads)
        (answer,) = forward(sample if grad == "#" else sample.detach(), *arguments, **options)
        return (answer.detach() if grad == "-" else answer,)

    monkeypatch.setattr(pipe.unet, "forward", cut)
    call = type(pipe).__call__.__wrapped__  # without its no_grad
    with selected(model.network, {"mine": 1.0}):
        options = {"num_inference_steps": steps, "guidance_scale": 3.0, "latents": model.noise(SEEDS), "output_type": "latent"}
        latents = call(pipe, PROMPTS, **options).images
    theirs = torch.autograd.grad(-score(model.codec.decode(latents), PROMPTS).mean(), list(named.values()))
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    for key, gradient in zip(named, theirs, strict=True):
        torch.testing.assert_close(ours[key], gradient, rtol=1e-8, atol=1e-8 * scale)
    assert scale > 0


@pytest.mark.parametrize("name", EVERY)
def test_a_pipelines_own_scheduler_is_reproduced(name: str) -> None:
    """Same seeds, same image: the stochastic ones draw what diffusers draws."""
    scheduler, options, steps = EVERY[name]
    pipe = make_pipeline(dtype=torch.float32)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **{"clip_sample": False} | options)
    more = {"eta": 0.3} if name.startswith("tcd") else {}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=3.0, generator=generators, output_type="np", **more
    ).images  # fmt: skip
    model = cr.load(pipe)
    assert model.sampler.name == ("euler-a" if name.startswith("euler-a") else name.split("-")[0])
    ours = model.render(PROMPTS, SEEDS, steps, 3.0).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 5e-5
    assert np.ptp(theirs) > 0.1


FLOWS = {
    "static": {"shift": 3.0},
    "none": {"shift": 1.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_is_shifted_as_its_pipeline_shifts_it(name: str) -> None:
    case = replace(CASES["sd3"], make=sd3)
    pipe = case.pipe()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    theirs = case.run(pipe, PROMPTS, SEEDS, 3.0, 7, output_type="np").images
    ours = cr.load(pipe).render(PROMPTS, SEEDS, 7, 3.0).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 2e-5


def test_tcd_without_noise_is_ddim_and_with_all_of_it_starts_from_the_clean_image() -> None:
    process = Process(Diffusion.of((1 - torch.linspace(1e-4, 2e-2, 1000).double()).cumprod(0), 1), Prediction.EPSILON)
    jump = Jump(800, 400)
    quiet, loud = TCD(process, 0.0).step((jump,), 0), TCD(process, 1.0).step((jump,), 0)
    assert (quiet.a, quiet.b) == pytest.approx(process.coefficients(800, 400)) and quiet.d == 0
    clean, (alpha, sigma) = process.coefficients(800, 1), process.schedule(400)
    alpha1, sigma1 = process.schedule(1)
    assert (loud.a, loud.b) == pytest.approx([alpha / alpha1 * c for c in clean])
    assert loud.d == pytest.approx(math.sqrt(sigma**2 - (alpha / alpha1 * sigma1) ** 2))


class Gaussian:
    """The exact answer for data N(mean, spread^2) per pixel, in what a network may predict."""

    mean, spread = 0.7, 0.5
    network = torch.nn.Identity()

    def __init__(self, process: Process) -> None:
        self.process = process

    def deviation(self, level: float) -> float:
        alpha, sigma = self.process.schedule(level)
        return math.hypot(alpha * self.spread, sigma)

    def state(self, level: float, unit: Tensor) -> Tensor:
        """The exact solution of the probability-flow ODE through alpha mean + deviation * unit."""
        return self.process.schedule(level)[0] * self.mean + self.deviation(level) * unit

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        alpha, sigma = self.process.schedule(level)
        away = (x - alpha * self.mean) / self.deviation(level) ** 2
        noise, clean = sigma * away, self.mean + alpha * self.spread**2 * away
        answers = {
            Prediction.EPSILON: noise, Prediction.SAMPLE: clean, Prediction.VELOCITY: alpha * noise - sigma * clean,
            Prediction.FLOW: noise - clean,
        }  # fmt: skip
        return answers[self.process.prediction]


VP = Diffusion.of((1 - torch.linspace(1e-4, 2e-2, 1000).double()).cumprod(0))


def even(schedule: Any, steps: int, ends: tuple[float, float]) -> list[float]:
    """Levels evenly spaced in log(alpha / sigma)."""
    high, low = (math.log(s / a) for a, s in map(schedule, ends))
    ratios = [math.exp(high + (low - high) * i / steps) for i in range(steps + 1)]
    if isinstance(schedule, Flow):
        return [schedule.level(1 / (1 + r), r / (1 + r)) for r in ratios]
    return [schedule.level((1 + r**2) ** -0.5, r * (1 + r**2) ** -0.5) for r in ratios]


@dataclass(frozen=True, slots=True)
class Parabola:
    """A solver of one's own, of third order: the parabola through the last three clean predictions, integrated exactly.

    x' = sigma'/sigma x + alpha' e^-h times the integral of e^t x0(t) over t = 0 ... h, where t counts in log(alpha / sigma).
    """

    process: Process
    reads: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def step(self, run: Path, at: int) -> Step:
        calls = [*reversed(run[max(0, at - 2) : at + 1])]
        time = lambda level: math.log(self.process.schedule(level)[0] / self.process.schedule(level)[1])
        (_, sigma), (alpha2, sigma2) = self.process.schedule(calls[0].start), self.process.schedule(calls[0].stop)
        nodes, h = [time(call.start) - time(calls[0].start) for call in calls], time(calls[0].stop) - time(calls[0].start)
        powers = [math.exp(h) - 1]  # integrals of e^t t^j
        for j in range(1, len(calls)):
            powers.append(h**j * math.exp(h) - j * powers[-1])
        first, *others = alpha2 * math.exp(-h) * np.linalg.solve(np.vander(nodes, increasing=True).T, powers)
        p, q = self.process.coefficients(calls[0].start, 0)
        return Step(sigma2 / sigma + first * p, first * q, tuple(others))


@pytest.mark.parametrize(
    ("solver", "schedule", "prediction", "order"),
    [
        (DDIM, VP, Prediction.EPSILON, 1), (DDIM, VP, Prediction.VELOCITY, 1), (DDIM, VP, Prediction.SAMPLE, 1),
        (DPMSolver, VP, Prediction.EPSILON, 2), (DPMSolver, VP, Prediction.VELOCITY, 2), (DDIM, Flow(), Prediction.FLOW, 1),
        (partial(DPMSolver, order=3), VP, Prediction.EPSILON, 2), (Parabola, VP, Prediction.EPSILON, 3),
    ],
)  # fmt: skip
def test_the_order_of_convergence_on_a_gaussian(solver: Any, schedule: Any, prediction: Prediction, order: int) -> None:
    """The error against the closed-form solution, over 40, 80, 160 and 320 steps."""
    process, unit, errors = Process(schedule, prediction), torch.linspace(-2, 2, 5).double().view(1, 1, 1, 5), []
    exact, nothing = Gaussian(process), Condition(PromptEmbedding(torch.zeros(1, 1)), PromptEmbedding(torch.zeros(1, 1)))
    for steps in (40, 80, 160, 320):
        levels = even(schedule, steps, (900, 20))
        chain = Chain({"base": Member(exact)}, solver(process), nothing, Noise((0,), (1, 1, 5)))
        end = chain.end(exact.state(levels[0], unit), walk(levels))
        errors.append(float((end - exact.state(levels[-1], unit)).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert abs(orders[-1] - order) < 0.25, (errors, orders)


def test_the_ancestral_sampler_reaches_the_gaussians_variance() -> None:
    """x' = a x + b m + d z with m affine in x: mean and variance follow exactly, and their error halves with the step."""
    process = Process(VP, Prediction.EPSILON)
    exact, solver, errors = Gaussian(process), Ancestral(process), []
    for steps in (20, 40, 80, 160):
        levels = even(VP, steps, (900, 20))
        variance = exact.deviation(levels[0]) ** 2
        for jump in walk(levels):
            step, sigma = solver.step((jump,), 0), VP(jump.start)[1]
            slope = step.a + step.b * sigma / exact.deviation(jump.start) ** 2
            variance = slope**2 * variance + step.d**2
        errors.append(abs(variance - exact.deviation(levels[-1]) ** 2))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert abs(orders[-1] - 1) < 0.25, (errors, orders)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=True"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'.*'linear'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver\\+\\+'"),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, "solver_order=1"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, "solver_type='heun'"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type='heun'"),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type='fixed_large'"),
        ("LMSDiscreteScheduler", {}, "LMSDiscreteScheduler is not supported.* nearest solver, euler"),
        ("UniPCMultistepScheduler", {}, "nearest solver, dpm"),
        ("HeunDiscreteScheduler", {}, "nearest solver, euler"),
    ],
)
def test_what_no_solver_here_reproduces_is_refused_by_name(scheduler: str, options: dict[str, Any], message: str) -> None:
    pipe = make_pipeline(dtype=torch.float32)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **{"clip_sample": False} | options)
    with pytest.raises(cr.UserError, match=message):
        cr.load(pipe)


def test_a_flow_has_no_diffusion_solver_and_numbers_of_steps_are_checked() -> None:
    case = CASES["sd3"]
    with pytest.raises(cr.UserError, match="solver ddim is for diffusion models"):
        cr.load(case.pipe(), solver="ddim")
    with pytest.raises(cr.UserError, match="unknown solver 'dmm'"):
        cr.load(case.pipe(), solver="dmm")
    pipe = make_pipeline(dtype=torch.float32)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    with pytest.raises(cr.UserError, match="steps is 7: with linspace spacing"):
        cr.load(pipe).grid(7)
    with pytest.raises(cr.UserError, match="steps is 60"):
        cr.load(make_pipeline(dtype=torch.float32), solver="lcm").grid(60)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "euler-a", "dpm++", "dpm++3m", "lcm", "tcd"])
def test_every_solver_serves_every_diffusion_pipeline(solver: str) -> None:
    for pipe in (make_pipeline(dtype=torch.float32), CASES["sdxl"].pipe(), CASES["pixart-sigma"].pipe()):
        if not solver.startswith("dpm++"):  # left over from another scheduler, means nothing to these
            pipe.scheduler.register_to_config(final_sigmas_type="sigma_min" if solver != "euler" else "zero")
        model = cr.load(pipe, solver=solver)
        assert model.sampler.name == solver
        theirs = pipeline_images(model, PROMPTS, SEEDS, 4, 2.0)
        assert float((model.render(PROMPTS, SEEDS, 4, 2.0) - theirs).abs().max()) < 5e-5


def test_a_long_chains_noise_is_drawn_once_each() -> None:
    """In order, anew, and from the middle: always the same, and the pipeline's."""
    noise, generator = Noise((5, 5, 9), (4, 3, 3)), torch.Generator().manual_seed(5)
    drawn = [torch.randn(4, 3, 3, generator=generator) for _ in range(5)]
    assert torch.equal(noise.initial()[1], drawn[0])
    for number in (0, 1, 2, 1, 3, 0):
        assert torch.equal(noise.stream(number)[0], drawn[number + 1]) and torch.equal(noise.stream(number)[1], drawn[number + 1])
    made: list[int] = []
    original = torch.randn
    torch.randn = lambda *a, **k: made.append(1) or original(*a, **k)  # type: ignore[assignment]
    try:
        fresh = Noise((1,), (4, 3, 3))
        for number in range(50):
            fresh.stream(number)
    finally:
        torch.randn = original  # type: ignore[assignment]
    assert len(made) == 51
