"""The laws of the chain, on a random-weight Stable Diffusion in float64, against an independent plain-autograd loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
import torch
from pipelines import Worth, make_pipeline, score
from torch import Tensor

import chainrule as cr
from chainrule.cast import Member
from chainrule.chain import Chain, Memory
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.gradient import backpropagate
from chainrule.methods import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.noise import Diffusion, Noise, derive
from chainrule.objective import Objective
from chainrule.plan import Grad, Jump, Plan, walk
from chainrule.solve import DDIM, Prediction, Process

STEPS, GUIDANCE, SEEDS, PROMPTS = 5, 3.0, [4, 9], ["a fox", "two bees"]
METHODS = [
    DRaFT(), DRaFT(1), DRaFT(3), DRaFTLV(2), DRaFTLV(2, reuse_reward_gradient=True), ReFL(4), ReFL(4, guided=False),
    AlignProp(), AlignProp(last_only=True), DRTune(k=2, m=2), SDO(), SDO(3),
]  # fmt: skip
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def build(prediction: str = "epsilon") -> tuple[cr.Model, cr.Adapter]:
    model = cr.load(make_pipeline(prediction))
    adapter = model.adapt("mine", rank=2)
    torch.manual_seed(1)
    for weight in adapter.parameters():  # away from the identity, where half of the gradients vanish
        weight.data.normal_(0, 0.2)
    return model, adapter


def gradients(model: cr.Model, adapter: cr.Adapter, plan: Plan, memory: str = "keep") -> tuple[dict[str, Tensor], cr.Result]:
    result = cr.gradient(model, plan, score, PROMPTS, SEEDS, guidance=GUIDANCE, memory=memory)
    found = {}
    for name, weight in adapter.named_parameters().items():
        found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return found, result


def parts(prediction: str, x: Tensor, answer: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latent and the noise that the network's answer means."""
    if prediction == "epsilon":
        return (x - sigma * answer) / alpha, answer
    if prediction == "v_prediction":
        return alpha * x - sigma * answer, sigma * x + alpha * answer
    return answer, (x - alpha * answer) / sigma


def normal(seeds: Iterable[int]) -> Tensor:
    return torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()


def answer(pipe: Any, x: Tensor, level: int, positive: Tensor, negative: Tensor | None) -> Tensor:
    """The UNet's, guided where there is a negative embedding."""
    t = torch.tensor(level - 1)
    c = pipe.unet(x, t, encoder_hidden_states=positive).sample
    if negative is None:
        return c
    u = pipe.unet(x, t, encoder_hidden_states=negative).sample
    return u + GUIDANCE * (c - u)


def plain_loop(model: cr.Model, adapter: cr.Adapter, plan: Plan) -> dict[str, Tensor]:
    """Algorithm by algorithm what a person would write with diffusers and autograd alone."""
    pipe = model.pipe
    layers = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]
    for layer in layers:
        layer._active_adapter = ["mine"]
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    cumulative = torch.cat([torch.ones(1, dtype=torch.float64), pipe.scheduler.alphas_cumprod.double()])

    def step(x: Tensor, jump: Jump) -> Tensor:
        seen = x if jump.grad is Grad.FULL else x.detach()
        m = answer(pipe, seen, jump.start, positive, negative if jump.via == "base" else None)
        m = m.detach() if jump.grad is Grad.NONE else m
        a, s = cumulative[jump.start].sqrt(), (1 - cumulative[jump.start]).sqrt()
        target = cumulative[1] if jump.finish else cumulative[jump.stop]
        clean, noise = parts(pipe.scheduler.config.prediction_type, x, m, a, s)
        return target.sqrt() * clean + (1 - target).sqrt() * noise

    def run(x: Tensor, path: tuple[Jump, ...], number: int) -> Tensor:
        for jump in path:
            if jump.up:
                fresh = normal(derive(s, "up", number) for s in SEEDS)
                x = cumulative[jump.stop].sqrt() * x.detach() + (1 - cumulative[jump.stop]).sqrt() * fresh
            else:
                x = step(x, jump)
        return x

    x = normal(SEEDS)
    trunk = run(x, plan.trunk, 0).detach()
    total, first, reused = torch.zeros(()), None, None
    for number, branch in enumerate(plan.branches):
        latent = run(first.detach() if first is not None and branch[0].start == 0 else trunk, branch, number)
        first = latent if first is None else first
        images = (pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        if reused is not None and plan.reuse_reward_gradient:
            total = total + (images * reused).sum()
            continue
        loss = -score(images, PROMPTS).mean()
        (reused,) = torch.autograd.grad(loss, images, retain_graph=True)
        total = total + loss
    named = adapter.named_parameters()
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for layer in layers:
        layer._active_adapter = []
    return {k: torch.zeros_like(w) if g is None else g for (k, w), g in zip(named.items(), found, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_is_its_plain_autograd_loop_under_every_memory_policy(method, prediction):
    model, adapter = build(prediction)
    plan = method.plan(model.grid(STEPS), Random(3))
    expected = plain_loop(model, adapter, plan)
    for memory in ("keep", "recompute"):
        assert_same(gradients(model, adapter, plan, memory)[0], expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradient_flags_never_change_the_image(method):
    model, adapter = build()
    plan = method.plan(model.grid(STEPS), Random(0))
    bare = [tuple(Jump(j.start, j.stop, j.via, finish=j.finish) for j in path) for path in (plan.trunk, *plan.branches)]
    silent = Plan(bare[0], tuple(bare[1:]))
    live, dead = gradients(model, adapter, plan)[1], gradients(model, adapter, silent)[1]
    torch.testing.assert_close(live.images, dead.images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_counted_calls_are_the_calls_made(method, memory):
    model, adapter = build()
    plan, made = method.plan(model.grid(STEPS), Random(1)), []
    hook = model.pipe.unet.register_forward_hook(lambda *_: made.append(torch.is_grad_enabled()))
    gradients(model, adapter, plan, memory)
    hook.remove()
    live = plan.calls(Grad.WEIGHTS, Grad.FULL)
    assert len(made) == plan.calls() + (live if memory == "recompute" else 0) and sum(made) == live


def test_draft_agrees_with_finite_differences():
    model, adapter = build()
    plan = DRaFT().plan(model.grid(STEPS), Random(0))
    found, _ = gradients(model, adapter, plan, "recompute")
    name = max(found, key=lambda key: float(found[key].abs().max()))
    place = int(found[name].abs().argmax())
    weight = adapter.named_parameters()[name].data.view(-1)

    def loss(shift: float) -> float:
        weight[place] += shift
        value = -float(score(model.render(PROMPTS, SEEDS, STEPS, GUIDANCE).double(), PROMPTS).mean())
        weight[place] -= shift
        return value

    with torch.no_grad():  # render returns float32 pixels: a wide step and a loose tolerance
        slope = (loss(3e-2) - loss(-3e-2)) / 6e-2
    assert slope == pytest.approx(float(found[name].view(-1)[place]), rel=2e-2)


def test_a_jump_to_zero_is_the_one_step_prediction():
    for prediction in PREDICTIONS:
        model, _ = build(prediction)
        x, m = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double()
        cumulative = model.pipe.scheduler.alphas_cumprod[500].double()
        a, s = cumulative.sqrt(), (1 - cumulative).sqrt()
        expected = {"epsilon": (x - s * m) / a, "v_prediction": a * x - s * m, "sample": m}[prediction]
        first, second = model.solver.process.coefficients(501, 0)
        torch.testing.assert_close(first * x + second * m, expected)


def test_draft_of_all_steps_is_draft_and_refl_with_m_1_differs_from_draft_1_only_in_where_it_lands():
    grid = (801, 601, 401, 201, 1, 0)
    assert DRaFT(5).plan(grid, Random(0)) == DRaFT().plan(grid, Random(0))
    refl, draft = ReFL(1).plan(grid, Random(0)), DRaFT(1).plan(grid, Random(0))
    assert refl.trunk == draft.trunk
    assert refl.branches == ((Jump(1, 0, grad=Grad.FULL),),) and draft.branches == ((Jump(1, 0, "base", Grad.FULL, True),),)


def _states(model: cr.Model, path: tuple[Jump, ...]) -> list[Tensor]:
    chain = model.guided(GUIDANCE).chain(PROMPTS, SEEDS)
    return [model.noise(SEEDS), *chain.states(model.noise(SEEDS), path)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sdo_on_a_latent_is_one_network_jacobian_and_the_linear_carry(prediction):
    """Eq. 15 and 19 of arXiv:2505.07477: only the variable's own call has a Jacobian."""
    model, _ = build(prediction)
    path = walk(model.grid(STEPS))
    live = (Jump(path[0].start, path[0].stop, grad=Grad.FULL), *path[1:])
    chain = model.guided(GUIDANCE).chain(PROMPTS, SEEDS)
    (branch,) = chain.walk(Plan((), (live,)), model.noise(SEEDS))
    v = torch.randn_like(branch.image)
    found = branch.pull(v)
    pairs = [model.solver.process.coefficients(j.start, j.stop, j.finish) for j in path]
    carried = v * math.prod(a for a, _ in pairs[1:])
    x = model.noise(SEEDS).requires_grad_()
    answer = chain.cast["base"](x, path[0].start, chain.condition)
    (jacobian,) = torch.autograd.grad(answer, x, pairs[0][1] * carried)
    torch.testing.assert_close(found, pairs[0][0] * carried + jacobian, rtol=1e-9, atol=1e-12)


def test_sdo_on_weights_is_equation_20():
    """The gradient is one call's weight Jacobian, weighted by its b and carried by the later a."""
    model, adapter = build()
    plan = SDO().plan(model.grid(STEPS), Random(3))
    (path,) = plan.branches
    i = next(n for n, jump in enumerate(path) if jump.grad is not Grad.NONE)
    found, _ = gradients(model, adapter, plan)
    states = _states(model, path)
    latent = states[-1].requires_grad_()
    (v,) = torch.autograd.grad(-score(model.codec.decode(latent), PROMPTS).mean(), latent)
    pairs = [model.solver.process.coefficients(j.start, j.stop, j.finish) for j in path]
    answer = model.guided(GUIDANCE).cast()["base"](states[i].detach(), path[i].start, model.embed(PROMPTS))
    pulled = v * pairs[i][1] * math.prod(a for a, _ in pairs[i + 1 :])
    named = adapter.named_parameters()
    expected = dict(zip(named, torch.autograd.grad(answer, list(named.values()), pulled), strict=True))
    assert_same(found, expected)


def test_sdo_with_several_calls_is_the_sum_of_its_single_calls():
    model, adapter = build()
    plan = SDO(3).plan(model.grid(STEPS), Random(1))
    (path,) = plan.branches
    total: dict[str, Tensor] = {}
    for i in [n for n, jump in enumerate(path) if jump.grad is not Grad.NONE]:
        one = tuple(Jump(j.start, j.stop, j.via, Grad.FULL if n == i else Grad.NONE, j.finish) for n, j in enumerate(path))
        part, _ = gradients(model, adapter, Plan((), (one,)))
        total = {name: total.get(name, 0) + value for name, value in part.items()}
    assert_same(gradients(model, adapter, plan)[0], total)


def test_drtune_is_its_closed_sum():
    """Inputs are cut everywhere, so the gradient is the sum over trained calls of b_i * (prod of later a) * dm/dtheta."""
    model, adapter = build()
    plan = DRTune(k=2, m=2).plan(model.grid(STEPS), Random(5))
    (path,) = plan.branches
    found, _ = gradients(model, adapter, plan, "recompute")
    states = _states(model, path)
    latent = states[-1].requires_grad_()
    (v,) = torch.autograd.grad(-score(model.codec.decode(latent), PROMPTS).mean(), latent)
    pairs = [model.solver.process.coefficients(j.start, j.stop, j.finish) for j in path]
    named, total = adapter.named_parameters(), {}
    for i, jump in enumerate(path):
        if jump.grad is Grad.WEIGHTS:
            answer = model.guided(GUIDANCE).cast()["base"](states[i].detach(), jump.start, model.embed(PROMPTS))
            pulled = v * pairs[i][1] * math.prod(a for a, _ in pairs[i + 1 :])
            for name, g in zip(named, torch.autograd.grad(answer, list(named.values()), pulled), strict=True):
                total[name] = total.get(name, 0) + g
    assert_same(found, total)


def test_image_k_does_not_depend_on_its_batch():
    model, _ = build("v_prediction")
    together = model.render(["a fox", "two bees", "a cat"], [5, 6, 7], STEPS, GUIDANCE)
    alone = model.render(["two bees"], [6], STEPS, GUIDANCE)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)
    assert torch.equal(model.noise([5, 6])[1], model.noise([6])[0])


def test_reward_micro_batches_do_not_change_the_gradient():
    model, adapter = build()
    plan = DRaFT(2).plan(model.grid(STEPS), Random(0))
    chain = model.guided(GUIDANCE).chain(PROMPTS, SEEDS, Memory.RECOMPUTE)
    found = []
    for part in (1, 2):
        backpropagate(chain, plan, model.noise(SEEDS), model.codec.decode, score, PROMPTS, micro_batch=part)
        found.append({k: w.grad.clone() for k, w in adapter.named_parameters().items()})
        for weight in adapter.parameters():
            weight.grad = None
    assert_same(*found)


class Toy(torch.nn.Module):
    """A network of two pixels that can reach any image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)).double()

    @property
    def network(self) -> torch.nn.Module:
        return self

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        time = x.new_full((len(x), 1), level / 1000)
        return self.layers(torch.cat([x.flatten(1), time], 1)).view_as(x)


# Single-reward LV is left out: reusing a stale reward gradient is unstable, as its paper says (appendix C.1), and diverges here.
@pytest.mark.parametrize("method", [m for m in METHODS if m != DRaFTLV(2, reuse_reward_gradient=True)], ids=str)
def test_every_method_raises_a_quadratic_reward_towards_its_known_optimum(method):
    """Reward -(x - 1)^2 over two pixels: its optimum, 0, is reached when every image is all ones."""
    cumulative = torch.linspace(0.9999, 0.05, 1000)
    solver, toy = DDIM(Process(Diffusion.of(cumulative), Prediction.EPSILON)), Toy()
    cast = {"base": Member(toy), "unguided": Member(toy)}
    grid, rng = (1000, 800, 600, 400, 200, 0), Random(0)
    optimizer = torch.optim.Adam(toy.parameters(), 2e-2)
    worth = lambda images, prompts: -(images - 1).square().mean((1, 2, 3))
    objective = Objective((Worth(worth),))

    def error() -> float:
        noise = Noise(tuple(range(64)), (1, 1, 2))
        chain = Chain(cast, solver, Condition(PromptEmbedding(torch.zeros(64, 1)), PromptEmbedding(torch.zeros(64, 1))), noise)
        *_, images = chain.states(noise.initial().double(), walk(grid))
        return -float(worth(images, ()).mean())

    before = error()
    for step in range(80):
        noise = Noise(tuple(range(64 + 16 * step, 80 + 16 * step)), (1, 1, 2))
        chain = Chain(cast, solver, Condition(PromptEmbedding(torch.zeros(16, 1)), PromptEmbedding(torch.zeros(16, 1))), noise)
        optimizer.zero_grad()
        x, plan = noise.initial().double(), method.plan(grid, rng)
        backpropagate(chain, plan, x, lambda x: x, objective, [""] * 16, micro_batch=16)
        torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
    assert error() < 0.5 * before, (before, error())


def test_a_broken_plan_is_refused():
    for branch in (walk((1000, 500)), (Jump(1000, 500), Jump(400, 0)), (), (Jump(5, 5), Jump(5, 0))):
        with pytest.raises(ValueError):
            Plan((), (branch,))
    with pytest.raises(ValueError):
        Plan(walk((1000, 500), Grad.FULL), (walk((500, 0)),))
