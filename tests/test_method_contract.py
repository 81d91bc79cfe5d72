"""What every method must do, over one list of all of them; and methods of one's own, with options of every type, from a file."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from pipelines import make_pipeline

import chainrule as cr
from chainrule import methods
from chainrule.methods import (
    DDPO,
    DPG,
    GRPO,
    SDO,
    AlignProp,
    DRaFT,
    DRaFTLV,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    Method,
    Needs,
    Pathwise,
    ReFL,
    ShortFT,
    needs,
    stages,
)  # fmt: skip
from chainrule.plan import Grad, Grid, Jump, Plan, leading, walk

METHODS: list[Method] = [
    DRaFT(), DRaFT(3), DRaFTLV(), DRaFTLV(n=1, reuse_reward_gradient=True), ReFL(m=4), ReFL(m=4, guided=False), AlignProp(),
    AlignProp(last_only=True), DRTune(k=3, m=2), SDO(), SDO(samples=3), ShortFT(), ShortFT(k=3, shared=True), ShortFT(k=3, stage=2),
    ShortFT(k=3, stage=3), ShortFT(k=2, depth=2), ShortFT(shortcuts=()), ShortFT(k=6), ShortFT(k=6, stage=2), DPG(), DDPO(),
    FlowBPSparse(),    DDPO(reuse=4, calls=2), GRPO(group=3), FlowBPBridge(), FlowBPLagrange(), LeapAlign(), SDO(samples=3, late=2),
]  # fmt: skip
GRIDS: dict[str, Grid] = {
    "sd50": leading(50),
    "ten": tuple(range(1000, -1, -100)),
    "six": (600, 500, 400, 300, 200, 100, 0),
    "flow": tuple(3000 * t / (12 + 2 * t) for t in range(12, -1, -1)),  # sigmas shifted as SD 3 shifts them
}
DRAWS = 200


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return GRIDS[request.param]


def drawn(method: Method, grid: Grid) -> list[Plan]:
    return [method.plan(grid, Random(seed)) for seed in range(DRAWS)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_plan_starts_where_the_chain_starts_calls_at_its_levels_and_teaches_something(method: Method, grid: Grid) -> None:
    for stage in stages(method):
        for plan in drawn(stage, grid):
            assert plan.jumps[0].start == grid[0]
            assert {jump.start for jump in plan.jumps if not jump.up} <= set(grid[:-1])
            assert {jump.stop for jump in plan.jumps} <= set(grid)
            assert plan.calls(Grad.WEIGHTS, Grad.FULL) > 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_same_random_state_draws_the_same_plan(method: Method, grid: Grid) -> None:
    assert [method.plan(grid, Random(7)) for _ in range(2)] == [method.plan(list(grid), Random(7))] * 2


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_members_a_method_names_are_those_its_plans_jump_by(method: Method, grid: Grid) -> None:
    seen = []
    for stage in stages(method):
        seen.append({jump.via for plan in drawn(stage, grid) for jump in plan.jumps} - {"base"})
        assert set(needs(stage, grid).members) == seen[-1]
    assert set(needs(method, grid).members) == set().union(*seen)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_answers_for_its_stages_which_share_its_adapters(method: Method, grid: Grid) -> None:
    whole, each = needs(method, grid), [needs(stage, grid) for stage in stages(method)]
    assert all(one.adapters == whole.adapters for one in each)
    assert set(whole.trained) == {name for one in each for name in one.trained} <= set(whole.adapters)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_adapter_that_is_trained_is_on_in_a_live_call(method: Method, grid: Grid) -> None:
    for stage in stages(method):
        own = needs(stage, grid)
        live = {
            jump.start for plan in drawn(stage, grid) for jump in plan.jumps if jump.via != "student" and jump.grad is not Grad.NONE
        }
        for name in own.trained:
            spans = own.adapters[name]
            on = {x for x in live if spans is None or any(low < x and (high is None or x <= high) for low, high in spans)}
            assert on, name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_is_written_to_yaml_so_that_it_can_be_read_again(method: Method) -> None:
    assert methods.read(yaml.safe_load(yaml.safe_dump(methods.spelled(method)))) == method


@pytest.mark.parametrize("method", [DRaFT(8), ReFL(m=8), DRTune(k=8, m=1), DRTune(k=1, m=8), SDO(8), ShortFT(8)], ids=str)
def test_a_chain_that_is_too_short_is_refused_before_its_levels_are_known(method: Method) -> None:
    with pytest.raises(cr.UserError, match=r"^\w+ is 8, but must be between 1 and 4$"):
        needs(method, leading(4))


def test_levels_by_name_are_refused_by_the_plan_and_not_by_the_needs() -> None:
    method = ShortFT(levels=(800, 100))
    assert needs(method, leading(50)).members == ("student",)
    with pytest.raises(cr.UserError, match="levels has 800, but no call of this 50-step grid starts there; the nearest is 802"):
        method.plan(leading(50), Random(0))


# A method of one's own


@dataclass(frozen=True)
class Bare:
    """Says nothing but its plan, which jumps by a member of one's own."""

    def plan(self, grid: Grid, rng: Random) -> Plan:
        return Plan(walk(grid[:-2]), ((Jump(grid[-3], grid[-2], "mine", Grad.FULL), Jump(grid[-2], 0, grad=Grad.FULL)),))


def test_a_method_that_says_nothing_trains_one_adapter_that_is_on_everywhere() -> None:
    assert needs(Bare(), leading(4)) == Needs((), {"default": None}, ("default",), Pathwise())
    assert stages(Bare()) == (Bare(),)


def test_a_call_of_another_member_is_drawn_as_such_whatever_its_name() -> None:
    assert str(Bare().plan(leading(4), Random(0))) == "--[>#]"
    assert str(ReFL(m=1, guided=False).plan(leading(4), Random(0))) == "---[#]"  # the model itself, without guidance


def test_an_adapter_that_is_trained_must_be_one_of_the_methods_own() -> None:
    with pytest.raises(ValueError, match="trained are"):
        Needs(adapters={"early": None}, trained=("late",))


@dataclass(frozen=True)
class Two:
    """The last step, with two adapters, one of which is trained."""

    def needs(self, grid: Grid) -> Needs:
        return Needs(adapters={"always": None, "late": ((0, grid[-2]),)}, trained=("late",))

    def plan(self, grid: Grid, rng: Random) -> Plan:
        return DRaFT(1).plan(grid, rng)


def test_the_adapters_a_method_asks_for_are_made_trained_saved_and_loaded_back(tmp_path: Path) -> None:
    net, prompts = cr.load(make_pipeline(dtype=torch.float32)), ["a fox", "two bees"]
    small = {"steps": 3, "batch": 2, "lr": 1e-2, "rank": 2, "sample_steps": 3, "guidance": 2.0, "sample_every": 0}
    run = cr.finetune(net, Two(), lambda images, _: images.mean((1, 2, 3)), prompts, out=tmp_path / "run", **small)
    kept = json.loads((run.adapter / "bands.json").read_text())
    assert kept == {"always": {"levels": None}, "late": {"levels": [[0, net.grid(3)[-2]]]}}
    moved = {}
    for name in kept:
        weights = cr.adapters.files.read(run.adapter / name).tensors
        moved[name] = any(bool(w.any()) for key, w in weights.items() if ".lora_B." in key)
    assert moved == {"always": False, "late": True}
    fresh = cr.load(make_pipeline(dtype=torch.float32))
    before = fresh.render(prompts, [0, 1], 3, 2.0)
    assert not torch.equal(fresh.using(run.folder).render(prompts, [0, 1], 3, 2.0), before)


MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from random import Random
from typing import Literal
from chainrule.methods import DRaFT
from chainrule.plan import Grid, Plan

@dataclass(frozen=True)
class Mine:
    """Options of every type."""
    rate: float
    label: str = "a"
    kind: Literal["near", "far"] = "near"
    levels: tuple[float, ...] = ()
    spans: tuple[tuple[float, float], ...] = ()
    pair: tuple[int, str] = (1, "x")
    strict: bool = False
    most: int | None = 3

    def plan(self, grid: Grid, rng: Random) -> Plan:
        return DRaFT(self.most).plan(grid, rng)

@dataclass(frozen=True)
class Planless:
    k: int = 1

@dataclass(frozen=True)
class Lost:
    k: Nowhere = 1

class Plain:
    pass
'''
OPTIONS = {
    "rate": 0.5, "label": "5", "kind": "far", "levels": [762, 2.5], "spans": [[742, 502], [3, 1]], "pair": [4, "y"], "strict": True,
    "most": None,
}  # fmt: skip


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of methods, entered."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAME = "parts/mine.py:Mine"


def test_options_of_every_type_are_read_and_written_back(mine: Path) -> None:
    method = methods.make(NAME, OPTIONS)
    assert vars(method) == {
        "rate": 0.5, "label": "5", "kind": "far", "levels": (762.0, 2.5), "spans": ((742.0, 502.0), (3.0, 1.0)), "pair": (4, "y"),
        "strict": True, "most": None,
    }  # fmt: skip
    assert methods.spelled(method) == {"name": NAME, **OPTIONS}
    assert methods.read(yaml.safe_load(yaml.safe_dump(methods.spelled(method)))) == method
    direct = type(method)(rate=2, levels=(762, 2))  # from Python, by its own class
    assert methods.read(methods.spelled(direct)) == direct and methods.spelled(direct)["levels"] == [762, 2]


def test_the_command_line_reads_the_same_options(mine: Path, chainrule) -> None:
    words = [f"{key}={json.dumps(value)}" for key, value in OPTIONS.items()]
    found = chainrule("plan", NAME, "--steps", 4, *(word for pair in words for word in ("--method-option", pair)))
    assert found.code == 0, found.err
    assert found.out.splitlines()[:2] == [repr(methods.make(NAME, OPTIONS)), "[####]"]


def test_a_number_without_a_point_is_a_number_where_one_is_wanted(mine: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    made = methods.make(NAME, yaml.safe_load("{rate: 1e-3, levels: [1e2, 3], label: 1e-3}"))
    assert (made.rate, made.levels, made.label) == (1e-3, (100.0, 3.0), "1e-3")


def test_a_run_by_a_method_from_a_file_says_so_in_its_config_which_trains_it_again(mine: Path, sd_folder: Path, chainrule) -> None:
    small = f"--model {sd_folder} --reward symmetry --prompts two.txt --steps 1 --batch 1 --sample-steps 3 --rank 1 --guidance 1"
    Path("two.txt").write_text("a fox\na cat\n")
    found = chainrule(*shlex.split(f"train {small} --out run --method {NAME} --method-option rate=0.5 --method-option most=2"))
    assert found.code == 0, found.err
    said = yaml.safe_load(Path("run/config.yaml").read_text())["method"]
    assert said == {"name": NAME, "rate": 0.5, "most": 2} and Path("run/plan.txt").read_text() == "-[##]\n"
    refused = chainrule("train", "run/config.yaml", "--out", "again")
    assert refused.code == 2 and f"names code to run, method: {NAME}; read it, then pass --allow-code" in refused.err
    found = chainrule("train", "run/config.yaml", "--allow-code", "--out", "again")
    assert found.code == 0, found.err
    assert torch.equal(*(torch.cat([w.flatten() for w in cr.adapters.files.read(f).tensors.values()]) for f in ("run", "again")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {}, "method parts/mine.py:Mine needs the option rate"),
        (NAME, {"rate": "5"}, "option rate of parts/mine.py:Mine is '5', but must be a number"),
        (NAME, {"rate": True}, "is True, but must be a number"),
        (NAME, {"rate": 1, "label": 5}, "option label of parts/mine.py:Mine is 5, but must be text"),
        (NAME, {"rate": 1, "kind": "nera"}, "is 'nera', but must be 'near' or 'far'"),
        (NAME, {"rate": 1, "levels": 3}, "is 3, but must be a list of numbers"),
        (NAME, {"rate": 1, "spans": [[1, 2, 3]]}, "is [[1, 2, 3]], but must be a list of pairs of numbers"),
        (NAME, {"rate": 1, "pair": ["x", 1]}, "is ['x', 1], but must be a list of a whole number, text"),
        (NAME, {"rate": 1, "strict": 0}, "is 0, but must be true or false"),
        (NAME, {"rate": 1, "most": 2.0}, "is 2.0, but must be a whole number or null"),
        (NAME, {"rat": 1}, "unknown option of parts/mine.py:Mine 'rat'; did you mean 'rate'?"),
        ("parts/mine.py:Mein", {}, "unknown class of parts/mine.py 'Mein'; did you mean 'Mine'? (known: Lost, Mine, Pl"),
        ("parts/mine.py:Planless", {}, "has no plan, but a method must have one"),
        ("parts/mine.py:Plain", {}, "parts/mine.py:Plain is no dataclass, but a method must be one"),
        ("parts/mine.py:Lost", {"k": 1}, "the types of the options of Lost cannot be read: name 'Nowhere' is not defined"),
        ("parts/mine.py", {}, "say which class of 'parts/mine.py' is the method, as parts/mine.py:NAME"),
        ("nowhere.py:Mine", {}, "no method file 'nowhere.py'"),
        ("broken.py:Mine", {}, "method file 'broken.py' failed to run: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_bad_option_or_file_is_one_line_that_says_what_it_must_be(mine: Path, name: str, options: dict, message: str) -> None:
    with pytest.raises(cr.UserError) as caught:
        methods.make(name, options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_run_again_only_when_it_was_changed(mine: Path) -> None:
    first = methods.make(NAME, {"rate": 1})
    assert type(methods.make(NAME, {"rate": 2})) is type(first)
    changed = Path("parts/mine.py")
    changed.write_text(MINE.replace("rate: float", "speed: float"))
    assert vars(methods.make(NAME, {"speed": 1}))["speed"] == 1.0
