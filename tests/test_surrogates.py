"""Backward passes of another chain than the sampled one: LeapAlign, FlowBP's, SDO drawn late; against plain loops in float64."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from exact import MODELS, prepared
from pipelines import make_pipeline, score
from torch import Tensor

import chainrule as cr
from chainrule.learner import gradients
from chainrule.methods import SDO, DRaFT, FlowBPBridge, FlowBPLagrange, FlowBPSparse, LeapAlign, Method
from chainrule.methods.surrogates import drawn_late, drawn_parts, spread
from chainrule.plan import Grad, Jump, Plan
from chainrule.solve import DDIM, Prediction, Process, Step, quadrature
from chainrule.taken import taken

STEPS, PROMPTS, SEEDS = 6, ["a fox", "two bees"], [4, 9]
METHODS: list[Method] = [
    FlowBPSparse(), FlowBPSparse(rescale=0.5), FlowBPBridge(samples=4), FlowBPBridge(samples=3, share=0.7, elsewhere=0.4),
    LeapAlign(), LeapAlign(share=0.3, deviation=None), LeapAlign(share=0.0, deviation=5.0), SDO(3, late=2),
    FlowBPLagrange(), FlowBPLagrange(order=4, samples=3, gain=1.0, share=0.6), FlowBPLagrange(order=2, samples=1, deviation=3.0),
]  # fmt: skip


def surrogate(model: cr.Model, plan: Plan) -> Tensor:
    """The loss whose plain autograd gradient is the method's: the sampled values, with the graph of the other chain.

    A state is its sampled value plus what is differentiated less its own value. An input of which a share passes is
    share x + (1 - share) sg(x). A leap goes from its start to where it lands in one step: of the predicted noise (of a flow,
    the velocity) it integrates the polynomial through the calls that it reads, of which some are differentiated.
    """
    member, condition = model.cast()["base"], model.embed(PROMPTS)
    x = model.noise(SEEDS)
    values, path = [x], plan.trunk + plan.branches[0]
    with torch.no_grad():
        for jump in path:
            a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
            values.append(a * values[-1] + b * member(values[-1], jump.start, condition))
    by_level = dict(zip((jump.start for jump in path), values, strict=False)) | {0: values[-1]}

    def asked(jump: Jump) -> Tensor:
        m = member(by_level[jump.start].detach(), jump.start, condition)
        return m.detach() + jump.gain * (m - m.detach()) if jump.grad is Grad.WEIGHTS else m.detach()

    at, state, apart = len(plan.trunk), values[len(plan.trunk)], torch.zeros(len(SEEDS), dtype=torch.float64)
    while at < len(path):
        jump: Jump = path[at]
        stop = jump.stop if jump.lands is None else jump.lands
        seen = state if jump.grad is Grad.FULL else state.detach()
        seen = jump.share * seen + (1 - jump.share) * seen.detach()
        m = member(seen, jump.start, condition)
        m = m.detach() if jump.grad is Grad.NONE else m
        a, b = model.solver.process.coefficients(jump.start, stop, stop == 0)
        answer = m.detach() + jump.gain * (m - m.detach())
        moved = a * state + b * answer
        if jump.reads:
            others = [next(other for other in path if other.start == level) for level in jump.reads]
            moved = integrated(model, state, answer, jump, stop, [(by_level[o.start], asked(o)) for o in others])
        state = by_level[stop] + moved - moved.detach()
        if jump.lands is not None and plan.deviation is not None:
            landed = moved.detach()
            apart = apart + (landed - by_level[stop]).flatten(1).abs().mean(1).clamp(min=plan.deviation)
        at = next(i for i in range(at + 1, len(path) + 1) if i == len(path) or path[i].start == stop)
    rewards = score(model.codec.decode(state), PROMPTS)
    return -(rewards / (apart if plan.deviation is not None else 1.0)).mean()


def integrated(model: cr.Model, x: Tensor, m: Tensor, jump: Jump, stop: float, others: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Where the leap lands, by the integral of numpy's interpolating polynomial."""
    process = model.solver.process
    levels = [jump.start, *jump.reads]
    scales, (alpha, sigma) = [process.schedule(level) for level in levels], process.schedule(stop, stop == 0)
    answers, states = [m, *(answer for _, answer in others)], [x, *(state for state, _ in others)]
    if process.prediction is Prediction.FLOW:
        places, end, values, carried, scale = [s for _, s in scales], sigma, answers, x, 1.0
    else:
        places, end, scale = [s / a for a, s in scales], sigma / alpha, alpha
        cleans = [
            (lambda c: c[0] * state + c[1] * answer)(process.coefficients(level, 0))
            for level, state, answer in zip(levels, states, answers, strict=True)
        ]
        values = [(state - a * clean) / s for state, clean, (a, s) in zip(states, cleans, scales, strict=True)]
        carried = x * alpha / scales[0][0]
    landed = carried
    for i, value in enumerate(values):
        roots = [place for j, place in enumerate(places) if j != i]
        basis = np.polynomial.Polynomial.fromroots(roots) if roots else np.polynomial.Polynomial([1.0])
        whole = (basis / basis(places[i])).integ()
        landed = landed + scale * float(whole(end) - whole(places[0])) * value
    return landed


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(name, method, marks=[] if i % len(MODELS) == j else pytest.mark.heavy)
     for i, method in enumerate(METHODS) for j, name in enumerate(MODELS)],
    ids=str,
)  # fmt: skip
def test_the_gradient_is_plain_autograds_of_the_surrogate_chain(name: str, method: Method) -> None:
    model, adapter = prepared(name)
    for seed in range(2):
        plan = method.plan(model.grid(STEPS), Random(seed))
        expected = torch.autograd.grad(surrogate(model, plan), adapter.parameters(), allow_unused=True)
        parts = [torch.zeros_like(w) if g is None else g for w, g in zip(adapter.parameters(), expected, strict=True)]
        flat = torch.cat([part.flatten() for part in parts])
        assert float(flat.abs().max()) > 0
        for memory in ("recompute", "keep", "blocks"):
            cr.gradient(model, plan, score, PROMPTS, SEEDS, memory=memory)
            torch.testing.assert_close(gradients(adapter.parameters()), flat, rtol=1e-8, atol=1e-8 * float(flat.abs().max()))
            for weight in adapter.parameters():
                weight.grad = None


def gradient(method: Method, model: cr.Model, adapter: cr.Adapter, seed: int = 0) -> Tensor:
    for weight in adapter.parameters():
        weight.grad = None
    cr.gradient(model, method.plan(model.grid(STEPS), Random(seed)), score, PROMPTS, SEEDS)
    return gradients(adapter.parameters()).clone()


@pytest.mark.parametrize("name", ["epsilon", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("velocity", "flow"))])
def test_the_identities_between_methods(name: str) -> None:
    model, adapter = prepared(name)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max()))
    for seed in range(3):
        close(gradient(FlowBPSparse(3, late=0), model, adapter, seed), gradient(SDO(3), model, adapter, seed))
    every = FlowBPBridge(samples=STEPS, share=1.0, elsewhere=1.0)
    close(gradient(every, model, adapter), gradient(DRaFT(), model, adapter))
    # A chain of two calls that both leap to where they go anyway is the chain.
    grid = model.grid(2)
    leaps = LeapAlign(share=1.0, deviation=None).plan(grid, Random(0))
    for plan in (leaps, DRaFT().plan(grid, Random(0))):
        for weight in adapter.parameters():
            weight.grad = None
        cr.gradient(model, plan, score, PROMPTS, SEEDS)
        found = gradients(adapter.parameters()).clone()
        expected = found if plan is leaps else expected  # noqa: F821
    close(expected, found)


@pytest.mark.parametrize("name", MODELS)
def test_a_leap_of_order_1_is_the_solvers_own_step_and_every_order_sums_to_it(name: str) -> None:
    """Where the answers are those of one noise and one image, a leap of any order lands where one step does."""
    model = MODELS[name]()
    grid, solver = model.grid(STEPS), model.solver
    assert isinstance(solver, DDIM)
    for start, stop in pairwise(grid):  # with order 1 and all calls live, the chain is Euler's
        assert [(step.a, step.b) for step in solver.leap((start,), stop, stop == 0)] == [
            solver.process.coefficients(start, stop, stop == 0)
        ]
    noise, image = 0.7, -0.3
    for order in (1, 2, 3, STEPS):
        landed, levels = 0.0, [grid[i] for i in spread(0, STEPS, order)]
        for step, level in zip(solver.leap(levels, 0, True), levels, strict=True):
            alpha, sigma = solver.process.schedule(level)
            x = alpha * image + sigma * noise
            answer = {"epsilon": noise, "velocity": alpha * noise - sigma * image, "sample": image, "flow": noise - image}[name]
            landed += step.a * x + step.b * answer
        alpha, sigma = solver.process.schedule(0, True)
        assert landed == pytest.approx(alpha * image + sigma * noise, abs=1e-9), order


def test_a_quadrature_is_exact_for_polynomials_of_lower_degree() -> None:
    places = [1.0, 0.8, 0.45, 0.3, -0.2]
    for degree in range(4):
        exact = (places[-1] ** (degree + 1) - 1.0) / (degree + 1)
        found = sum(weight * place**degree for weight, place in zip(quadrature(places), places, strict=False))
        assert found == pytest.approx(exact, abs=1e-12)


def test_the_order_1_of_lagrange_is_leapalign() -> None:
    model, _ = prepared("flow")
    lagrange = FlowBPLagrange(order=1, samples=1, share=0.3).plan(model.grid(STEPS), Random(2))
    first, second = (i for i, jump in enumerate(lagrange.jumps) if jump.lands is not None)
    plans = {str(LeapAlign(share=0.3).plan(model.grid(STEPS), Random(seed))): seed for seed in range(200)}
    assert second > first and LeapAlign(share=0.3).plan(model.grid(STEPS), Random(plans[str(lagrange)])) == lagrange


def test_lagranges_parts_follow_dirichlet_and_its_nodes_lie_evenly() -> None:
    rng, concentration = Random(0), (2.0, 6.0, 2.5)
    drawn = [drawn_parts(1000, concentration, (0, 1, 1), rng) for _ in range(4000)]
    assert all(sum(parts) == 1000 for parts in drawn)
    for i, alpha in enumerate(concentration):
        whole = sum(concentration)
        mean, variance = alpha / whole, alpha * (whole - alpha) / whole**2 / (whole + 1)
        assert abs(sum(parts[i] for parts in drawn) / 4e6 - mean) < 5 * (variance / 4000) ** 0.5 + 1e-3
    for total in range(2, 9):
        for _ in range(300):
            before, between, after = drawn_parts(total, concentration, (0, 1, 1), rng)
            assert before >= 0 and between >= 1 and after >= 1 and before + between + after == total
    assert spread(3, 12, 3) == [3, 7, 11] and spread(3, 5, 3) == [3, 4] and spread(3, 4, 3) == [3] and spread(3, 9, 1) == [3]


@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_the_weights_of_the_steps_sum_to_that_of_the_whole_leap(name: str) -> None:
    """With constant answers a long step lands where the short ones do, for noise and flow predictions."""
    model = MODELS[name]()
    grid = model.grid(STEPS)
    a, b = 1.0, 0.0
    for start, stop in pairwise(grid):
        a2, b2 = model.solver.process.coefficients(start, stop, stop == 0)
        a, b = a2 * a, a2 * b + b2
    assert (a, b) == pytest.approx(model.solver.process.coefficients(grid[0], 0, True), rel=1e-9)


def test_calls_are_drawn_towards_the_image_without_replacement() -> None:
    rng, count, draws = Random(0), 5, 20_000
    one = Counter(drawn_late(count, 1, 2.0, rng)[0] for _ in range(draws))
    total = sum((i + 1) ** 2 for i in range(count))
    for i in range(count):
        share = (i + 1) ** 2 / total
        assert abs(one[i] / draws - share) < 5 * (share * (1 - share) / draws) ** 0.5
    assert all(len(set(drawn_late(count, 4, 2.0, rng))) == 4 for _ in range(100))
    assert sorted(drawn_late(count, 5, 9.0, rng)) == [0, 1, 2, 3, 4]


def test_drawings_and_refusals() -> None:
    grid = (5, 4, 3, 2, 1, 0)
    drawn = {str(LeapAlign().plan(grid, Random(seed))) for seed in range(50)}
    assert "-[=.+.]" in drawn and "[=+...]" in drawn and all(set(text) <= set("-=+.[]") for text in drawn)
    assert {"[==.+]", "-[=+=]"} <= {str(FlowBPLagrange().plan(grid[1:], Random(seed))) for seed in range(50)}
    assert "+" in str(FlowBPBridge().plan(grid, Random(0)))
    leap, middle, last = Jump(3, 2, grad=Grad.WEIGHTS, lands=1), Jump(2, 1), Jump(1, 0)
    assert str(Plan((), ((leap, middle, last),))) == "[=.-]"
    for path, said in (
        ((leap, Jump(2, 1, grad=Grad.WEIGHTS), last), "leapt over must be a constant"),
        ((replace(leap, reads=(2,)), Jump(2, 1, grad=Grad.FULL), last), "leapt over must be a constant"),
        ((replace(leap, reads=(1,)), middle, last), "must read answers of calls that it passes over"),
        ((Jump(3, 2, lands=1.5), middle, last), "must land on a later level"),
        ((Jump(3, 2, share=2.0), middle, last), "between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Plan((), (path,))
    model = cr.load(make_pipeline()).solving("dpm++")
    model.adapt("mine", rank=2)
    with pytest.raises(cr.UserError, match="no closed form for a leap"):
        cr.gradient(model, LeapAlign().plan(model.grid(4), Random(0)), score, PROMPTS, SEEDS)
    silent = Process(lambda level, finish=False: (1 - level / 10, (1 - (1 - level / 10) ** 2) ** 0.5), Prediction.VELOCITY)
    with pytest.raises(cr.UserError, match="level 10 has no signal"):
        taken(DDIM(silent), (replace(leap, start=10, reads=(2,)), middle, last), [Step(1.0)] * 3)


def test_a_solver_that_cannot_leap_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32)).solving("dpm++3m")
    for method in ("leapalign", "flowbp-lagrange"):
        with pytest.raises(cr.UserError, match="has no closed form for a leap over several steps; take ddim or euler"):
            cr.finetune(model, method, "symmetry", ["a fox"], out=tmp_path / "run", updates=1, batch=1, sample_steps=8)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("late", [0.0, 2.0, 400.0, 1e6])
def test_calls_are_drawn_however_late(late: float) -> None:
    drawn = [drawn_late(50, 3, late, Random(seed)) for seed in range(50)]
    assert all(len(set(some)) == 3 and some == sorted(some) for some in drawn)
    assert late < 400 or all(some == [47, 48, 49] for some in drawn)
