"""Balanced sums: sizes against plain loops, a run against the one it must equal, a kill, and two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from faults.trial import together
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor
from tuned import PROMPTS, SMALL, Killed, differences, gray, outcome, tuned

import chainrule as cr
from chainrule.balance import balanced
from chainrule.errors import Note, UserError
from chainrule.methods import GRPO, DRaFTLV
from chainrule.noise import derive
from chainrule.rewards import Reward, reward_of
from chainrule.settings import Finetuning
from chainrule.training import FinetuneTask, draw

RULES = ("deviation", "gradient")
BATCHES = 3


def hundred(images: Tensor, prompts: object) -> Tensor:
    return 100 * gray(images, prompts)


def red(images: Tensor, prompts: object) -> Tensor:
    return images[:, 0].mean((1, 2)) + 5


def ratios() -> Reward:
    return 3 * reward_of(gray) - reward_of(hundred) + 0.5 * reward_of(red)


def task(rule: str, reward: Reward | None = None, **options: object) -> FinetuneTask:
    settings = Finetuning(**{**SMALL, "balance": rule, "balance_batches": BATCHES, "batch": 4, **options})
    net = cr.load(make_pipeline(dtype=torch.float64)).guided(settings.guidance)
    return FinetuneTask.start(net, DRaFTLV(), reward or ratios(), PROMPTS, settings)


def latents(settings: Finetuning) -> tuple[cr.Model, Tensor]:
    """The finished latents of the first updates' images, from a model without an adapter."""
    net = cr.load(make_pipeline(dtype=torch.float64))
    found = []
    for step in range(BATCHES):
        prompts = draw(PROMPTS, settings, step, 1)
        seeds = [derive(settings.seed, "image", step, k) for k in range(settings.batch)]
        found.append([*net.states(prompts, seeds, settings.sample_steps, settings.guidance)][-1])
    return net, torch.cat(found)


# ---------------------------------------------------------------------------------------------------------------- sizes
def test_deviations_are_those_of_the_first_updates_images() -> None:
    ours = task("deviation")
    ours.weigh()
    net, finished = latents(ours.settings)
    images = net.codec.decode(finished)
    for function in (gray, hundred, red):
        assert ours.sizes[function.__name__] == pytest.approx(float(function(images, None).std()), rel=1e-9)
    values = [weight * term(images, [""] * len(images)) for weight, term in ours.raised.weighted()]
    torch.testing.assert_close(torch.stack(values).std(1), torch.tensor([3.0, 1.0, 0.5]).double())


def test_gradients_are_those_of_a_plain_backward_pass() -> None:
    ours = task("gradient")
    ours.weigh()
    net, finished = latents(ours.settings)
    leaf = finished.requires_grad_()
    for weight, term in ours.raised.weighted():
        (gradient,) = torch.autograd.grad(weight * term(net.codec.decode(leaf), [""] * len(leaf)).mean(), leaf)
        whole = float(gradient.norm()) * len(leaf) ** 0.5  # of a batch whose images' gradients all had norm 1
        assert whole == pytest.approx({"gray": 3.0, "hundred": 1.0, "red": 0.5}[term.name], rel=1e-8)
    assert ours.sizes["hundred"] == pytest.approx(100 * ours.sizes["gray"], rel=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_sizes_do_not_depend_on_how_a_batch_is_parted(rule: str) -> None:
    found = []
    for options in ({}, {"accumulate": 4}, {"micro_batch": 1}, {"memory": "blocks"}):
        ours = task(rule, **options)
        ours.weigh()
        found.append(ours.sizes)
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-9)


def test_signs_and_ratios_given_by_hand_stay() -> None:
    sizes = {"gray": 0.5, "hundred": 50.0, "red": 2.0}
    assert [(w, t.name) for w, t in balanced(ratios(), sizes).weighted()] == [(6, "gray"), (-0.02, "hundred"), (0.25, "red")]


# ----------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("rule", RULES)
def test_a_reward_and_a_hundred_times_it_train_as_the_one_that_both_are(rule: str) -> None:
    both = task(rule, reward_of(gray) + reward_of(hundred), updates=BATCHES)
    rows = [both.update() for _ in range(3)]
    one = task("none", (2 / both.sizes["gray"]) * reward_of(gray), updates=BATCHES)
    for row in rows:
        plain = one.update()
        assert row["reward"] == pytest.approx(plain["reward"], rel=1e-9)
        assert row["weights"]["gray"] == pytest.approx(100 * row["weights"]["hundred"], rel=1e-9)
        assert "weights" not in plain
    pairs = zip(both.learner.named_parameters().values(), one.learner.named_parameters().values(), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rule", "die"), [("gradient", 5), ("deviation", 1)])
def test_a_killed_run_goes_on_with_the_same_weights(rule: str, die: int, tmp_path: Path) -> None:
    """Whether it had a checkpoint yet or not."""
    options = {"reward": ratios(), "balance": rule, "balance_batches": 2}
    with pytest.warns(Note, match=rf"balance: {rule}; weights are .* of gray, -.* of hundred, .* of red"):
        whole = tuned(tmp_path / "whole", **options)
    with pytest.raises(Killed), pytest.warns(Note):
        tuned(tmp_path / "cut", die=die, **options)
    with pytest.warns(Note):
        again = tuned(tmp_path / "cut", resume=True, **options)
    assert not differences(outcome(whole.folder), outcome(again.folder))
    assert yaml.safe_load((whole.folder / "config.yaml").read_text())["balance"] == rule
    sizes = json.loads((whole.folder / "checkpoints/step-000006/state.json").read_text())["sizes"]
    for row in whole.metrics():
        given = {"gray": 3.0, "hundred": -1.0, "red": 0.5}
        assert row["weights"] == pytest.approx({name: weight / sizes[name] for name, weight in given.items()}, rel=1e-5)
        assert row["reward"] == pytest.approx(sum(row["weights"][name] * value for name, value in row["terms"].items()), rel=1e-4)
    watched = [json.loads(line) for line in (whole.folder / "watched.jsonl").read_text().splitlines()]
    assert watched[0]["step"] == 0  # before the first update, but in the same units
    net = cr.load(make_pipeline(dtype=torch.float32))
    images = net.render(PROMPTS, range(len(PROMPTS)), SMALL["sample_steps"], SMALL["guidance"])
    assert watched[0]["values"]["reward"] == pytest.approx(balanced(ratios(), sizes)(images, PROMPTS).tolist(), rel=1e-3)


def test_two_processes_find_the_weights_of_one(tmp_path: Path) -> None:
    def tune(place: Path) -> None:
        for rule in RULES:
            tuned(place / rule, ratios(), balance=rule, batch=4, updates=2, sample_every=0, lr=1e-3)

    launched = together(lambda rank: partial(tune, tmp_path / "two"), tmp_path / "said")
    tune(tmp_path / "one")
    ended = [each.end() for each in launched]
    assert not any(each.code for each in ended), ended[0].said
    for rule in RULES:
        one, two = (tmp_path / name / rule for name in ("one", "two"))
        sizes = [json.loads((each / "checkpoints/step-000002/state.json").read_text())["sizes"] for each in (one, two)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-5)
        first, second = (load_file(each / "adapter/pytorch_lora_weights.safetensors") for each in (one, two))
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-6)


def test_a_policy_balances_rewards_without_a_gradient(tmp_path: Path) -> None:
    steps = lambda images, prompts: (8 * images).round().mean((1, 2, 3))
    net = cr.load(make_pipeline(dtype=torch.float32)).solving("sde")
    reward = reward_of(steps, "steps") + reward_of(gray)
    few = {**SMALL, "updates": 1, "batch": 4}
    with pytest.warns(Note, match="balance: deviation"):
        run = cr.finetune(net, GRPO(group=2), reward, PROMPTS, out=tmp_path / "run", balance="deviation", **few)
    assert set(run.metrics()[0]["weights"]) == {"steps", "gray"}
    with pytest.raises(UserError, match="takes no gradient of the reward; take deviation"):
        cr.finetune(net, GRPO(group=2), reward, PROMPTS, out=tmp_path / "no", balance="gradient", **few)


# --------------------------------------------------------------------------------------------------------------- errors
def test_what_cannot_be_balanced_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, message in (
        ({"reward": gray, "balance": "gradient"}, "balance is for a sum of rewards, and gray is one"),
        ({"reward": ratios(), "balance": "norm"}, "balance is 'norm'"),
        ({"reward": ratios(), "balance": "deviation", "batch": 1, "balance_batches": 1}, "one image, which has no deviation"),
    ):
        with pytest.raises(UserError, match=message):
            tuned(tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


def test_a_reward_of_no_size_is_named() -> None:
    flat = reward_of(lambda images, prompts: 0 * images.mean((1, 2, 3)) + 0.25, name="flat")
    for rule in RULES:
        with pytest.raises(UserError, match=f"the {rule} of reward 'flat' over 12 images is 0"):
            task(rule, reward_of(gray) + flat).weigh()
    endless = reward_of(lambda images, prompts: gray(images, prompts) / 0, name="endless")
    with pytest.raises(UserError, match="of reward 'endless' over 12 images is nan"):
        task("deviation", reward_of(gray) + endless).weigh()


def test_a_checkpoint_from_before_balance_restores() -> None:
    ours = task("none")
    ours.update()
    tensors, state = ours.state()
    del state["sizes"]
    again = replace(ours, sizes={"gray": 1.0})
    again.restore(tensors, state)
    assert not again.sizes and again.step == 1


def test_an_evaluation_measures_what_was_raised(tmp_path: Path, chainrule: Callable[..., SimpleNamespace]) -> None:
    """The sum by hand, with the weights of the log, over the terms that are measured one by one."""
    make_pipeline(dtype=torch.float32).save_pretrained(tmp_path / "sd")
    reward, common = "symmetry + 3*rotation", ["--prompts", "animals:test", "--seeds", 1, "--steps", 2]
    train = ["train", "--model", tmp_path / "sd", "--reward", reward, "--balance", "deviation", "--updates", 2, "--batch", 2]
    assert not chainrule(*train, "--sample-steps", 2, "--rank", 2, "--sample-every", 0, "--out", tmp_path / "run").code
    said = chainrule("eval", tmp_path / "run", *common)
    weights = cr.Run(tmp_path / "run").metrics()[-1]["weights"]
    assert said.code == 0 and f"{reward} is measured as it was balanced: {weights['symmetry']:.4g} of symmetry" in said.out
    one_by_one = ["--reward", "symmetry", "--reward", "rotation", "--out", tmp_path / "terms"]
    assert not chainrule("eval", tmp_path / "run", *common, *one_by_one).code
    whole, terms = (json.loads((tmp_path / name / "evaluation.json").read_text())["rows"] for name in ("run", "terms"))
    for row, own in zip(whole, terms, strict=True):
        by_hand = sum(weights[name] * own["metrics"][name]["mean"] for name in weights)
        assert row["metrics"][reward]["mean"] == pytest.approx(by_hand, rel=1e-4)
    assert weights["rotation"] != 3
    # asked for by name, it is the sum as it is written, and not the scores that are there
    assert not chainrule("eval", tmp_path / "run", *common, "--reward", reward).code
    asked = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    for row, own in zip(asked, terms, strict=True):
        plain = own["metrics"]["symmetry"]["mean"] + 3 * own["metrics"]["rotation"]["mean"]
        assert row["metrics"][reward]["mean"] == pytest.approx(plain, rel=1e-4)
