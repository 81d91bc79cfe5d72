"""Every method's plan, against the drawings and formulas of its paper; and what a plan is forecast to cost."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from chainrule import methods
from chainrule.errors import UserError
from chainrule.methods import SDO, AlignProp, DRaFT, DRaFTLV, DRTune, ReFL
from chainrule.plan import Forecast, Grad, Jump, Plan, walk

FOUR = (80, 60, 40, 20, 0)
TEN = tuple(range(1000, -1, -100))


def live(plan: Plan) -> list[int]:
    """Which calls of the first path reach the weights."""
    return [i for i, jump in enumerate(plan.trunk + plan.branches[0]) if jump.grad is not Grad.NONE]


@pytest.mark.parametrize(
    ("method", "drawing"),
    [
        (DRaFT(), "[####]"),
        (DRaFT(1), "---[#]"),
        (DRaFT(3), "-[###]"),
        (DRaFT(4), "[####]"),
        (DRaFTLV(), "---[#|^#|^#]"),
        (DRaFTLV(n=1), "---[#|^#]"),
        (DRaFTLV(n=3, reuse_reward_gradient=True), "---[#|^#|^#|^#]"),
        (ReFL(m=1), "---[#]"),
        (AlignProp(last_only=True), "---[#]"),
        (DRTune(k=4, m=1), "[====]"),
        (SDO(samples=4), "[#===]"),
    ],
    ids=str,
)
def test_a_method_without_a_choice_draws_one_plan(method, drawing):
    assert {str(method.plan(FOUR, Random(seed))) for seed in range(20)} == {drawing}


def test_draft_walks_the_grid_and_ends_with_the_samplers_own_step():
    plan = DRaFT(2).plan(FOUR, Random(0))
    assert plan.trunk == (Jump(80, 60), Jump(60, 40))
    assert plan.branches == ((Jump(40, 20, grad=Grad.FULL), Jump(20, 0, grad=Grad.FULL, finish=True)),)


def test_draft_lv_noises_to_the_last_level_and_predicts_the_image_again():
    plan = DRaFTLV(n=2).plan(FOUR, Random(0))
    copy = (Jump(0, 20), Jump(20, 0, grad=Grad.FULL))
    assert plan.branches == ((Jump(20, 0, grad=Grad.FULL, finish=True),), copy, copy)
    assert not plan.reuse_reward_gradient
    assert DRaFTLV(reuse_reward_gradient=True).plan(FOUR, Random(0)).reuse_reward_gradient


@pytest.mark.parametrize("m", [1, 4, 10])
def test_refl_stops_at_each_of_the_last_m_calls_and_nowhere_else(m):
    plans = [ReFL(m=m).plan(TEN, Random(seed)) for seed in range(300)]
    assert {len(plan.trunk) for plan in plans} == set(range(10 - m, 10))
    for plan in plans:
        at = TEN[len(plan.trunk)]
        assert plan.trunk == walk(TEN[: len(plan.trunk) + 1])
        assert plan.branches == ((Jump(at, 0, "base", Grad.FULL),),)  # the clean prediction: no finish


def test_refl_without_guidance_differs_in_who_answers_the_trained_call():
    for seed in range(20):
        guided, plain = (ReFL(m=4, guided=guided).plan(TEN, Random(seed)) for guided in (True, False))
        assert plain.trunk == guided.trunk
        assert [jump.via for (jump,) in plain.branches] == ["unguided"]
        assert [jump.via for (jump,) in guided.branches] == ["base"]


def test_alignprop_truncates_uniformly_over_the_chain():
    counts = Counter(len(live(AlignProp().plan(TEN, rng))) for rng in [Random(0)] for _ in range(5000))
    assert counts.keys() == set(range(1, 11))
    assert all(abs(count - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5 for count in counts.values())


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 3), (3, 2), (5, 5), (10, 1), (4, 10)])
def test_drtune_trains_equally_spaced_calls_and_stops_among_the_last_m(k, m):
    lengths, offsets, stride = set(), set(), 10 // k
    for seed in range(400):
        plan = DRTune(k=k, m=m).plan(TEN, Random(seed))
        (path,) = plan.branches
        assert not plan.trunk
        assert [jump.start for jump in path] == list(TEN[: len(path)])
        assert path[-1].stop == 0
        assert not path[-1].finish
        calls = live(plan)
        assert {b - a for a, b in pairwise(calls)} <= {stride}
        assert calls[0] < stride  # the offset
        assert calls == [i for i in range(calls[0], calls[0] + k * stride, stride) if i < len(path)]
        assert all(path[i].grad is Grad.WEIGHTS for i in calls)
        lengths.add(len(path))
        offsets.add(calls[0])
    assert offsets == set(range(stride))
    assert lengths == set(range(11 - m, 11))


def test_drtune_never_stops_before_its_first_trained_call():
    for seed in range(300):
        assert len(live(DRTune(k=1, m=10).plan(TEN, Random(seed)))) == 1


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_sdo_keeps_one_call_drawn_uniformly(steps):
    grid, rng = tuple(range(steps, -1, -1)), Random(0)
    counts = Counter()
    for _ in range(400 * steps):
        plan = SDO().plan(grid, rng)
        (call,) = live(plan)
        counts[call] += 1
        (path,) = plan.branches
        assert path[call].grad is Grad.FULL
        assert tuple(Jump(j.start, j.stop, finish=j.finish) for j in path) == walk(grid)
    assert counts.keys() == set(range(steps))
    assert all(abs(count - 400) < 5 * 20 for count in counts.values())  # 20: the standard deviation, at most


def test_sdo_with_samples_opens_the_input_of_the_first_call_only():
    rng, seen = Random(0), set()
    for _ in range(2000):
        (path,) = SDO(samples=3).plan(TEN, rng).branches
        calls = [i for i, jump in enumerate(path) if jump.grad is not Grad.NONE]
        assert [path[i].grad for i in calls] == [Grad.FULL, Grad.WEIGHTS, Grad.WEIGHTS]
        seen.add(tuple(calls))
    assert len(seen) == 120  # 10 choose 3: every set of three calls


@pytest.mark.parametrize(
    ("made", "value"),
    [
        (("draft", {}), DRaFT()),
        (("DRaFT", {"k": 5}), DRaFT(5)),
        (("draft-5", None), DRaFT(5)),
        (("draft", {"k": None}), DRaFT()),
        (("draft_lv", {"n": 4, "reuse_reward_gradient": True}), DRaFTLV(4, True)),
        (("refl", {"m": 3, "guided": False}), ReFL(3, False)),
        (("alignprop", {}), AlignProp()),
        (("alignprop-1", {}), AlignProp(True)),
        (("drtune", {"k": 2, "m": 3}), DRTune(2, 3)),
        (("sdo", {"samples": 2}), SDO(2)),
    ],
    ids=str,
)
def test_a_method_by_name(made, value):
    assert methods.make(*made) == value


@pytest.mark.parametrize("name", methods.REGISTRY)
def test_every_named_method_can_be_made_and_described_with_its_drawing(name):
    assert str(methods.make(name).plan(tuple(range(50, -1, -1)), Random(0))).endswith("]")
    assert re.fullmatch(r"[A-Z].*[.] `-*\[[-=~#+.>^|]+\]`", methods.describe(name))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dratf", {}, "unknown method 'dratf'; did you mean 'draft'"),
        ("sd0", {}, "did you mean 'sdo'"),
        ("draft-x", {}, "unknown method 'draft-x'"),
        ("draft-²", {}, "unknown method 'draft-²'"),
        ("draft-0", {}, "k is 0, but must be at least 1"),
        ("draft", {"kk": 3}, "unknown option of draft 'kk'; did you mean 'k'"),
        ("draft", {1: 3}, "unknown option of draft '1'"),
        ("draft", {"k": "5"}, "option k of draft is '5', but must be a whole number or null"),
        ("draft", {"k": True}, "option k of draft is True"),
        ("draft", {"k": -1}, "k is -1"),
        ("draft-lv", {"n": 0}, "n is 0"),
        ("draft-lv", {"n": None}, "option n of draft-lv is None"),
        ("draft-lv", {"reuse_reward_gradient": 1}, "reuse_reward_gradient of draft-lv is 1, but must be true or false"),
        ("refl", {"m": 0}, "m is 0"),
        ("drtune", {"k": 0}, "k is 0"),
        ("drtune", {"m": 2.0}, "option m of drtune is 2.0"),
        ("sdo", {"samples": 0}, "samples is 0"),
    ],
)
def test_a_bad_name_or_option_is_named_in_one_line(name, options, message):
    with pytest.raises(UserError) as caught:
        methods.make(name, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [DRaFT(5), ReFL(m=5), DRTune(k=5, m=1), DRTune(k=1, m=5), SDO(5)], ids=str)
def test_a_method_that_wants_more_calls_than_the_chain_has_is_refused(method):
    with pytest.raises(UserError, match="is 5, but must be between 1 and 4"):
        method.plan(FOUR, Random(0))


@pytest.mark.parametrize(
    ("method", "recompute", "cost"),
    [
        # forward passes: 10 of sampling, + 1 backward, + 1 recomputed
        (DRaFT(1), True, Forecast(calls=10, backward=1, relative_time=12 / 10, graphs=1)),
        (DRaFT(1), False, Forecast(calls=10, backward=1, relative_time=11 / 10, graphs=1)),
        # 10 of sampling and 2 copies, 3 of them live
        (DRaFTLV(2), True, Forecast(calls=12, backward=3, relative_time=18 / 12, graphs=1)),
        (DRaFTLV(2), False, Forecast(calls=12, backward=3, relative_time=15 / 12, graphs=1)),
        (DRaFT(), True, Forecast(calls=10, backward=10, relative_time=3.0, graphs=1)),
        (DRaFT(), False, Forecast(calls=10, backward=10, relative_time=2.0, graphs=10)),
    ],
    ids=str,
)
def test_a_forecast_is_what_one_counts_by_hand(method, recompute, cost):
    assert Forecast.of(method.plan(TEN, Random(0)), recompute=recompute) == cost


@pytest.mark.parametrize(
    ("trunk", "branches", "message"),
    [
        ((Jump(2, 1),), (), "needs a branch"),
        ((Jump(2, 1, grad=Grad.FULL),), ((Jump(1, 0),),), "without gradient"),
        ((Jump(2, 1),), ((),), "end at level 0"),
        ((Jump(3, 2),), ((Jump(2, 1),),), "end at level 0"),
        ((Jump(3, 2),), ((Jump(1, 0),),), "gap"),
        ((), ((Jump(2, 2), Jump(2, 0)),), "change the level"),
    ],
)
def test_a_plan_that_cannot_be_walked_is_refused(trunk, branches, message):
    with pytest.raises(ValueError, match=message):
        Plan(trunk, branches)
