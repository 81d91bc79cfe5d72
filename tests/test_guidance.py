"""Guidance values, each against its formula written out, and against diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor

import chainrule as cr
from chainrule import rewards
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.guidance import CFG, GUIDANCES, ByLevel, Embedded, Guidance, Interval, NormRescaled, Rescaled, both, reads_negative
from chainrule.methods import DRaFT

PROMPTS, SEEDS, LEVEL = ["a fox", "two bees"], [4, 9], 500.0


class Network(torch.nn.Module):
    """A state, a level, an embedding and, where it is told one, a scale, all mixed by two weights."""

    guidance_is_input = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.told = torch.nn.Linear(4, 4).double(), torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.batches: list[int] = []

    @property
    def network(self) -> torch.nn.Module:
        return self

    def forward(self, x: Tensor, level: float, embedding: PromptEmbedding, scale: float | Tensor = 0.0) -> Tensor:
        self.batches.append(len(x))
        mixed = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return (mixed + embedding.states.mean(1)[:, :, None, None] * level / 1000 + self.told * scale * x.square()).tanh()


def qwen(u: Tensor, c: Tensor, scale: float) -> Tensor:
    """As diffusers' Qwen-Image pipeline writes it, on its packed tokens."""
    b, channels, h, w = c.shape
    u, c = (QwenImagePipeline._pack_latents(answer, b, channels, h, w) for answer in (u, c))
    m = u + scale * (c - u)
    m = m * (torch.norm(c, dim=-1, keepdim=True) / torch.norm(m, dim=-1, keepdim=True))
    tokens = m.view(b, h // 2, w // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(b, channels, h, w)


@dataclass(frozen=True)
class Case:
    """A value, what it should be of u, c and the network told a scale, and the batches it asks for."""

    guidance: Any
    formula: Callable[[Tensor, Tensor, Callable[[float], Tensor]], Tensor]
    batches: tuple[int, ...] = (4,)


LEARNED = torch.tensor([2.0, 6.0], dtype=torch.float64)
CASES = {
    "cfg": Case(CFG(3.0), lambda u, c, told: u + 3 * (c - u)),
    "cfg, off": Case(CFG(1.0), lambda u, c, told: c, (2,)),
    "rescaled": Case(Rescaled(5.0, 0.6), lambda u, c, told: rescale_noise_cfg(u + 5 * (c - u), c, 0.6)),
    "norm-rescaled": Case(NormRescaled(4.0), lambda u, c, told: qwen(u, c, 4.0)),
    "embedded": Case(Embedded(0.5), lambda u, c, told: told(0.5), (2,)),
    "by level": Case(ByLevel((900.0, 400.0, 100.0), (7.0, 2.0, 3.0)), lambda u, c, told: u + 3 * (c - u)),
    "by level, learned": Case(ByLevel((900.0, 400.0), LEARNED), lambda u, c, told: u + 5.2 * (c - u)),
    "by level, rescaled": Case(
        ByLevel((500.0,), (5.0,), Rescaled(1.0, 0.6)), lambda u, c, told: rescale_noise_cfg(u + 5 * (c - u), c, 0.6)
    ),
    "interval, inside": Case(Interval(CFG(3.0), 499.0, 500.0), lambda u, c, told: u + 3 * (c - u)),
    "interval, outside": Case(Interval(CFG(3.0), 500.0, 900.0), lambda u, c, told: told(1.0), (2,)),
}


def asked() -> tuple[Network, Tensor, Condition]:
    torch.manual_seed(1)
    states = [PromptEmbedding(torch.randn(2, 3, 4).double()) for _ in range(2)]
    return Network(), torch.randn(2, 4, 6, 4).double(), Condition(*states)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_the_answer_and_its_gradient_are_the_formulas(case: Case) -> None:
    network, x, condition = asked()
    found = case.guidance(network, x, LEVEL, condition)
    assert tuple(network.batches) == case.batches
    told = lambda scale: network(x, LEVEL, condition.positive, scale)
    u, c = (network(x, LEVEL, e) for e in (condition.negative, condition.positive))
    expected = case.formula(u, c, told)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = list(network.mix.parameters())
    ramp = torch.linspace(-1, 1, x.numel()).view_as(x)
    mine, theirs = (torch.autograd.grad((answer * ramp).sum(), weights) for answer in (found, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_an_image_does_not_depend_on_its_neighbors(case: Case) -> None:
    network, x, condition = asked()
    alone = Condition(*(PromptEmbedding(e.states[1:]) for e in (condition.positive, condition.negative)))
    whole = case.guidance(network, x, LEVEL, condition)
    torch.testing.assert_close(case.guidance(network, x[1:], LEVEL, alone), whole[1:], rtol=1e-10, atol=1e-12)


def test_it_says_whether_it_reads_the_negative_embedding(case: Case) -> None:
    network, x, condition = asked()
    if isinstance(case.guidance, Interval):  # at this level it may not
        return
    other = replace(condition, negative=PromptEmbedding(condition.negative.states + 1))
    same = torch.equal(case.guidance(network, x, LEVEL, condition), case.guidance(network, x, LEVEL, other))
    assert reads_negative(case.guidance) is not same


def test_a_config_holds_it(case: Case) -> None:
    if isinstance(getattr(case.guidance, "scales", None), Tensor):
        with pytest.raises(cr.UserError, match="cannot be written down"):
            GUIDANCES.spelled(case.guidance)
        return
    assert GUIDANCES.read(GUIDANCES.spelled(case.guidance)) == case.guidance


def test_a_learned_scale_gets_its_gradient() -> None:
    network, x, condition = asked()
    scales = LEARNED.clone().requires_grad_()
    ByLevel((900.0, 400.0), scales)(network, x, LEVEL, condition).sum().backward()
    u, c = both(network, x, LEVEL, condition)
    torch.testing.assert_close(scales.grad, torch.tensor([0.2, 0.8]).double() * (c - u).sum().detach(), rtol=1e-6, atol=0)


def pipeline_images(change: Callable[[Any, int], None] | None = None, **options: Any) -> Tensor:
    """The plain pipeline's, its guidance changed before each step if so."""

    def after(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if change:
            change(pipe, step + 1)
        return values

    found = make_pipeline(dtype=torch.float32)(
        PROMPTS, num_inference_steps=4, generator=[torch.Generator().manual_seed(s) for s in SEEDS], output_type="np",
        callback_on_step_end=after, **options,
    )  # fmt: skip
    return torch.from_numpy(found.images).permute(0, 3, 1, 2)


def ours(guidance: float | Guidance) -> Tensor:
    return cr.load(make_pipeline(dtype=torch.float32)).render(PROMPTS, SEEDS, 4, guidance)


def test_rescaled_sampling_is_the_pipelines_guidance_rescale() -> None:
    theirs = pipeline_images(guidance_scale=6.0, guidance_rescale=0.7)
    torch.testing.assert_close(ours(Rescaled(6.0, 0.7)).to(theirs), theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(ours(6.0).to(theirs), theirs, atol=1e-3)


def test_a_scale_by_level_is_the_pipeline_with_its_scale_set_at_every_step() -> None:
    scales = (8.0, 5.0, 3.0, 1.5)

    def set_scale(pipe: Any, step: int) -> None:
        pipe._guidance_scale = scales[min(step, 3)]

    theirs = pipeline_images(set_scale, guidance_scale=scales[0])
    levels = tuple(cr.load(make_pipeline()).grid(4))[:-1]
    torch.testing.assert_close(ours(ByLevel(levels, scales)).to(theirs), theirs, rtol=0, atol=2e-5)


def test_guidance_in_an_interval_is_the_pipeline_with_a_scale_of_one_outside() -> None:
    """With the scale 1 in its formula the pipeline's answer is c."""
    levels = tuple(cr.load(make_pipeline()).grid(4))[:-1]

    def set_scale(pipe: Any, step: int) -> None:
        pipe._guidance_scale = 5.0 if step < 2 else 1.0 + 1e-12  # above 1: the pipeline goes on with two branches

    theirs = pipeline_images(set_scale, guidance_scale=5.0)
    torch.testing.assert_close(ours(Interval(CFG(5.0), levels[2], 1000.0)).to(theirs), theirs, rtol=0, atol=2e-5)


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero* (arXiv:2503.18886): u is scaled by its projection of c before it is led away from."""

    scale: float = 4.0

    def __call__(self, ask: Any, x: Tensor, level: float, condition: Condition) -> Tensor:
        u, c = both(ask, x, level, condition)
        share = ((c * u).flatten(1).sum(1) / u.flatten(1).square().sum(1)).view(-1, 1, 1, 1)
        return share * u + self.scale * (c - share * u)


def test_a_guidance_of_ones_own_is_its_plain_loop() -> None:
    model = cr.load(make_pipeline()).guided(ZeroStar(3.0))
    states = list(model.states(PROMPTS, SEEDS, 3))
    pipe, condition, grid = model.pipe, model.embed(PROMPTS), model.grid(3)
    x = model.noise(SEEDS)
    for start, stop, found in zip(grid[:-1], grid[1:], states, strict=True):
        t = torch.tensor(start - 1)
        with torch.no_grad():
            u, c = (pipe.unet(x, t, encoder_hidden_states=e.states).sample for e in (condition.negative, condition.positive))
        share = torch.stack([(a * b).sum() / (b * b).sum() for a, b in zip(c, u, strict=True)]).view(-1, 1, 1, 1)
        m = share * u + 3.0 * (c - share * u)
        a, b = model.solver.process.coefficients(start, stop, stop == 0)
        x = a * x + b * m
        torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-10)


def test_what_is_wrong_with_a_guidance_is_one_line() -> None:
    model = cr.load(make_pipeline())
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: model.guided(-1.0), "guidance is -1"),
        (lambda: model.guided(Embedded(3.0)).render(PROMPTS, SEEDS, 2), "does not read its guidance"),
        (lambda: ByLevel((1.0,), (2.0, 3.0)), "1 levels but 2 scales"),
        (lambda: ByLevel((1.0, 1.0), (2.0, 3.0)), "names a level twice"),
        (lambda: Interval(CFG(2.0), 5.0, 5.0), "which is nowhere"),
        (lambda: model.guided(NormRescaled(2.0, patch=3)).render(PROMPTS, SEEDS, 2), "must divide both sides"),
        (lambda: GUIDANCES.read("cgf"), "did you mean 'cfg'"),
    ]
    for call, message in wrong:
        with pytest.raises(cr.UserError, match=message):
            call()


def test_a_run_keeps_its_guidance_and_is_trained_again_with_it(tmp_path: Path, chainrule: Callable[..., Any]) -> None:
    options = {"updates": 1, "batch": 2, "rank": 2, "sample_steps": 3, "sample_every": 0, "save_every": 0}
    model, reward = cr.load("tiny-emoji"), rewards.parse("symmetry")
    for name, given, kept in (
        ("value", Rescaled(3.0, 0.5), {"name": "rescaled", "scale": 3.0, "rescale": 0.5}),
        ("number", 2.5, 2.5),
        ("default", None, None),
    ):
        run = cr.finetune(model, DRaFT(1), reward, ["a painting of a fox"], out=tmp_path / name, guidance=given, **options)
        assert run.config.settings.guidance == kept
    again = chainrule("train", tmp_path / "value" / "config.yaml", "--out", tmp_path / "again")
    assert not again.code, again.err
    first, second = (load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("value", "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    plain = load_file(tmp_path / "number" / "adapter" / "pytorch_lora_weights.safetensors")
    assert not all(torch.equal(first[key], plain[key]) for key in first)


@pytest.mark.parametrize(
    ("spelled", "named"),
    [
        ("rescalde", "unknown guidance 'rescalde'"),
        ("{name: rescaled, rescal: 1}", "rescal"),
        ("-1", "guidance is -1"),
        ("{scale: 3}", "scale"),
    ],
)
def test_a_wrong_guidance_on_the_command_line_is_one_line(
    spelled: str, named: str, tmp_path: Path, chainrule: Callable[..., Any]
) -> None:
    found = chainrule("train", "--reward", "symmetry", "--guidance", spelled, "--out", tmp_path / "run")
    assert found.code == 2 and len(found.err.strip().splitlines()) == 1 and named in found.err
    assert not (tmp_path / "run").exists()
