"""What every task of the loop must do: go on bit for bit, skip bad updates, stop when asked, leave a result that loads."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file
from students import student_file
from torch import Tensor
from tuned import Judge

import chainrule as cr
from chainrule import loop
from chainrule.config import FinetuneConfig
from chainrule.distill import DistillTask
from chainrule.loop import STOPS, Listener, Row, Task, complete, load_checkpoint
from chainrule.methods import DPG, GRPO, SDO, Method, ShortFT
from chainrule.objective import Objective
from chainrule.rewards import reward_of
from chainrule.settings import Distillation, Finetuning, Steering
from chainrule.steer.kinds import Over
from chainrule.steer.search import Batch
from chainrule.steer.task import SteerTask
from chainrule.training import FinetuneTask

PROMPTS, UPDATES = ["a fox", "two bees", "a cat"], 5


def gray(images: Tensor, prompts: object) -> Tensor:
    return -(images - 0.5).square().mean((1, 2, 3))


def endless(images: Tensor, prompts: object) -> Tensor:
    return gray(images, prompts) * float("inf")


def steep(images: Tensor, prompts: object) -> Tensor:
    """Finite, but its gradient is not."""
    return gray(images, prompts) + (images - images.detach()).flatten(1).sum(1).sqrt()


def model() -> cr.Model:
    return cr.load(make_pipeline(dtype=torch.float32))


def tuning(method: Method, net: cr.Model, reward: Any = gray, learn: str = "adapter") -> FinetuneTask:
    settings = Finetuning(
        updates=UPDATES, batch=2, accumulate=2, sample_steps=3, guidance=2.0, rank=2, lr=1e-2, ema=0.9, schedule="sqrt", learn=learn
    )
    return FinetuneTask.start(net, method, reward_of(reward), PROMPTS, settings)


def distilling() -> DistillTask:
    settings = Distillation(updates=UPDATES, batch=2, starts=2, student_steps=2, teacher_steps=4, rank=2, guidance=2.0, lr=5e-3)
    return DistillTask.start(model(), PROMPTS, settings)


def rewarded(reward: Callable[..., Tensor]) -> Callable[[Any], Callable[[], None]]:
    """Give a task this reward; the value gives it back its own."""

    def spoil(task: FinetuneTask) -> Callable[[], None]:
        own, task.reward = task.reward, reward_of(reward)
        return lambda: setattr(task, "reward", own)

    return spoil


def nothing(task: DistillTask) -> Callable[[], None]:
    """Let a student answer NaN; the value gives the task its own back."""
    own = task.student

    @dataclass(frozen=True)
    class Lost:
        def __call__(self, *arguments: Any) -> Tensor:
            return own(*arguments) * float("nan")

    task.student = Lost()
    return lambda: setattr(task, "student", own)


def steered(reward: Callable[..., Tensor]) -> Callable[[Any], Callable[[], None]]:
    """Give the batch under way this reward after its first update; the value gives it back its own."""

    def spoil(task: SteerTask) -> Callable[[], None]:
        if task.search is None:
            task.update()
        assert task.search is not None
        search, own = task.search, task.search.problem
        search.problem = replace(own, objective=Objective.of(reward))
        return lambda: setattr(search, "problem", own)

    return spoil


@dataclass(frozen=True)
class Case:
    """`make` a fresh task in a folder for what it needs; `spoil` it so that its updates are not finite, until undone."""

    make: Callable[[Path], Any]
    spoil: Callable[[Any], Callable[[], None]]
    steps: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the rows that a finished run leaves; steering's curve starts before the first


def staged(folder: Path) -> FinetuneTask:
    return tuning(ShortFT(k=3), model().with_student(student_file(folder / "student", torch.float32)))


def steering(over: str, gradient: str = "sdo") -> SteerTask:
    settings = Steering(over=over, gradient=gradient, updates=UPDATES, lr=0.05, batch=2, sample_steps=3, guidance=2.0, rank=2)
    return SteerTask.start(model(), reward_of(gray), settings, Over.parse(over), Batch(PROMPTS[:2], [3, 4]))


CURVE = (0, 1, 2, 3, 4, 5)
CASES = {
    "fine-tuning": Case(lambda folder: tuning(SDO(), model()), rewarded(endless)),
    "fine-tuning in stages": Case(staged, rewarded(steep)),
    "learning the sampler": Case(lambda folder: tuning(SDO(), model(), learn="guidance,negative"), rewarded(endless)),
    "fine-tuning by likelihoods": Case(lambda folder: tuning(GRPO(group=2), model().solving("sde")), rewarded(endless)),
    "fine-tuning by a critic": Case(lambda folder: tuning(DPG(rank=2), model(), Judge()), rewarded(endless)),
    "distilling": Case(lambda folder: distilling(), nothing),
    "steering latents": Case(lambda folder: steering("latent"), steered(endless), CURVE),
    "steering prompts": Case(lambda folder: steering("prompt", "full"), steered(steep), CURVE),
    "steering weights": Case(lambda folder: steering("weights"), steered(endless), CURVE),
}
tasks = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def state(task: Task) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, rest = task.state()
    return {name: value.detach().clone() for name, value in tensors.items()}, rest


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def at(step: int, do: Callable[[], object]) -> Listener:
    """Do something after one of the updates."""
    return Listener(updated=lambda row: do() and None if row["step"] == step else None)


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@tasks
def test_some_updates_and_the_rest_in_a_new_task_are_all_of_them(case, tmp_path):
    whole, first, second = (case.make(tmp_path / str(i)) for i in range(3))
    rows = [whole.update() for _ in range(UPDATES)]
    split = [first.update() for _ in range(3)]
    second.restore(*state(first))
    split += [second.update() for _ in range(UPDATES - 3)]
    assert timeless(rows) == timeless(split)
    assert same(whole.state()[0], second.state()[0]) and whole.state()[1] == second.state()[1]
    assert not same(first.state()[0], second.state()[0])


@tasks
def test_a_run_that_was_killed_goes_on_from_its_checkpoint_to_the_same_end(case, tmp_path):
    whole, cut = (cr.Run.create(tmp_path / name, FinetuneConfig()) for name in ("whole", "cut"))
    complete(case.make(tmp_path / "1"), whole)
    with pytest.raises(Killed):
        complete(case.make(tmp_path / "2"), cut, save_every=2, listeners=[at(4, kill)])  # before step 4 is saved
    assert [row["step"] for row in cut.metrics()] == [1, 2, 3]
    assert complete(case.make(tmp_path / "3"), cut, save_every=2, resume=True) == "finished"
    for file in [*whole.adapter.rglob("*.safetensors"), whole.checkpoint(UPDATES) / "state.safetensors"]:
        assert same(load_file(file), load_file(cut.folder / file.relative_to(whole.folder)))
    assert timeless(cut.metrics()) == timeless(whole.metrics()) and [row["step"] for row in cut.metrics()] == [*case.steps]
    assert [path.name for path in cut.checkpoints()] == ["step-000004", "step-000005"]


@tasks
def test_rows_have_what_the_log_promises(case, tmp_path):
    task = case.make(tmp_path)
    row = task.update()
    assert {"step", task.watched, "grad_norm", "lr", "seconds", "skipped"} <= row.keys()
    assert row["step"] == task.step == 1 and row["skipped"] == 0 and row["seconds"] > 0
    assert task.total == UPDATES and task.batch == 2 and task.label


@tasks
def test_an_update_that_is_not_finite_moves_nothing_and_is_counted(case, tmp_path):
    task = case.make(tmp_path)
    task.update()
    before, mend = state(task)[0], case.spoil(task)
    row = task.update()
    assert row["skipped"] == 1 and row["step"] == 2 and same(before, state(task)[0])
    mend()
    assert task.update()["skipped"] == 1 and not same(before, state(task)[0])


@tasks
def test_too_many_in_a_row_stop_the_loop_with_the_last_good_state_kept(case, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "BAD_IN_A_ROW", 3)
    task, run = case.make(tmp_path / "1"), cr.Run.create(tmp_path / "run", FinetuneConfig())
    task.settings = task.settings.model_copy(update={"updates": 50})
    good: list[dict[str, Tensor]] = []

    def spoil() -> None:
        good.append(state(task)[0])
        case.spoil(task)

    with pytest.raises(cr.UserError, match=r"the last updates, 3 times, .* lower lr") as caught:
        complete(task, run, listeners=[at(2, spoil)])
    assert "\n" not in str(caught.value) and len(run.metrics()) == 2 + 3
    again = case.make(tmp_path / "2")
    load_checkpoint(run, again)
    assert same(again.state()[0], good[0]) and again.step == 2 + 3
    assert list(run.adapter.rglob("*.safetensors")) or list(run.folder.glob("images/*.png"))


@pytest.mark.parametrize(
    ("case", "number"),
    [
        *((case, signal.SIGTERM) for case in CASES.values()),
        *((CASES["distilling"], number) for number in STOPS if number != signal.SIGTERM),
    ],
    ids=[*(f"{name}-SIGTERM" for name in CASES), *(f"distilling-{number.name}" for number in STOPS if number != signal.SIGTERM)],
)
def test_a_signal_leaves_a_checkpoint_and_a_result_that_load(case, number, tmp_path):
    task, run = case.make(tmp_path / "1"), cr.Run.create(tmp_path / "run", FinetuneConfig())
    before, ended = [signal.getsignal(each) for each in STOPS], []
    listeners = [at(2, lambda: os.kill(os.getpid(), number)), Listener(finished=ended.append)]
    assert complete(task, run, listeners=listeners) == "interrupted" == ended[0]
    assert [signal.getsignal(each) for each in STOPS] == before
    assert (run.folder / "stopped.txt").read_text() == "interrupted at update 2\n" and len(run.metrics()) == 2
    files = list(run.adapter.rglob("*.safetensors"))
    assert (files or list(run.folder.glob("images/*.png"))) and all(
        value.isfinite().all() for file in files for value in load_file(file).values()
    )
    again = case.make(tmp_path / "2")
    assert complete(again, run, resume=True) == "finished" and [row["step"] for row in run.metrics()] == [*case.steps]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run, asked = cr.Run.create(tmp_path / "run", FinetuneConfig()), []

    def ask(row: Row) -> None:
        asked.append(row["step"])
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        complete(distilling(), run, listeners=[Listener(updated=ask)])
    assert asked == [1] and not run.checkpoints() and not run.adapter.exists()


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []
    listener = Listener(started=lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=lambda: seen.append(complete(distilling(), listeners=[listener])))
    thread.start()
    thread.join()
    assert seen == [before, "finished"]


def test_a_listener_may_add_to_a_row_and_stop_the_loop(tmp_path):
    run = cr.Run.create(tmp_path / "run", FinetuneConfig())

    def enough(row: Row) -> str | None:
        row["held_out"] = 0.5
        return "enough is enough" if row["step"] == 3 else None

    assert complete(distilling(), run, listeners=[Listener(updated=enough)]) == "enough is enough"
    assert [row["held_out"] for row in run.metrics()] == [0.5] * 3 and run.checkpoint(3).is_dir()
    assert (run.folder / "stopped.txt").read_text() == "enough is enough at update 3\n"
