"""Picard iteration and gradients along the chain, in float64 against plain loops and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pipelines import make_pipeline, score
from steer_loops import GUIDANCE
from torch import Tensor, nn

import chainrule as cr
from chainrule.analyze import gradients, picard
from chainrule.analyze.picard import Trajectory
from chainrule.cast import Member
from chainrule.chain import Chain
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.noise import Diffusion, Noise
from chainrule.plan import walk
from chainrule.solve import DDIM, Prediction, Process

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def linear_chain(strength: float) -> tuple[Chain, Tensor]:
    """A chain whose network is a small matrix, so that everything about it is known."""
    torch.manual_seed(0)
    matrix = strength * torch.randn(3, 3).double() / 3**0.5

    class Linear:
        network = nn.Module()

        def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
            return torch.einsum("dc,bchw->bdhw", matrix, x) * (1 + level / 1000)

    betas = torch.linspace(1e-4, 2e-2, 1000).double()
    solver = DDIM(Process(Diffusion.of((1 - betas).cumprod(0)), Prediction.VELOCITY))
    nothing = Condition(PromptEmbedding(torch.zeros(1, 1)), PromptEmbedding(torch.zeros(1, 1)))
    return Chain({"base": Member(Linear())}, solver, nothing, Noise((0,), (3, 1, 1))), torch.randn(1, 3, 1, 1).double()


def test_iteration_k_has_the_first_k_states_of_sequential_sampling() -> None:
    """Prop. 4.1 of arXiv:2505.07477, state by state; after as many iterations as steps the whole trajectory."""
    model = cr.load(make_pipeline("v_prediction"))
    chain, x, path = model.guided(GUIDANCE).chain(["a fox"], [3]), model.noise([3]), walk(model.grid(5))
    ode = Trajectory(chain, path)
    sequential = torch.cat([x, *chain.states(x, path)]) / ode.factors
    whole = sequential[:1].repeat(6, 1, 1, 1)
    for k in range(1, 6):
        whole = ode(whole)
        close(whole[: k + 1], sequential[: k + 1])
        assert k == 5 or not torch.allclose(whole[k + 1], sequential[k + 1], rtol=1e-9)


def test_the_norm_is_the_largest_singular_value_of_the_written_out_jacobian() -> None:
    chain, x = linear_chain(1.0)
    path = walk((801, 601, 401, 201, 0))
    ode = Trajectory(chain, path)
    whole = torch.cat([x, *chain.states(x, path)]) / ode.factors

    def later(rest: Tensor) -> Tensor:
        return ode(torch.cat([whole[:1], rest.view(4, 3, 1, 1)]))[1:].flatten()

    columns = []
    for i in range(12):
        unit = torch.zeros(12).double()
        unit[i] = 1
        columns.append((later(whole[1:].flatten() + unit) - later(whole[1:].flatten() - unit)) / 2)  # exact: the map is linear
    jacobian = torch.stack(columns, 1)
    assert ode.norm(whole, 60) == pytest.approx(float(torch.linalg.matrix_norm(jacobian, 2)), rel=1e-6)
    u, v = torch.randn(5, 3, 1, 1).double(), torch.randn(5, 3, 1, 1).double()
    u[0] = v[0] = 0
    close((ode.forward(whole, u) * v).sum(), (u * ode.backward(whole, v)).sum())


def test_picard_measures_what_the_theorem_is_about() -> None:
    """SDO's gradient against the exact one by plain autograd, and Theorem 4.1's bound where it applies."""
    model = cr.load(make_pipeline("v_prediction"))
    found = picard(model, ["a fox", "two bees"], score, steps=5, guidance=1.0)
    figures = {name: value.mean for name, value in found.figures.items()}
    assert found.error[-1].mean < 1e-9
    apart = []
    for prompt in ("a fox", "two bees"):
        chain = model.guided(1.0).chain([prompt], [0])
        grads = []
        for every in (True, False):
            leaf = model.noise([0]).requires_grad_()
            state = leaf
            for i, jump in enumerate(walk(model.grid(5))):
                a, b = model.solver.process.coefficients(jump.start, jump.stop, jump.finish)
                with torch.set_grad_enabled(every or i == 0):
                    answer = model.pipe.unet(state, jump.start - 1, encoder_hidden_states=chain.condition.positive.states).sample
                state = a * state + b * answer
            grads.append(torch.autograd.grad(score(model.codec.decode(state), "").sum(), leaf)[0])
        apart.append(float((grads[1] - grads[0]).norm() / grads[0].norm()))
    assert figures["their distance over the exact one's norm"] == pytest.approx(sum(apart) / 2, rel=1e-6)
    if figures["operator norm of dF/dy"] < 1:
        assert figures["their distance over the exact one's norm"] <= figures["Theorem 4.1's bound on it"]


def test_gradients_along_the_chain_are_those_of_the_methods() -> None:
    model = cr.load(make_pipeline())
    found = gradients(model, ["a fox", "two bees"], score, steps=5, guidance=GUIDANCE, depths=(1, 3, 5), batches=2, batch=2, rank=2)
    assert list(found.draft) == [1, 3, 5]
    assert found.cosine[1].mean == pytest.approx(1)
    assert found.cosine[5].mean < 0.999999
    assert found.sdo[1].mean == pytest.approx(5 * found.draft[1].mean, rel=1e-9)  # at the last call the two are one
    assert not getattr(model.network, "peft_config", {})
    assert found.picture().size == (960, 560)
    assert str(found).count("\n") == 4
