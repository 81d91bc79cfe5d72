"""Fine-tuning: improvement on a known optimum, exact resume, Ctrl-C, bad numbers, several processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file

import chainrule as cr
from chainrule.errors import Note
from chainrule.methods import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.objective import KL, Objective
from chainrule.rewards import reward_of
from chainrule.settings import Finetuning
from chainrule.training import FinetuneTask

PROMPTS = ["a fox", "two bees", "a cat"]
SMALL = {"batch": 2, "sample_steps": 4, "guidance": 2.0, "rank": 2, "sample_every": 0, "save_every": 0}


def model() -> cr.Model:
    return cr.load(make_pipeline("v_prediction", torch.float32))


def gray(images: torch.Tensor, prompts: object) -> torch.Tensor:
    """Quadratic; the optimum, 0, is a plain gray image."""
    return -(images - 0.5).square().mean((1, 2, 3))


def run(out: Path, method=None, reward=gray, **options) -> cr.Run:
    return cr.finetune(model(), method or DRaFTLV(), reward, PROMPTS, out=out, **{**SMALL, "steps": 4, **options})


@pytest.mark.parametrize(
    "method",
    [DRaFT(), DRaFT(1), DRaFTLV(), DRaFTLV(reuse_reward_gradient=True), ReFL(m=3), ReFL(m=3, guided=False), AlignProp(),
     DRTune(k=2, m=2), SDO(), SDO(2)],
    ids=str,
)  # fmt: skip
def test_every_method_raises_the_reward_of_the_saved_adapter(method, tmp_path):
    before = float(gray(model().render(PROMPTS, [0, 1, 2], 4, 2.0), PROMPTS).mean())
    done = run(tmp_path / "run", method, steps=10, lr=2e-2, rank=4)
    after = float(gray(model().using(done.adapter).render(PROMPTS, [0, 1, 2], 4, 2.0), PROMPTS).mean())
    assert after > before + 0.01 * abs(before)  # random weights can do little; test_laws has a toy that can reach the optimum


@pytest.mark.heavy
def test_a_killed_run_continues_bit_for_bit(tmp_path):
    options = {"ema": 0.9, "schedule": "sqrt", "kl": 0.01, "accumulate": 2, "batch": 4}
    whole = run(tmp_path / "whole", SDO(), steps=6, **options)
    cut = tmp_path / "cut"

    class Killed(Exception):
        pass

    def die(row):
        if row["step"] == 5:  # after the checkpoint of step 4: that progress is lost, as with a power cut
            raise Killed

    with pytest.raises(Killed):
        cr.finetune(model(), SDO(), gray, PROMPTS, out=cut, on_update=die, **{**SMALL, "steps": 6, "save_every": 2, **options})
    resumed = cr.finetune(model(), SDO(), gray, PROMPTS, out=cut, resume=True, **{**SMALL, "steps": 6, "save_every": 2, **options})
    for name in ("adapter/pytorch_lora_weights.safetensors", "checkpoints/step-000006/state.safetensors"):
        first, second = load_file(whole.folder / name), load_file(resumed.folder / name)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(resumed.metrics()) == strip(whole.metrics())


def test_ctrl_c_leaves_a_usable_adapter_and_a_run_that_resumes(tmp_path):
    def interrupt(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    done = cr.finetune(model(), DRaFT(1), gray, PROMPTS, out=tmp_path / "run", on_update=interrupt, **{**SMALL, "steps": 50})
    assert len(done.metrics()) in (2, 3)
    assert model().using(done.adapter).render(["a fox"], [0], 3, 2.0).isfinite().all()
    again = cr.finetune(model(), DRaFT(1), gray, PROMPTS, out=tmp_path / "run", resume=True, **{**SMALL, "steps": 5})
    assert [row["step"] for row in again.metrics()] == [1, 2, 3, 4, 5]


def test_a_bad_update_is_skipped_counted_and_the_run_goes_on(tmp_path):
    calls = []

    def moody(images, prompts):
        calls.append(1)
        return gray(images, prompts) * (float("nan") if len(calls) == 3 else 1.0)

    done = run(tmp_path / "run", DRaFT(1), moody, steps=5)
    assert [row["skipped"] for row in done.metrics()][-1] == 1
    weights = load_file(done.adapter / "pytorch_lora_weights.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_too_many_bad_updates_stop_the_run_with_the_last_good_adapter_saved(tmp_path):
    calls = []

    def broken(images, prompts):
        calls.append(1)
        return gray(images, prompts) * (float("inf") if len(calls) > 3 else 1.0)

    with pytest.raises(cr.UserError, match="the last updates, 8 times"):
        run(tmp_path / "run", DRaFT(1), broken, steps=50)
    saved = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(w.isfinite().all() for w in saved.values()) and any(w.abs().sum() > 0 for k, w in saved.items() if "lora_B" in k)


def test_early_stopping_watches_the_held_out_reward(tmp_path):
    def against(images, prompts):
        return -gray(images, prompts)

    done = run(tmp_path / "run", DRaFT(1), held_out=against, steps=40, sample_every=2, patience=2, lr=1e-2)
    assert len(done.metrics()) < 40 and any("held_out" in row for row in done.metrics())
    assert "held-out" in (done.folder / "stopped.txt").read_text()


def test_kl_keeps_the_last_call_near_the_base_model(tmp_path):
    """Its gradient is that of weight * ||m - m_base||^2 summed per image, averaged over the batch: against autograd."""
    from random import Random

    net = cr.load(make_pipeline())
    adapter = net.adapt(rank=2)
    torch.manual_seed(0)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.2)
    plan, seeds = DRaFT(1).plan(net.grid(3), Random(0)), [1, 2]
    zero = lambda images, prompts: (images * 0).sum((1, 2, 3))
    base_model = replace(net, active={}).guided(2.0).cast()["base"]
    seen = cr.gradient(net, plan, Objective.of(zero).with_terms(KL(base_model, 0.7)), PROMPTS[:2], seeds, guidance=2.0)
    found = [p.grad.clone() for p in adapter.parameters()]
    *_, x, _ = [net.noise(seeds), *net.states(PROMPTS[:2], seeds, 3, 2.0)]
    condition = net.embed(PROMPTS[:2])
    with torch.no_grad():
        base = base_model(x, plan.branches[0][0].start, condition)
    distance = (net.guided(2.0).cast()["base"](x, plan.branches[0][0].start, condition) - base).square().sum() / 2
    assert seen.terms["kl"] == pytest.approx(float(distance.detach()))
    for mine, expected in zip(found, torch.autograd.grad(0.7 * distance, adapter.parameters()), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-12)


def test_an_update_does_not_depend_on_accumulation_or_micro_batches(tmp_path):
    found = []
    for options in ({}, {"accumulate": 4}, {"micro_batch": 1}, {"memory": "keep"}):
        net = cr.load(make_pipeline())
        settings = Finetuning(**{**SMALL, "batch": 4, **options})
        task = FinetuneTask.start(net, DRaFTLV(), reward_of(gray), PROMPTS, settings)
        task.update()
        found.append(torch.cat([p.detach().flatten() for p in task.learner.named_parameters().values()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"lr": -1.0}, "lr is -1"),
        ({"guidance": 1000.0}, "guidance is 1000"),
        ({"lrr": 1.0}, "did you mean 'lr'"),
        ({"memory": "some"}, "memory is 'some'"),
        ({"accumulate": 3}, "must divide the batch"),
        ({"patience": 2}, "needs a held-out reward"),
        ({"method": DRaFT(9)}, "k is 9"),
        ({"reward": lambda images, prompts: images.mean()}, "shape"),
        ({"reward": lambda images, prompts: images.mean((1, 2, 3)) * float("nan")}, "[Nn]a[Nn]|finite"),
        ({"reward": lambda images, prompts: images.detach().mean((1, 2, 3))}, "gradient"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(options, message, tmp_path):
    with pytest.raises(cr.UserError, match=message) as caught:
        run(tmp_path / "run", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_says_what_to_do(tmp_path):
    run(tmp_path / "run", DRaFT(1), steps=2)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.warns(Note, match="is damaged"), pytest.raises(cr.UserError, match=r"no checkpoint of .* is whole"):
        run(tmp_path / "run", DRaFT(1), steps=3, resume=True)
    with pytest.raises(cr.UserError, match="rank"):
        run(tmp_path / "run", DRaFT(1), steps=3, resume=True, rank=4)
    with pytest.raises(cr.UserError, match="not empty"):
        run(tmp_path / "run", DRaFT(1), steps=3)
