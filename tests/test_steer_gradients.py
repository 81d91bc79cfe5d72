"""Steering's gradients against independent loops, diffusers' schedulers and closed forms, in float64 on random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, PixArtTransformer2DModel
from pipelines import make_pipeline, score
from steer_loops import GUIDANCE, PROMPTS, SEEDS, STEPS, close, near, network, paper_loop, problem, scheduler_of
from torch import Tensor

import chainrule as cr
from chainrule.cast import Member
from chainrule.chain import Chain
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.guidance import CFG
from chainrule.meters import peak_bytes
from chainrule.noise import Diffusion, Noise
from chainrule.objective import Objective
from chainrule.plan import walk
from chainrule.solve import DDIM, Prediction, Process
from chainrule.steer.adjoint import Adjoint
from chainrule.steer.gradients import gradient_of
from chainrule.steer.guided_sampling import FreeDoM, Universal
from chainrule.steer.invertible import Coupled
from chainrule.steer.problem import Problem
from chainrule.steer.variables import Controlled


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gradient", ["sdo", "full"])
@pytest.mark.parametrize("over", ["latent", "latent@601"])
@pytest.mark.parametrize("solver", ["ddim", "dpm++", "dpm++3m"])
def test_the_gradient_at_a_latent_is_that_of_the_papers_own_loop(
    solver: str, over: str, gradient: str, prediction: str, memory: str
) -> None:
    model = cr.load(make_pipeline(prediction)).solving(solver)
    scheduler = scheduler_of(model, solver)
    if over != "latent":
        over = f"latent@{int(scheduler.timesteps[2])}"
    given, x = problem(model, over, memory=memory)
    seen = gradient_of(gradient, "latent")(given, x, Random(0))
    leaf = x.clone().requires_grad_()
    if solver.startswith("dpm++") and over != "latent":
        scheduler.set_begin_index(2)
    loss = paper_loop(
        model,
        scheduler,
        given.chain.condition,
        leaf,
        lambda i: gradient == "full" or i == 0,
        len(model.grid(STEPS)) - len(given.grid),
    )
    near(seen.losses.sum(), loss.detach(), solver)
    near(seen.gradient, torch.autograd.grad(loss, leaf)[0], solver)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_sdo_at_a_latent_is_one_jacobian_times_the_linear_coefficients(prediction: str) -> None:
    """Eq. 15 and 19 written out: (dx1/dx0)^T times the product of a_1 ... a_N-1, from alphas_cumprod alone."""
    model = cr.load(make_pipeline(prediction))
    given, x = problem(model)
    seen = gradient_of("sdo", "latent")(given, x, Random(0))
    cumulative = torch.cat([torch.ones(1, dtype=torch.float64), model.pipe.scheduler.alphas_cumprod.double()])

    def step(i: int) -> tuple[Tensor, Tensor]:
        """(a, b) of the i-th step, from x' = alpha' x0 + sigma' epsilon by hand."""
        now, then = given.grid[i], given.grid[i + 1] or 1  # Stable Diffusion's last step lands on alphas_cumprod[0]
        (a, s), (a2, s2) = ((cumulative[level].sqrt(), (1 - cumulative[level]).sqrt()) for level in (now, then))
        if prediction == "epsilon":
            return a2 / a, s2 - a2 * s / a
        if prediction == "v_prediction":
            return a2 * a + s2 * s, s2 * a - a2 * s
        return s2 / s, a2 - s2 * a / s

    carry = math.prod(float(step(i)[0]) for i in range(1, STEPS))
    leaf = given.chain.end(x, walk(given.grid)).requires_grad_()
    (g,) = torch.autograd.grad(-score(model.codec.decode(leaf), PROMPTS).sum(), leaf)
    start = x.clone().requires_grad_()
    answer = network(model, given.chain.condition)(start, torch.tensor(given.grid[0] - 1))
    (jacobian,) = torch.autograd.grad(answer, start, g)
    a, b = step(0)
    close(seen.gradient, carry * (float(a) * g + float(b) * jacobian))


@pytest.mark.parametrize("solver", ["ddim", "dpm++", "dpm++3m"])
@pytest.mark.parametrize("gradient", ["sdo", "full"])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_the_gradient_at_an_embedding_is_that_of_the_papers_own_loop(side: str, gradient: str, solver: str) -> None:
    model = cr.load(make_pipeline()).solving(solver)
    given, x = problem(model)
    found = {}
    for who in ("ours", "theirs"):
        leaf = getattr(given.chain.condition, side).states.clone().requires_grad_()
        condition = replace(given.chain.condition, **{side: PromptEmbedding(leaf)})
        if who == "ours":
            chain = replace(given.chain, condition=condition)
            gradient_of(gradient, "prompt")(replace(given, chain=chain), x, Random(3))
            found[who] = leaf.grad
        else:
            drawn = Random(3).randrange(STEPS)
            live = (lambda i: True) if gradient == "full" else drawn.__eq__
            loss = paper_loop(model, scheduler_of(model, solver), condition, x, live)
            (found[who],) = torch.autograd.grad(loss, leaf)
    near(found["ours"], found["theirs"], solver)


@pytest.mark.parametrize("gradient", ["sdo", "full"])
def test_controls_get_the_gradient_of_a_plain_loop(gradient: str) -> None:
    model = cr.load(make_pipeline("v_prediction"))
    given, x = problem(model)
    torch.manual_seed(0)
    controls = {level: 0.1 * torch.randn_like(x) for level in given.grid[:-1]}
    mine = {level: c.clone().requires_grad_() for level, c in controls.items()}
    base = given.chain.cast["base"]
    chain = replace(given.chain, cast={"base": Controlled(base, mine)})
    gradient_of(gradient, "controls")(replace(given, chain=chain), x, Random(0))
    theirs = [c.clone().requires_grad_() for c in controls.values()]
    scheduler, call, state = scheduler_of(model, "ddim"), network(model, given.chain.condition), x
    for t, control in zip(scheduler.timesteps, theirs, strict=True):
        with torch.set_grad_enabled(gradient == "full"):
            answer = call(state, t)
        state = scheduler.step(answer + control, t, state).prev_sample
    loss = -score(model.codec.decode(state), PROMPTS).sum()
    for a, b in zip(mine.values(), torch.autograd.grad(loss, theirs), strict=True):
        close(a.grad, b)


def test_consistency_sampling_is_diffusers_and_keeps_one_call() -> None:
    """LCM: clean prediction, noised again; the noise is ours, the rest diffusers' LCMScheduler."""
    model = cr.load(make_pipeline()).solving("lcm")
    given, x = problem(model, steps=4)
    noise = given.chain.noise
    for name, live in (("sdo", lambda i: i == 0), ("full", lambda i: True)):
        seen = gradient_of(name, "latent")(given, x, Random(0))
        scheduler = LCMScheduler.from_config(model.pipe.scheduler.config)
        scheduler.set_timesteps(4)
        assert [int(t) + 1 for t in scheduler.timesteps] == list(given.grid[:-1])
        leaf = x.clone().requires_grad_()
        call, state, clean = network(model, given.chain.condition), leaf, leaf
        for i, t in enumerate(scheduler.timesteps):
            with torch.set_grad_enabled(live(i)):
                answer = call(state, t)
            clean = scheduler.step(answer, t, state).denoised
            if i < 3:
                a2 = scheduler.alphas_cumprod[scheduler.timesteps[i + 1]].double()
                state = a2.sqrt() * clean + (1 - a2).sqrt() * noise.stream(i)
        loss = -score(model.codec.decode(clean), PROMPTS).sum()
        torch.testing.assert_close(seen.gradient, torch.autograd.grad(loss, leaf)[0], rtol=1e-5, atol=1e-9)  # its float32 scales


def test_sdo_runs_through_a_transformer() -> None:
    """A PixArt-style DiT: the walker asks nothing of a network but its answer."""
    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    ).double().requires_grad_(False)  # fmt: skip

    class DiT:
        def __init__(self) -> None:
            self.network = network

        def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
            t = torch.full((len(x),), level - 1, dtype=torch.float64)
            extra = {"resolution": None, "aspect_ratio": None}
            return self.network(x, embedding.states, timestep=t, added_cond_kwargs=extra).sample

    schedule = Diffusion.of(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod)
    condition = Condition(PromptEmbedding(torch.randn(2, 3, 12).double()), PromptEmbedding(torch.randn(2, 3, 12).double()))
    chain = Chain(
        {"base": Member(DiT(), CFG(GUIDANCE))}, DDIM(Process(schedule, Prediction.EPSILON)), condition, Noise((0, 1), (4, 8, 8))
    )
    given = Problem(chain, (800, 600, 400, 200, 0), lambda x: x[:, :3], PROMPTS, Objective.of(score))
    x = Noise((0, 1), (4, 8, 8)).initial().double()
    for name in ("sdo", "full"):
        seen = gradient_of(name, "latent")(given, x, Random(0))
        leaf = x.clone().requires_grad_()
        state = leaf
        for i, jump in enumerate(walk(given.grid)):
            a, b = chain.solver.process.coefficients(jump.start, jump.stop, jump.finish)
            with torch.set_grad_enabled(name == "full" or i == 0):
                u, c = (chain.cast["base"].denoiser(state, jump.start, e) for e in (condition.negative, condition.positive))
                answer = u + GUIDANCE * (c - u)
            state = a * state + b * answer
        close(seen.gradient, torch.autograd.grad(-score(state[:, :3], PROMPTS).sum(), leaf)[0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpm_solver_samples_as_the_pipeline_with_that_scheduler(prediction: str) -> None:
    pipe = make_pipeline(prediction, torch.float32)
    model = cr.load(pipe).solving("dpm++")
    ours = model.render(PROMPTS, SEEDS, 12, GUIDANCE)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="zero")
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipe(PROMPTS, num_inference_steps=12, guidance_scale=GUIDANCE, generator=noise, output_type="pt").images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# The continuous adjoint


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_adjoints_way_there_is_ddim(prediction: str) -> None:
    model = cr.load(make_pipeline(prediction))
    given, x = problem(model)
    seen = Adjoint()(given, x, Random(0))
    close(seen.losses, gradient_of("full", "latent")(given, x, Random(0)).losses)


def test_the_adjoint_approaches_the_full_gradient_at_first_order() -> None:
    """Euler's method both ways: twice the steps, half the error. The order is measured over 30 and 120 steps."""
    model = cr.load(make_pipeline("v_prediction"))
    every = {n: (*(round(951 - 950 * i / n) for i in range(n)), 0) for n in (30, 120)}
    errors: dict[str, list[float]] = {"latent": [], "prompt": []}
    for grid in every.values():
        found = []
        for way in (Adjoint(), gradient_of("full", "latent")):
            given, x = problem(replace(model, sampler=replace(model.sampler, levels=lambda steps, grid=grid: grid)))
            leaf = given.chain.condition.positive.states.clone().requires_grad_()
            given = replace(
                given, chain=replace(given.chain, condition=replace(given.chain.condition, positive=PromptEmbedding(leaf)))
            )
            found.append({"latent": way(given, x, Random(0)).gradient, "prompt": leaf.grad})
        for over, seen in errors.items():
            seen.append(float((found[0][over] - found[1][over]).norm() / found[1][over].norm()))
    for seen in errors.values():
        assert seen[1] < 0.05
        assert 0.7 < math.log2(seen[0] / seen[1]) / 2 < 1.4, errors


# The invertible chain


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_coupled_chain_comes_back_to_where_it_started(prediction: str) -> None:
    model = cr.load(make_pipeline(prediction))
    given, x = problem(model, steps=10)
    y = x + 0.1 * torch.randn_like(x)
    back = Coupled().inverse(given, Coupled().forward(given, (x, y)))
    torch.testing.assert_close(back[0], x, rtol=0, atol=1e-10)
    torch.testing.assert_close(back[1], y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("over", ["latent", "prompt"])
def test_the_coupled_chains_gradient_is_that_of_plain_autograd(over: str) -> None:
    model = cr.load(make_pipeline())
    given, x = problem(model)
    leaves, found = {}, {}
    for who in ("ours", "theirs"):
        leaf = leaves[who] = x.clone().requires_grad_()
        words = given.chain.condition.positive.states.clone().requires_grad_(over == "prompt")
        condition = replace(given.chain.condition, positive=PromptEmbedding(words))
        if who == "ours":
            seen = Coupled()(replace(given, chain=replace(given.chain, condition=condition)), x, Random(0))
            found[who] = words.grad if over == "prompt" else seen.gradient
            continue
        call, p = network(model, condition), 0.93
        a_state = b_state = leaf
        for jump in walk(given.grid):
            a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
            t = torch.tensor(jump.start - 1)
            first = a * a_state + b * call(b_state, t)
            second = a * b_state + b * call(first, t)
            a_state = p * first + (1 - p) * second
            b_state = p * second + (1 - p) * a_state
        loss = -score(model.codec.decode(a_state), PROMPTS).sum()
        close(seen.losses.sum(), loss.detach())
        (found[who],) = torch.autograd.grad(loss, words if over == "prompt" else leaf)
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-7, atol=1e-11)


# Guidance within a run


def test_weak_guidance_is_plain_sampling() -> None:
    model = cr.load(make_pipeline())
    given, x = problem(model)
    plain = model.codec.decode(given.chain.end(x, walk(given.grid)))
    for guide in (FreeDoM(strength=1e-12, repeats=1), Universal(strength=1e-12, repeats=1)):
        torch.testing.assert_close(guide(given, x).images, plain, rtol=0, atol=1e-9)


def test_freedom_is_its_algorithm() -> None:
    """Algorithm 1 without time travel, with plain autograd through the one-step prediction."""
    model = cr.load(make_pipeline())
    given, x = problem(model)
    seen = FreeDoM(strength=0.3, repeats=1)(given, x)
    scheduler, call, state = scheduler_of(model, "ddim"), network(model, given.chain.condition), x
    for t in scheduler.timesteps:
        leaf = state.clone().requires_grad_()
        answer = call(leaf, t)
        out = scheduler.step(answer, t, leaf)
        (g,) = torch.autograd.grad(-score(model.codec.decode(out.pred_original_sample), PROMPTS).sum(), leaf)
        moved = (out.prev_sample - leaf).detach()
        size = 0.3 * moved.square().mean((1, 2, 3), keepdim=True).sqrt() / g.square().mean((1, 2, 3), keepdim=True).sqrt()
        state = (out.prev_sample - size * g).detach()
    torch.testing.assert_close(seen.images, model.codec.decode(state), rtol=1e-7, atol=1e-9)


def test_universal_guidance_is_its_algorithm() -> None:
    """Algorithm 1 of arXiv:2302.07121 with a backward step, without recurrence."""
    model = cr.load(make_pipeline())
    given, x = problem(model)
    seen = Universal(strength=0.3, backward=1, backward_lr=0.1, repeats=1)(given, x)
    scheduler, call, state = scheduler_of(model, "ddim"), network(model, given.chain.condition), x

    def rms(tensor: Tensor) -> Tensor:
        return tensor.square().mean((1, 2, 3), keepdim=True).sqrt()

    for t, then in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0)], strict=True):
        a2 = scheduler.alphas_cumprod[t].double()
        leaf = state.clone().requires_grad_()
        epsilon = call(leaf, t)
        clean = (leaf - (1 - a2).sqrt() * epsilon) / a2.sqrt()
        (g,) = torch.autograd.grad(-score(model.codec.decode(clean), PROMPTS).sum(), leaf)
        epsilon = epsilon.detach()
        epsilon = epsilon + 0.3 * (1 - a2).sqrt() * rms(epsilon) * g / rms(g)
        clean = ((state - (1 - a2).sqrt() * epsilon) / a2.sqrt()).requires_grad_()
        (g,) = torch.autograd.grad(-score(model.codec.decode(clean), PROMPTS).sum(), clean)
        clean = (clean - 0.1 * rms(clean) * g / rms(g)).detach()
        epsilon = (state - a2.sqrt() * clean) / (1 - a2).sqrt()
        b2 = scheduler.alphas_cumprod[then].double()
        state = b2.sqrt() * clean + (1 - b2).sqrt() * epsilon
    torch.testing.assert_close(seen.images, model.codec.decode(state), rtol=1e-6, atol=1e-8)


# Memory


@pytest.mark.parametrize("gradient", ["sdo", "full", "adjoint", "invertible"])
def test_memory_does_not_grow_with_the_steps(gradient: str) -> None:
    """At most one latent per further call: what a chain that remembers where it was has to hold."""
    model = cr.load(make_pipeline(dtype=torch.float32))
    peaks = {}
    for steps in (4, 12):
        given, x = problem(model, steps=steps)
        peaks[steps] = peak_bytes(lambda given=given, x=x: gradient_of(gradient, "latent")(given, x, Random(0)))
    latent = x.numel() * x.element_size()
    assert peaks[12] - peaks[4] <= (8 * latent if gradient == "full" else 0) + latent, peaks
