"""Distillation: the student learns the teacher's own jumps, resumes bit for bit, and loads where it is needed."""

from __future__ import annotations

import itertools
import json
from random import Random

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor

import chainrule as cr
from chainrule.adapters.select import layers_of
from chainrule.analyze import save, shortcut
from chainrule.distill import DistillTask
from chainrule.learner import Learner
from chainrule.methods import ShortFT
from chainrule.models.students import facts, resolve
from chainrule.noise import derive
from chainrule.plan import segment_ends, student_path
from chainrule.settings import Distillation

pytestmark = pytest.mark.usefixtures("brief_analysis")
PROMPTS, SEEDS = ["a fox", "two bees"], [3, 8]
SMALL = {"updates": 5, "batch": 2, "starts": 4, "teacher_steps": 8, "rank": 2, "guidance": 2.0, "save_every": 2, "lr": 5e-3}


def fresh(prediction: str = "v_prediction", dtype: torch.dtype = torch.float32) -> cr.Model:
    return cr.load(make_pipeline(prediction, dtype))


def test_segments_and_routes():
    assert segment_ends(1000, 4) == (750, 500, 250, 0)
    assert [(j.start, j.stop, j.via) for j in student_path(742, 1000, 4)] == [
        (742, 500, "student"), (500, 250, "student"), (250, 0, "student"),
    ]  # fmt: skip
    assert [j.stop for j in student_path(250, 1000, 4)] == [0] and student_path(250, 1000, 4)[-1].finish


def distiller(prediction: str, dtype: torch.dtype = torch.float64) -> DistillTask:
    task = DistillTask.start(fresh(prediction, dtype), PROMPTS, Distillation(**SMALL))
    torch.manual_seed(0)
    for weight in task.adapter.parameters():
        weight.data.normal_(0, 0.1)
    return task


def test_starts_cover_every_segment_and_end_where_their_segment_ends():
    made = distiller("epsilon")
    for number in range(20):
        rng = Random(number)
        grid = made.grid(rng)
        assert (
            grid[0] <= 1000
            and grid[-1] == 0
            and set(segment_ends(1000, 4)) <= set(grid)
            and list(grid) == sorted(set(grid), reverse=True)
        )
        pairs = made.starts(grid, rng)
        assert len(pairs) == 4 and {grid[end] for _, end in pairs} == {750, 500, 250, 0}
        assert all(grid[end] < grid[i] <= grid[end] + 250 for i, end in pairs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_update_is_the_mean_squared_distance_from_the_guided_trajectory(prediction, monkeypatch):
    """Against a loop with the pipeline's own parts: DDIM from every level to the next, guided; the student's jump, unguided."""
    made, seen = distiller(prediction), []
    monkeypatch.setattr(Learner, "update", lambda self, weights, flat, loss, **_: seen.append(flat.clone()) or (0.0, True))
    row = made.update()
    rng = Random(derive(0, "distill", 0))
    grid = made.grid(rng)
    prompts, seeds = [rng.choice(PROMPTS) for _ in range(2)], [rng.getrandbits(63) for _ in range(2)]
    pairs, pipe = made.starts(grid, rng), made.model.pipe
    positive, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    cumulative = torch.cat([torch.ones(1, dtype=torch.float64), pipe.scheduler.alphas_cumprod.double()])
    tuners = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]

    def network(x: Tensor, level: int, text: Tensor, on: bool) -> Tensor:
        for layer in tuners:
            layer._active_adapter = ["student"] if on else []
        return pipe.unet(x, torch.tensor(level - 1), encoder_hidden_states=text).sample

    def ddim(x: Tensor, m: Tensor, start: int, stop: int) -> Tensor:
        a, s = cumulative[start].sqrt(), (1 - cumulative[start]).sqrt()
        clean, noise = ((x - s * m) / a, m) if prediction == "epsilon" else (a * x - s * m, s * x + a * m)
        target = cumulative[max(stop, 1)]
        return target.sqrt() * clean + (1 - target).sqrt() * noise

    x = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()
    states = [x]
    with torch.no_grad():
        for start, stop in itertools.pairwise(grid):
            u, c = network(x, start, negative, False), network(x, start, positive, False)
            x = ddim(x, u + 2.0 * (c - u), start, stop)
            states.append(x)
    losses = []
    for i, end in pairs:
        there = ddim(states[i], network(states[i], grid[i], positive, True), grid[i], grid[end])
        a, s, a2, s2 = (f(cumulative[level]) for level in (grid[i], grid[end]) for f in (torch.sqrt, lambda v: (1 - v).sqrt()))
        losses.append(((there - states[end]) / (a * s2 - a2 * s)).square().mean())
    loss = sum(losses) / len(losses)
    weights = list(made.learner.named_parameters().values())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()) + 1e-12)


class Killed(Exception):
    pass


@pytest.mark.heavy
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path):
    whole = cr.distill(fresh(), out=tmp_path / "whole", prompts=PROMPTS, **SMALL)

    def die(row: dict) -> None:
        if row["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        cr.distill(fresh(), out=tmp_path / "cut", prompts=PROMPTS, on_update=die, **SMALL)
    cut = cr.distill(fresh(), out=tmp_path / "cut", prompts=PROMPTS, resume=True, **SMALL)
    for name in ("adapter/pytorch_lora_weights.safetensors", "checkpoints/step-000005/state.safetensors"):
        first, second = load_file(whole.folder / name), load_file(cut.folder / name)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_student_learns_and_leaves_the_model_as_it_was(tmp_path):
    net = fresh()
    before = net.render(PROMPTS, SEEDS, 5, 2.0)
    run = cr.distill(
        net, out=tmp_path / "run", prompts=PROMPTS, **{**SMALL, "updates": 16, "rank": 8, "ema": 0.8, "guidance": 7.0, "lr": 0.1}
    )
    assert torch.equal(net.render(PROMPTS, SEEDS, 5, 2.0), before) and not hasattr(net.network, "peft_config")
    losses = [row["loss"] for row in run.metrics()]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert facts(run.folder) == {"base": net.name, "steps": 4, "prediction": "v_prediction"}


def test_a_student_is_the_same_in_plain_diffusers(tmp_path):
    """Its convolutions included: one jump by the cast equals the UNet that loaded the file."""
    run = cr.distill(fresh(), out=tmp_path / "run", prompts=PROMPTS, **SMALL)
    net = fresh().with_student(run.folder)
    condition, x = net.embed(PROMPTS), net.noise(SEEDS)
    ours = net.guided(2.0).cast()["student"](x, 742, condition)
    pipe = make_pipeline("v_prediction", torch.float32)
    pipe.load_lora_weights(run.adapter, weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        theirs = pipe.unet(x, torch.tensor(741), encoder_hidden_states=condition.positive.states).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, net.guided(1.0).cast()["base"](x, 742, condition), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "steps is 1"), ({"teacher_steps": 7}, "teacher_steps is 7"), ({"rnak": 3}, "unknown option 'rnak'"),
        ({"lr": -1}, "lr is -1"), ({"rank": 0}, "rank is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, options, said):
    with pytest.raises(cr.UserError, match=said):
        cr.distill(fresh(), out=tmp_path / "run", prompts=PROMPTS, **{**SMALL, **options})
    assert not (tmp_path / "run").exists()


def test_a_student_of_another_prediction_is_refused_by_its_own_word(tmp_path, sd_folder):
    run = cr.distill(fresh(), out=tmp_path / "run", prompts=PROMPTS, **{**SMALL, "updates": 1})
    with pytest.raises(cr.UserError, match="predicts v_prediction, but"):
        resolve(run.folder, str(sd_folder))


def test_the_analysis_is_a_table_and_a_picture(tmp_path):
    net = fresh()
    with pytest.raises(cr.UserError, match="no student to analyze"):
        shortcut(net, PROMPTS)
    run = cr.distill(net, out=tmp_path / "run", prompts=PROMPTS, **{**SMALL, "updates": 1})
    bright = lambda images, prompts: images.mean((1, 2, 3))
    found = shortcut(net.with_student(run.folder), PROMPTS, [bright], seeds=2, steps=10, points=2, guidance=2.0)
    place = save(found, tmp_path / "out")
    lines = (place / "shortcut.md").read_text().splitlines()
    assert len(lines) == 2 + 2 * 4 and "latent" in lines[0] and (place / "shortcut.png").stat().st_size > 0
    assert found.calls[902] == {"shortcut": 4, "ddim": 4, "ddim, half the calls": 2, "one step": 1}
    assert found.calls[402] == {"shortcut": 2, "ddim": 2, "ddim, half the calls": 1, "one step": 1}
    assert (run.folder / "shortcut.md").exists() and (run.folder / "shortcut.png").exists()
    # From the sampler's last level the base model's own jumps are its own chain: nothing is lost.
    end = shortcut(net.with_student(run.folder), PROMPTS, seeds=1, steps=2, points=2, guidance=2.0, student_steps=2)
    assert end.rows[2]["ddim"]["latent"].mean == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> cr.Run:
    """A run of ShortFT with three adapters, on a student that learned a little."""
    folder = tmp_path_factory.mktemp("tuned")
    run = cr.distill(fresh(), out=folder / "student", prompts=PROMPTS, **{**SMALL, "updates": 1})
    gray = lambda images, prompts: -(images - 0.2).square().mean((1, 2, 3))
    return cr.finetune(
        fresh().with_student(run.folder), ShortFT(k=3), gray, PROMPTS, out=folder / "run", steps=6, batch=2, lr=3e-2, rank=2,
        sample_steps=10, guidance=2.0, sample_every=0,
    )  # fmt: skip


def test_attached_adapters_are_the_same_in_a_plain_pipeline_and_leave_no_trace(tuned):
    *_, ours = fresh().using(tuned.folder).states(PROMPTS, SEEDS, 10, 2.0)
    pipe = make_pipeline("v_prediction", torch.float32)
    call = {"num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "latent"}
    image = lambda: pipe(PROMPTS, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **call).images
    before, modules = image(), [type(m) for m in pipe.unet.modules()]
    with cr.attach(pipe, tuned.folder) as attached:
        found = image()
        with pytest.raises(cr.UserError, match="adapters already"):
            cr.attach(pipe, tuned.folder)
    assert attached.loaded == [] and torch.equal(image(), before) and [type(m) for m in pipe.unet.modules()] == modules
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-4)
    with pytest.raises(cr.UserError, match="no unet or transformer"):
        cr.attach(pipe.vae, tuned.folder)


def test_attached_adapters_work_no_more_than_one_lora_would(tuned):
    """Counted in LoRA layers that ran, over a whole chain, against one adapter on in every call."""
    pipe = make_pipeline("v_prediction", torch.float32)
    ran: list[str] = []
    with cr.attach(pipe, tuned.folder):
        for layer in layers_of(pipe.unet):
            layer.register_forward_hook(lambda layer, *_: ran.extend(layer.active_adapters))
        pipe(PROMPTS, num_inference_steps=10, guidance_scale=2.0, output_type="latent")
    bands = json.loads((tuned.adapter / "bands.json").read_text())
    per_adapter = len([k for k in load_file(tuned.adapter / "lora1/pytorch_lora_weights.safetensors") if ".lora_A." in k])
    assert len(bands) == 3 and 0 < len(ran) < 10 * per_adapter
