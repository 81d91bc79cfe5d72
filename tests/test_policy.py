"""Policy gradients and the critic, against plain loops that write the likelihood and the regression out."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from exact import prepared
from pipelines import make_pipeline
from torch import Tensor, nn
from tuned import Judge, differences, gray, outcome

import chainrule as cr
from chainrule import half
from chainrule.adapters import selected
from chainrule.chain import Chain
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.estimators import ActorCritic, Batch, Rollouts, estimator_of
from chainrule.estimators.rollouts import Policy, Rollout, drawn_likelihoods
from chainrule.gradient import AtCalls
from chainrule.learner import gradients
from chainrule.methods import DDPO, DPG, GRPO, Method, needs
from chainrule.noise import Flow, Noise
from chainrule.objective import Objective
from chainrule.plan import Grad, Plan, walk
from chainrule.rewards import reward_of
from chainrule.solve import Ancestral, Prediction, Process, moves

STEPS, PROMPTS, SEEDS = 4, ["a fox", "a fox", "two bees", "two bees"], [4, 9, 5, 2]


def whole_numbers(images: Tensor, prompts: object) -> list[int]:
    """A reward without a gradient: how many pixels are bright."""
    return [int(n) for n in (images > 0.5).flatten(1).sum(1)]


SOLVERS = {"epsilon": "sde", "velocity": "ddpm", "flow": "sde"}


def batch(memory: str = "recompute", parts: int = 1) -> Batch:
    return Batch(list(PROMPTS), list(SEEDS), parts, memory)


def estimator(method: Method, model: cr.Model, reward: Any) -> Any:
    kind = needs(method, model.grid(STEPS)).estimator
    return estimator_of(kind, model, reward_of(reward), lr=1e-3, clip=1.0, seed=0)


def written_out(model: cr.Model, plan: Plan, rollout: Rollout, clip: float) -> Tensor:
    """Minus the clipped surrogate, over the written-out Gaussian likelihoods of the rollout's steps."""
    member, condition = model.cast()["base"], model.embed(rollout.prompts)
    noise, draws, total = Noise(tuple(rollout.seeds), model.codec.latent_shape), 0, torch.zeros(len(SEEDS), dtype=torch.float64)
    for i, (jump, move) in enumerate(zip(plan.branches[0], moves(model.solver, plan.branches[0]), strict=True)):
        drawn = noise.stream(draws).double() if move.d else None
        draws += drawn is not None
        if jump.grad is Grad.NONE:
            continue
        assert drawn is not None
        x, after = rollout.states[:, i].to(model.dtype), rollout.states[:, i + 1].to(model.dtype)
        mean = move.a * x + move.b * member(x, jump.start, condition)
        steps = torch.distributions.Normal(mean, move.d)
        size = x[0].numel()
        old = torch.distributions.Normal(after - move.d * drawn, move.d).log_prob(after).flatten(1).sum(1) / size
        ratio = (steps.log_prob(after).flatten(1).sum(1) / size - old).exp()
        kept = ratio.clamp(1 - clip, 1 + clip)
        total = total - size * torch.minimum(rollout.advantages * ratio, rollout.advantages * kept)
    return total.mean()


ON_ALL, ON_SOME = DDPO(reuse=3, clip=0.02), GRPO(group=2, reuse=2, clip=0.02, calls=2)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("epsilon", ON_ALL), ("flow", ON_SOME),
        *(pytest.param(*case, marks=pytest.mark.heavy) for case in (("velocity", ON_ALL), ("flow", ON_ALL), ("epsilon", ON_SOME))),
    ],
    ids=str,
)  # fmt: skip
def test_the_gradient_is_that_of_the_written_out_likelihood_on_and_off_policy(name: str, method: Method) -> None:
    model, adapter = prepared(name, SOLVERS[name])
    weights, grid = adapter.parameters(), model.grid(STEPS)
    by = {memory: estimator(method, model, whole_numbers) for memory in ("recompute", "keep", "blocks")}
    cut = []
    for update in range(2):
        plan = method.plan(grid, Random(update))
        for parts, (memory, one) in enumerate(by.items(), start=1):
            one.add(model, plan, Objective.of(whole_numbers), batch(memory, 2 if parts == 2 else 1))
            found = gradients(weights)
            expected = torch.autograd.grad(written_out(model, plan, one.last, 0.02), weights, allow_unused=True)
            flat = torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, expected, strict=True)])
            assert float(flat.abs().max()) > 0
            torch.testing.assert_close(found, flat, rtol=1e-8, atol=1e-8 * float(flat.abs().max()))
            for weight in weights:
                weight.grad = None
        cut.append(float(flat.norm()))
        torch.manual_seed(update)
        for weight in weights:
            weight.data += 0.01 * torch.randn_like(weight)  # the next update is off policy
    assert cut[0] != pytest.approx(cut[1], rel=1e-3)


def test_on_policy_it_is_the_advantage_times_the_gradient_of_the_log_likelihood() -> None:
    model, adapter = prepared("epsilon", "sde")
    plan, one = DDPO().plan(model.grid(STEPS), Random(0)), estimator(DDPO(), model, whole_numbers)
    one.add(model, plan, Objective.of(whole_numbers), batch())
    found, rollout = gradients(adapter.parameters()), one.last
    member, condition, total = model.cast()["base"], model.embed(PROMPTS), torch.zeros(4, dtype=torch.float64)
    for i, (jump, move) in enumerate(zip(plan.branches[0], moves(model.solver, plan.branches[0]), strict=True)):
        if jump.grad is Grad.WEIGHTS:
            mean = move.a * rollout.states[:, i] + move.b * member(rollout.states[:, i], jump.start, condition)
            total = total + torch.distributions.Normal(mean, move.d).log_prob(rollout.states[:, i + 1]).flatten(1).sum(1)
    loss = -(rollout.advantages * total).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapter.parameters())])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@dataclass(frozen=True)
class Constant:
    """A network that answers with its one weight."""

    weight: nn.Parameter

    def __call__(self, x: Tensor, level: float, condition: Condition) -> Tensor:
        return self.weight.expand_as(x)


def test_it_is_the_exact_gradient_of_a_gaussian_chain_by_monte_carlo() -> None:
    """x_0 is Gaussian with a mean that is affine in the weight, so E[-(x_0 - 1)^2] and its gradient are known.

    The last step draws nothing, so its answer has no likelihood: here it is a constant.
    """
    count, grid = 40_000, (900.0, 700.0, 400.0, 200.0, 0.0)
    weight = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))
    nothing = PromptEmbedding(torch.zeros(count, 1, 1))
    solver = Ancestral(Process(Flow(), Prediction.FLOW))
    chain = Chain({"base": Constant(weight)}, solver, Condition(nothing, nothing), Noise(tuple(range(count)), (1, 1, 1)))
    path = walk(grid, Grad.WEIGHTS)
    start = torch.full((count, 1, 1, 1), 0.4, dtype=torch.float64)
    states = [start, *chain.states(start, path)]
    image = states[-1].flatten()
    reward = -(image - 1).square()
    advantages = reward - reward.mean()
    likelihoods = dict(zip(grid[:-1], drawn_likelihoods(chain, path).double().unbind(1), strict=True))
    policy = Policy(advantages, likelihoods, clip=1.0)
    chain.along(path, states).pull(torch.zeros_like(start), AtCalls(Objective((policy,)), chain, 1 / count))
    mean, slope, variance = 0.4, 0.0, 0.0
    for move in moves(solver, path):
        mean, slope = move.a * mean + move.b * -0.7, move.a * slope + move.b * bool(move.d)
        variance = move.a**2 * variance + move.d**2
    exact = 2 * (mean - 1) * slope  # of the loss, -E[reward]
    assert image.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert weight.grad is not None and abs(exact) > 0.1
    assert float(weight.grad) == pytest.approx(exact, rel=0.05)


def test_advantages_are_in_standard_deviations_of_the_group_or_of_the_prompts_last_rewards() -> None:
    grouped = Rollouts(needs(GRPO(group=2), [3, 2, 1, 0]).estimator)  # type: ignore[arg-type]
    assert grouped._advantages(PROMPTS, [1.0, 3.0, 5.0, 5.0]).tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-4)
    single = Rollouts(needs(DDPO(), [3, 2, 1, 0]).estimator)  # type: ignore[arg-type]
    assert single._advantages(PROMPTS, [1.0, 3.0, 5.0, 7.0]).tolist() == pytest.approx([-1.3416, -0.4472, 0.4472, 1.3416], abs=1e-3)
    for _ in range(8):
        single._advantages(["a fox", "a fox"], [0.0, 2.0])
    *_, last = single._advantages(["two bees", "a fox"], [100.0, 2.0]).tolist()
    own = torch.tensor(single.history["a fox"], dtype=torch.float64)
    assert last == pytest.approx(float((2 - own.mean()) / own.std(correction=0)), abs=1e-4)  # the bees' 100 is nothing to it


@pytest.mark.parametrize(
    ("name", "at"),
    [pytest.param(name, at, marks=[] if at in (0, STEPS - 1) and name != "velocity" else pytest.mark.heavy)
     for name in SOLVERS for at in range(STEPS)],
)  # fmt: skip
def test_the_actor_and_the_critic_are_plain_loops(name: str, at: int) -> None:
    model, adapter = prepared(name, None if name == "epsilon" else SOLVERS[name])
    judge = Judge().double()
    reward, grid = reward_of(judge), model.grid(STEPS)
    (action,) = walk(grid[at : at + 2], Grad.WEIGHTS)
    plan = next(p for p in (DPG(rank=2).plan(grid, Random(seed)) for seed in range(99)) if p.branches[1][0] == action)
    critic: ActorCritic = estimator(DPG(rank=2), model, judge)
    assert str(plan) == "-" * at + f"[{'-' * (STEPS - at)}|={'~' * (at < STEPS - 1)}]"
    own = [weight for each in critic.adapters.values() for weight in each.parameters()]
    torch.manual_seed(3)
    for weight in own:
        weight.data.normal_(0, 0.3)
    (part,) = critic.adapters.values()
    for memory in ("recompute", "keep", "blocks"):
        (result,) = critic.add(model, plan, Objective.of(reward), batch(memory))
        actor, regression = gradients(adapter.parameters()), gradients(own)
        for weight in (*adapter.parameters(), *own):
            weight.grad = None

        # The same by hand.
        chain, member, condition = model.chain(PROMPTS, SEEDS), model.cast()["base"], model.embed(PROMPTS)
        with torch.no_grad():
            x = chain.end(model.noise(SEEDS), walk(grid[: at + 1]))
            returns = judge(model.codec.decode(chain.end(model.noise(SEEDS), walk(grid))), PROMPTS)
        branch = [action, *plan.branches[1][1:]]
        steps = list(moves(model.solver, (*plan.trunk, *branch)))[at:]
        draws = sum(bool(move.d) for move in moves(model.solver, plan.trunk))
        fresh = chain.noise.fresh(1 + 1000 * draws).double() if steps[0].d else 0.0
        after = steps[0].a * x + steps[0].b * member(x, action.start, condition) + steps[0].d * fresh
        seen = after.detach().requires_grad_()
        p, q = model.solver.process.coefficients(action.stop, 0) if action.stop else (1.0, 0.0)
        clean = p * seen + q * member(seen, action.stop, condition) if action.stop else seen
        image = model.codec.decode(clean)
        with selected(judge, {part.name: 1.0}):
            foreseen = judge(image, PROMPTS)
            again = judge(image.detach(), PROMPTS)
        (v,) = torch.autograd.grad(-foreseen.mean(), seen)
        expected = torch.autograd.grad(after, adapter.parameters(), v, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(adapter.parameters(), expected, strict=True)]
        )
        torch.testing.assert_close(actor, flat, rtol=1e-8, atol=1e-8 * float(flat.abs().max()))
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad((again - returns).square().mean(), own)])
        torch.testing.assert_close(regression, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
        torch.testing.assert_close(result.rewards, returns)
        assert result.terms["critic error"] == pytest.approx(float((again - returns).detach().square().mean()))
        assert float(flat.abs().max()) > 0 and float(wanted.abs().max()) > 0
    critic.remove()
    assert list(dict(judge.named_modules())) == ["", "inner", "out"]


def test_two_critics_of_one_reward_answer_as_each_alone() -> None:
    model, adapter = prepared("epsilon", None)
    judge = Judge().double()
    plan = DPG(rank=2).plan(model.grid(STEPS), Random(0))

    def found(critic: ActorCritic) -> Tensor:
        own = [weight for each in critic.adapters.values() for weight in each.parameters()]
        torch.manual_seed(3)
        for weight in own:
            weight.data.normal_(0, 0.3)
        critic.add(model, plan, Objective.of(reward_of(judge)), batch())
        seen = torch.cat([gradients(adapter.parameters()), gradients(own)])
        for weight in (*adapter.parameters(), *own):
            weight.grad = None
        return seen

    first: ActorCritic = estimator(DPG(rank=2), model, judge)
    alone = found(first)
    second: ActorCritic = estimator(DPG(rank=2), model, judge)
    for critic in (second, first):
        torch.testing.assert_close(found(critic), alone, rtol=1e-12, atol=0)
        critic.remove()
    assert float(alone.abs().max()) > 0 and list(dict(judge.named_modules())) == ["", "inner", "out"]


def test_a_critic_learns_what_images_are_worth_and_leaves_the_reward_as_it_is(tmp_path: Path) -> None:
    judge = Judge()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    model = cr.load(make_pipeline(dtype=torch.float32))
    run = cr.finetune(
        model, DPG(rank=2, rate=10.0), judge, PROMPTS, out=tmp_path / "run", updates=12, batch=4, sample_steps=3, lr=1e-3, rank=2,
        sample_every=0, save_every=0,
    )  # fmt: skip
    terms = [row["terms"] for row in run.metrics()]
    assert all({"critic error", "critic correlation"} <= row.keys() for row in terms)
    assert all(torch.equal(judge.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (DDPO(), {}, "draws no noise"),
        (DPG(), {}, "has no network that a critic could be made of"),
        (GRPO(group=3), {"solver": "sde"}, "must be divisible by the method's groups of 3"),
        (DDPO(calls=3), {"solver": "sde"}, "calls is 3, but must be between 1 and 2"),
        (GRPO(), {"solver": "sde", "sample_steps": 1}, "number of sampling steps is 1, but must be at least 2"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(
    method: Method, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    options = {"sample_steps": 3, "batch": 4, "updates": 1} | options
    model = cr.load(make_pipeline(dtype=torch.float32)).solving(options.pop("solver", None))
    with pytest.raises(cr.UserError, match=said):
        cr.finetune(model, method, "symmetry", PROMPTS, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_reward_without_a_gradient_trains_by_likelihoods_alone(tmp_path: Path) -> None:
    model = cr.load(make_pipeline(dtype=torch.float32)).solving("sde")
    small = {"updates": 2, "batch": 4, "sample_steps": 3, "rank": 2, "sample_every": 0, "save_every": 0}
    run = cr.finetune(model, "grpo", whole_numbers, PROMPTS, out=tmp_path / "run", held_out=whole_numbers, **small)
    assert all(float(row["reward"]).is_integer() or row["reward"] > 0 for row in run.metrics())
    with pytest.raises(cr.UserError, match="or train by ddpo or grpo, which need none"):
        cr.finetune(model, "sdo", whole_numbers, PROMPTS, out=tmp_path / "other", **small)


def test_a_step_of_the_sde_has_the_marginals_of_the_ode() -> None:
    """DDIM with eta = 1 keeps alpha and sigma: a state a x_0 + s e goes to one of the next level's, for flows as well."""
    process = Process(Flow(), Prediction.FLOW)
    for start, stop in ((1000, 800), (800, 500), (500, 100), (100, 0)):
        (alpha, sigma), (alpha2, sigma2) = process.schedule(start), process.schedule(stop)
        step = next(moves(Ancestral(process), walk((start, stop))))
        # The answer of the exact network for x_0 = c is (x - c) / sigma, as the flow predicts noise - image.
        signal, noise = step.a * alpha - step.b + step.b * 0, step.a * sigma + step.b
        assert signal == pytest.approx(alpha2, abs=1e-12)
        assert noise**2 + step.d**2 == pytest.approx(sigma2**2, abs=1e-12)


def test_a_rollout_that_serves_several_updates_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Killed and resumed in the middle of a rollout, the run ends as if it had not been."""
    options: dict[str, Any] = {
        "updates": 5,
        "batch": 4,
        "accumulate": 2,
        "sample_steps": 3,
        "rank": 2,
        "lr": 1e-2,
        "sample_every": 0,
    }

    def kill(row: Any) -> None:
        if row["step"] == 4:
            raise KeyError

    for name, on_update in (("whole", None), ("cut", kill)):
        model = cr.load(make_pipeline(dtype=torch.float32)).solving("sde")
        with nullcontext() if name == "whole" else pytest.raises(KeyError):
            cr.finetune(model, DDPO(reuse=3), gray, PROMPTS, out=tmp_path / name, on_update=on_update, save_every=2, **options)
    model = cr.load(make_pipeline(dtype=torch.float32)).solving("sde")
    cr.finetune(model, DDPO(reuse=3), gray, PROMPTS, out=tmp_path / "cut", resume=True, save_every=2, **options)
    assert not differences(*(outcome(tmp_path / name) for name in ("whole", "cut")))
    rewards = [row["reward"] for row in cr.Run(tmp_path / "cut").metrics()]
    assert rewards[0] == rewards[1] == rewards[2] != rewards[3] == rewards[4]


def test_the_last_step_is_never_an_action() -> None:
    for method in (DDPO(), GRPO()):
        plan = method.plan((4, 3, 2, 1, 0), Random(0))
        assert str(plan) == "[===-]"
    assert str(replace(DDPO(), calls=1).plan((4, 3, 2, 1, 0), Random(0))).count("=") == 1


def test_a_call_that_passes_its_input_alone_loses_no_small_gradient_in_float16() -> None:
    """Rounded to float16 before it is scaled, an upstream gradient of 1e-9 would be zero."""
    x = torch.full((2, 3), 2.0, requires_grad=True)
    answer = (3 * x).half()
    found = half.gradient(answer, x, torch.full((2, 3), 1e-9))
    torch.testing.assert_close(found, torch.full((2, 3), 3e-9), rtol=2e-3, atol=0)
