"""ShortFT: its stages against tables written by hand, its gradients against a plain loop that swaps adapters by hand."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from pipelines import Worth, make_pipeline, score
from students import GUIDANCE, PROMPTS, SEEDS, shake, student_file
from torch import Tensor

import chainrule as cr
from chainrule.adapters import Band
from chainrule.cast import Member
from chainrule.chain import Chain, Memory
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.gradient import backpropagate
from chainrule.methods import Needs, ShortFT, make, needs, stages
from chainrule.noise import Noise
from chainrule.objective import Objective
from chainrule.plan import Grad, Plan, walk
from chainrule.solve import DDIM, Prediction, Process

FIFTY = (*range(982, 0, -20), 0)  # Stable Diffusion's 50 leading steps, as levels
NINE = (*range(900, 0, -100), 0)
SIX = (600, 500, 400, 300, 200, 100, 0)

# One row a call: level, level it leads to, who answers, adapters on, whether the reward reaches it. Written by hand.
B, S, N_, F_ = "base", "student", Grad.NONE, Grad.FULL
TABLES: dict[tuple[tuple[int, ...], int, int], list[tuple[int, int, str, str, Grad]]] = {
    (SIX, 2, 1): [
        (600, 500, B, "1", F_), (500, 400, B, "1", F_), (400, 300, B, "1", F_), (300, 100, S, "", F_), (100, 0, B, "12", F_),
    ],
    (SIX, 2, 2): [
        (600, 500, B, "1", N_), (500, 400, B, "1", N_), (400, 300, B, "1", N_), (300, 200, B, "", N_), (200, 100, B, "", N_),
        (100, 0, B, "12", F_),
    ],
    (NINE, 3, 1): [
        (900, 800, B, "1", F_), (800, 700, B, "1", F_), (700, 600, B, "1", F_), (600, 400, S, "", F_), (400, 300, B, "12", F_),
        (300, 100, S, "", F_), (100, 0, B, "123", F_),
    ],
    (NINE, 3, 2): [
        (900, 800, B, "1", N_), (800, 700, B, "1", N_), (700, 600, B, "1", N_), (600, 500, B, "", N_), (500, 400, B, "", N_),
        (400, 300, B, "12", F_), (300, 100, S, "", F_), (100, 0, B, "123", F_),
    ],
    (NINE, 3, 3): [
        (900, 800, B, "1", N_), (800, 700, B, "1", N_), (700, 600, B, "1", N_), (600, 500, B, "", N_), (500, 400, B, "", N_),
        (400, 300, B, "12", N_), (300, 200, B, "", N_), (200, 100, B, "", N_), (100, 0, B, "123", F_),
    ],
}  # fmt: skip


def steps(high: int, low: int) -> list[int]:
    return list(range(high, low - 1, -20))


# The paper's chain (arXiv:2507.22604, section 4.1), in levels: timesteps plus one.
def paper(stage: int) -> list[tuple[int, int, str, str, Grad]]:
    first = [(level, level - 20, B, "1", F_ if stage == 1 else N_) for level in steps(982, 762)]
    middle = {
        "742": [(742, 502, S, "", F_)] if stage < 2 else [(level, level - 20, B, "", N_) for level in steps(742, 522)],
        "482": [(482, 262, S, "", F_)] if stage < 3 else [(level, level - 20, B, "", N_) for level in steps(482, 282)],
        "242": [(242, 2, S, "", F_)] if stage < 4 else [(level, level - 20, B, "", N_) for level in steps(242, 22)],
    }
    lora2 = [(502, 482, B, "12", F_ if stage <= 2 else N_)]
    lora3 = [(262, 242, B, "123", F_ if stage <= 3 else N_)]
    return [*first, *middle["742"], *lora2, *middle["482"], *lora3, *middle["242"], (2, 0, B, "1234", F_)]


TABLES |= {(FIFTY, 4, stage): paper(stage) for stage in (1, 2, 3, 4)}


def table(plan: Plan, own: Needs) -> list[tuple[int, int, str, str, Grad]]:
    def active(level: int) -> str:
        return "".join(name[-1] for name, spans in own.adapters.items() if Band(1.0, spans).at(level))

    return [(j.start, j.stop, j.via, active(j.start) if j.via == "base" else "", j.grad) for j in plan.jumps]


@pytest.mark.parametrize(("grid", "k", "stage"), TABLES, ids=lambda v: str(v)[:12])
def test_a_stage_is_its_table(grid, k, stage):
    method = ShortFT(k=k, stage=stage)
    plan, own = method.plan(grid, Random(0)), needs(method, grid)
    assert table(plan, own) == TABLES[grid, k, stage]
    assert own.trained == tuple(f"lora{i}" for i in range(stage, k + 1))
    assert [jump.finish for jump in plan.jumps] == [False] * (len(plan.jumps) - 1) + [True]


def test_the_papers_chain_is_18_calls_in_its_first_stage_and_50_in_its_last():
    plans = [stage.plan(FIFTY, Random(0)) for stage in stages(ShortFT())]
    assert [plan.calls() for plan in plans] == [18, 29, 39, 50]
    assert [str(plan) for plan in plans][::3] == ["[############>#>#>#]", "-" * 49 + "[#]"]
    given = ShortFT(levels=(762, 502, 262, 2))
    assert given.plan(FIFTY, Random(0)) == ShortFT().plan(FIFTY, Random(0)) and needs(given, FIFTY) == needs(ShortFT(), FIFTY)


def test_options_shape_the_chain():
    assert str(ShortFT(k=3, depth=3).plan(NINE, Random(0))) == "--->[#>#]"
    shared = needs(ShortFT(k=3, shared=True, stage=2), NINE)
    assert shared.trained == ("shared",) and list(shared.adapters) == ["shared"]
    part = ShortFT(levels=(700, 100), shortcuts=((500, 200),)).plan(NINE, Random(0))
    assert [(j.start, j.stop) for j in part.jumps if j.via == "student"] == [(500, 200)] and part.calls() == 7
    assert stages(ShortFT(stage=1)) == (ShortFT(stage=1),) and len(stages(ShortFT(k=3))) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 51}, "k is 51"), ({"levels": [761, 2]}, "761"), ({"levels": [762, 502]}, "end with the last call's, 2"),
        ({"shortcuts": [[742, 500]]}, "500"), ({"shortcuts": [[762, 602]]}, "742 to 502"), ({"stage": 5}, "stage is 5"),
        ({"depth": 0}, "depth is 0"), ({"levels": "high"}, "a list of numbers"), ({"levels": []}, "k is 0"),
        ({"shortcuts": [[3]]}, "a list of pairs of numbers"), ({"shortcuts": [[742, 602], [682, 502]]}, "must not overlap"),
    ],
)  # fmt: skip
def test_bad_options_get_one_line_before_anything_is_loaded(options, said):
    with pytest.raises(cr.UserError, match=said):
        make("shortft", options).plan(FIFTY, Random(0))


def prepared(folder: Path, own: Needs, network: bool = False) -> tuple[cr.Model, dict[str, cr.Adapter]]:
    """A model with a student, a LoRA or a network of its own, and the method's adapters away from the identity."""
    net = cr.load(make_pipeline("v_prediction"))
    if network:
        make_pipeline("v_prediction", seed=8).unet.save_pretrained(folder)
    net = net.with_student(folder if network else student_file(folder))
    adapters = {name: shake(net.adapt(name, rank=2, levels=spans), i) for i, (name, spans) in enumerate(own.adapters.items())}
    for name, adapter in adapters.items():
        for weight in adapter.parameters():
            weight.requires_grad_(name in own.trained)
    return net, adapters


def by_hand(net: cr.Model, rows: list[tuple[int, int, str, str, Grad]], names: list[str], other: torch.nn.Module | None) -> Tensor:
    """The final latent of a table of calls, with autograd through every call that is live. Adapters are set by hand."""
    pipe = net.pipe
    layers = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]
    cumulative = torch.cat([torch.ones(1, dtype=torch.float64), pipe.scheduler.alphas_cumprod.double()])
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    x = net.noise(SEEDS)
    for start, stop, via, on, grad in rows:
        for layer in layers:
            layer._active_adapter = (
                ["student0"] if via == "student" and other is None else [n for n in names if n[-1] in on or n == on]
            )
        network = other if via == "student" and other is not None else pipe.unet
        t = torch.tensor(start - 1)
        with torch.set_grad_enabled(grad is Grad.FULL):
            m = network(x, t, encoder_hidden_states=positive).sample
            if via == "base":
                u = network(x, t, encoder_hidden_states=negative).sample
                m = u + GUIDANCE * (m - u)
            a, s = cumulative[start].sqrt(), (1 - cumulative[start]).sqrt()
            target = cumulative[1] if stop == 0 else cumulative[stop]
            x = target.sqrt() * (a * x - s * m) + (1 - target).sqrt() * (s * x + a * m)
    for layer in layers:
        layer._active_adapter = []
    return x


@pytest.mark.parametrize("network", [False, True], ids=["lora-student", "network-student"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradient_of_every_stage_is_a_plain_loop_that_swaps_adapters_by_hand(tmp_path, stage, network):
    method = ShortFT(k=3, stage=stage)
    plan, own = method.plan(NINE, Random(0)), needs(method, NINE)
    net, adapters = prepared(tmp_path / "student", own, network)
    other = net.members["student"].denoiser.network if network else None
    latent = by_hand(net, TABLES[NINE, 3, stage], list(adapters), other)
    images = (net.pipe.vae.decode(latent / net.pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    live = [weight for name in own.trained for weight in adapters[name].parameters()]
    expected = torch.autograd.grad(-score(images, PROMPTS).mean(), live)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 0
    frozen = [w for name in adapters if name not in own.trained for w in adapters[name].parameters()]
    student = list(net.members["student"].denoiser.network.parameters()) if network else [
        w for n, w in net.network.named_parameters() if ".student0." in n
    ]  # fmt: skip
    for memory in ("keep", "recompute"):
        cr.gradient(net, plan, score, PROMPTS, SEEDS, guidance=GUIDANCE, memory=memory)
        for weight, gradient in zip(live, expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-8, atol=1e-8 * scale)
            weight.grad = None
        assert student and all(weight.grad is None for weight in (*frozen, *student))


def test_an_adapter_that_is_on_nowhere_behind_the_first_live_call_gets_nothing(tmp_path):
    """With depth 1 only the last call is live: lora1 to lora3 are all on there, and only the student's jumps are not seen."""
    method = ShortFT(k=3, depth=1)
    plan = method.plan(NINE, Random(0))
    net, adapters = prepared(tmp_path / "student", needs(method, NINE))
    extra = shake(net.adapt("early", rank=2, levels=((500, None),)), 7)
    cr.gradient(net, plan, score, PROMPTS, SEEDS, guidance=GUIDANCE)
    assert all(w.grad is None for w in extra.parameters())
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for a in adapters.values() for w in a.parameters())


def test_inference_is_the_original_chain_with_the_adapters_of_each_level(tmp_path):
    net, adapters = prepared(tmp_path / "student", needs(ShortFT(k=3, stage=3), NINE))
    rows = [(*row[:4], Grad.NONE) for row in TABLES[NINE, 3, 3]]
    expected = by_hand(net, rows, list(adapters), None)
    *_, found = net.guided(GUIDANCE).chain(PROMPTS, SEEDS).states(net.noise(SEEDS), walk(NINE))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_fresh_adapters_are_the_base_model_bit_for_bit():
    net = cr.load(make_pipeline(dtype=torch.float32))
    before = list(net.states(PROMPTS, SEEDS, 10, 2.0))
    for name, spans in needs(ShortFT(k=3), net.grid(10)).adapters.items():
        net.adapt(name, rank=2, levels=spans)
    assert all(torch.equal(a, b) for a, b in zip(net.states(PROMPTS, SEEDS, 10, 2.0), before, strict=True))


class Velocity(torch.nn.Module):
    """A small velocity-predicting network of four pixels, for a flow model's chain."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)).double()

    @property
    def network(self) -> torch.nn.Module:
        return self

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        time = x.new_full((len(x), 1), level / 10)
        return self.layers(torch.cat([x.flatten(1), time], 1)).view_as(x)


class Shifted:
    """Ten levels of a rectified flow, shifted as SD 3 shifts them: sigma = 3 t / (1 + 2 t), t = level / 10."""

    top = 10

    def __call__(self, level: float, finish: bool = False) -> tuple[float, float]:
        sigma = 3 * level / (10 + 2 * level)
        return 1 - sigma, sigma

    def level(self, alpha: float, sigma: float) -> float:
        raise NotImplementedError


def flow_chain(
    base: Velocity, student: Velocity, batch: int, seed: int = 0, memory: Memory = Memory.RECOMPUTE
) -> tuple[Chain, Tensor]:
    """Rectified flow over ten levels."""
    noise = Noise(tuple(range(seed, seed + batch)), (1, 2, 2))
    condition = Condition(PromptEmbedding(torch.zeros(batch, 1)), PromptEmbedding(torch.zeros(batch, 1)))
    cast = {"base": Member(base), "student": Member(student)}
    return Chain(cast, DDIM(Process(Shifted(), Prediction.FLOW)), condition, noise, memory), noise.initial().double()


def worth(images: Tensor, prompts: object) -> Tensor:
    return -(images - 1).square().mean((1, 2, 3))


@pytest.mark.parametrize("memory", list(Memory))
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_a_flow_model_the_gradient_of_every_stage_is_a_plain_euler_loop(stage, memory):
    base, student = Velocity(0), Velocity(1)
    student.requires_grad_(False)
    plan = ShortFT(k=3, stage=stage).plan(tuple(range(10, -1, -1)), Random(0))
    chain, x = flow_chain(base, student, 5, memory=memory)
    backpropagate(chain, plan, x, lambda latent: latent, Objective((Worth(worth),)), [""] * 5)
    found = [weight.grad for weight in base.parameters()]
    sigma = [3 * t / (1 + 2 * t) for t in (i / 10 for i in range(11))]
    for jump in plan.jumps:
        with torch.set_grad_enabled(jump.grad is Grad.FULL):
            m = (student if jump.via == "student" else base)(x, jump.start, x)
            x = x + (sigma[jump.stop] - sigma[jump.start]) * m
    expected = torch.autograd.grad(-worth(x, ()).mean(), list(base.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)
    assert any(jump.via == "student" for jump in plan.jumps) == (stage < 3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_a_flow_model_every_stage_raises_a_quadratic_reward_on_its_own_chain(stage):
    base, student = Velocity(0), Velocity(1)
    student.requires_grad_(False)
    plan = ShortFT(k=3, stage=stage).plan(tuple(range(10, -1, -1)), Random(0))
    optimizer = torch.optim.Adam(base.parameters(), 2e-2)

    def error() -> float:
        chain, x = flow_chain(base, student, 64, seed=10_000)
        *_, images = chain.states(x, plan.jumps)
        return -float(worth(images, ()).mean())

    before = error()
    for step in range(60):
        chain, x = flow_chain(base, student, 16, seed=16 * step)
        optimizer.zero_grad()
        backpropagate(chain, plan, x, lambda latent: latent, Objective((Worth(worth),)), [""] * 16, micro_batch=16)
        optimizer.step()
    assert error() < 0.5 * before
