"""A network in shards is the whole network: the same images, gradients and runs, from a part of its weights on each process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from families import CASES, SEEDS, said, shaken
from faults.trial import Started, together
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import chainrule as cr
from chainrule import methods
from chainrule.baselines import BestOf, Templated
from chainrule.footprint import POLICIES, count, in_shards
from chainrule.models.outline import outline
from chainrule.offload import blocks_of
from chainrule.processes import Processes, Round
from chainrule.rewards import reward_of
from chainrule.settings import Finetuning

FAMILIES = ("sd", "sd3", "flux")
MEMORY = ("recompute", "blocks", "keep")
PROMPTS = ["a fox", "two bees", "a cat"]


def gray(images: Tensor, prompts: object) -> Tensor:
    return -(images - 0.5).square().mean((1, 2, 3))


bright = reward_of(lambda images, prompts: images.mean((1, 2, 3)), name="bright")


def opened(folder: Path, name: str, network: str, shards: int | None = None) -> cr.Model:
    return cr.load(folder / name, dtype="float64", size=CASES[name].size, network=network, shards=shards)


def gradient(model: cr.Model, name: str, memory: str) -> Tensor:
    """Of an adapter that is put in, and taken out again. SDO has calls without a graph after the one with it."""
    case, adapter = CASES[name], shaken(model)
    plan = methods.SDO().plan(model.grid(3), Random(0))
    cr.gradient(model, plan, bright, said(case), SEEDS, guidance=case.guidances[-1], memory=memory)
    found = torch.cat([weight.grad.flatten() for weight in adapter.parameters() if weight.grad is not None])
    model.drop(adapter)
    return found


def held(parts: Iterable[torch.nn.Module]) -> int:
    """The bytes that this process really holds of these modules."""
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    stored = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({each.data_ptr(): each.nbytes() for each in stored}.values())


def watched(model: cr.Model) -> list[int]:
    """Gets, whenever a block answers, how many blocks are whole then."""
    blocks, found = blocks_of(model.network), list[int]()

    def look(*_: object) -> None:
        found.append(sum(not any(isinstance(weight, DTensor) for weight in block.parameters()) for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(look)
    return found


def look_at_families(folder: Path, out: Path, network: str) -> None:
    """What every process does: three images, which two processes cannot share equally, and gradients."""
    torch.set_num_threads(1)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name in FAMILIES:
        model = opened(folder, name, network)
        processes, guidance = Processes.here(model.device), CASES[name].guidances[-1]
        facts[f"{name} all held"], blocks = held([model.network]), blocks_of(model.network)
        facts[f"{name} held"], whole = held(blocks), watched(model)
        tensors[f"{name} images"] = model.render(PROMPTS, range(3), 2, guidance, processes=processes)
        tensors[f"{name} one image"] = model.render(PROMPTS[:1], [0], 2, guidance, processes=processes)
        tensors |= {f"{name} {memory}": gradient(model, name, memory) for memory in MEMORY}
        tensors[f"{name} after"] = model.render(PROMPTS[:1], [0], 2, guidance, processes=processes)
        facts |= {
            f"{name} held after": held(blocks),
            f"{name} whole": max(whole),
            f"{name} class": type(model.network).__name__,
        }
    if processes.main:
        save_file(tensors, out / "tensors.safetensors")
        (out / "facts.json").write_text(json.dumps(facts))


def ended(launched: list[Started]) -> None:
    for each in launched:
        result = each.end()
        assert result.code == 0, result.said[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in FAMILIES:
        CASES[name].pipe(dtype=torch.float64).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def looked(models: Path) -> tuple[Path, Path]:
    """What one process saw of whole networks, and two of networks in shards."""
    one, two = (models / name for name in ("one", "two"))
    for place in (one, two):
        place.mkdir()
    launched = together(lambda rank: partial(look_at_families, models, two, "shard"), models / "said")
    look_at_families(models, one, "device")
    ended(launched)
    return one, two


@pytest.mark.parametrize("name", FAMILIES)
def test_images_and_gradients_are_those_of_the_whole_network(looked: tuple[Path, Path], name: str) -> None:
    """Images to the bit, but that one process makes three at a time; gradients but for the order of a sum."""
    one, two = (load_file(place / "tensors.safetensors") for place in looked)
    assert torch.equal(two[f"{name} one image"], one[f"{name} one image"]) and torch.equal(
        two[f"{name} after"], one[f"{name} after"]
    )
    torch.testing.assert_close(two[f"{name} images"], one[f"{name} images"], rtol=0, atol=1e-6)
    for memory in MEMORY:
        expected = one[f"{name} {memory}"]
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(two[f"{name} {memory}"], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_process_holds_half_of_the_blocks_and_a_whole_one_only_while_it_answers(looked: tuple[Path, Path], name: str) -> None:
    one, two = (json.loads((place / "facts.json").read_text()) for place in looked)
    assert one[f"{name} held"] / 2 <= two[f"{name} held"] <= 0.55 * one[f"{name} held"]
    assert two[f"{name} held after"] == two[f"{name} held"] and two[f"{name} whole"] == 1
    assert two[f"{name} class"] == one[f"{name} class"]  # which other code knows it by


def test_what_shards_save_is_counted(models: Path, looked: tuple[Path, Path]) -> None:
    """By `plan`, of a network that is not there, against what a process held."""
    made = outline(models / "sd3", dtype="float64", size=(16, 16), network="shard")
    settings = Finetuning(sample_steps=2, rank=2, micro_batch=1)
    whole = count(made, methods.DRaFT(1), bright, settings, (1,))
    found = in_shards(whole, made.network, 2)
    one, two = (json.loads((place / "facts.json").read_text())["sd3 all held"] for place in looked)
    saved = whole.fixed["network"] - found.fixed["network"]
    assert 0 < saved == pytest.approx(one - two, rel=0.02)  # torch rounds a part up to whole rows
    blocks = [sum(weight.nbytes for weight in block.parameters()) for block in blocks_of(made.network)]
    assert found.peaks[1] - whole.peaks[1] == 3 * max(blocks)


SMALL = {
    "updates": 3, "batch": 4, "accumulate": 2, "sample_steps": 3, "guidance": 2.0, "rank": 2, "sample_every": 1, "ema": 0.5,
}  # fmt: skip


def run_everything(folder: Path, out: Path, network: str) -> None:
    """What trains, steers, distills, samples and evaluates; unequal shares everywhere."""
    torch.set_num_threads(1)
    model = opened(folder, "sd", network)
    processes = Processes.here(model.device)
    for memory in MEMORY:
        cr.finetune(model, "draft-lv", gray, PROMPTS, held_out=gray, out=out / memory, memory=memory, **SMALL)
    cr.finetune(model, "sdo", gray, PROMPTS, out=out / "cut", **SMALL | {"updates": 4})
    few = {"updates": 2, "batch": 2, "starts": 3, "teacher_steps": 8, "rank": 2, "guidance": 2.0}
    cr.distill(model, prompts=PROMPTS, out=out / "student", **few)
    model = opened(folder, "sd", network)
    for gradient in ("sdo", "adjoint", "freedom"):  # the second batch is less than one image each
        options = {"updates": 2, "steps": 2, "guidance": 2.0, "gradient": gradient}
        cr.steer(model, PROMPTS, gray, batch=2, out=out / gradient, **options)
    rows = {"base": model, "best": BestOf(model, bright, 3), "told": Templated(BestOf(model, bright, 2), "a drawing of {}")}
    table = cr.evaluate(rows, PROMPTS, [gray], seeds=range(2), steps=2, guidance=2.0, batch=4, processes=processes)
    best = [some.images for some in BestOf(model, bright, 2).finished(PROMPTS, range(3), 2, 2.0, processes=processes)]
    made = processes.gather([*torch.cat([some for some in best if len(some)])])
    if processes.main:
        table.save(out / "table.json")
        (out / "best.json").write_text(json.dumps([float(image.mean()) for image in made]))


def resume(folder: Path, out: Path, network: str) -> None:
    torch.set_num_threads(1)
    cr.finetune(opened(folder, "sd", network), "sdo", gray, PROMPTS, out=out / "cut", resume=True, **SMALL | {"updates": 6})


@pytest.fixture(scope="module")
def runs(models: Path) -> tuple[Path, Path]:
    """What one process made with a whole network, and two with one in shards; each goes on with a run as the other would."""
    one, two = (models / name for name in ("run-one", "run-two"))
    launched = together(lambda rank: partial(run_everything, models, two, "shard"), models / "said")
    run_everything(models, one, "device")
    ended(launched)
    launched = together(lambda rank: partial(resume, models, one, "shard"), models / "said")
    resume(models, two, "device")
    ended(launched)
    return one, two


@pytest.mark.parametrize("name", [*MEMORY, "cut", "student"])
def test_what_is_trained_is_the_same(runs: tuple[Path, Path], name: str) -> None:
    """ "cut" was begun by one and ended by the other."""
    states = [sorted((place / name / "checkpoints").glob("*/state.safetensors"))[-1] for place in runs]
    one, two = map(load_file, states)
    trained = [key for key in one if key.startswith("weight/")]
    assert trained and one.keys() == two.keys()
    for key in trained:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-10)


def test_what_is_steered_and_measured_is_the_same(runs: tuple[Path, Path]) -> None:
    for name in ("sdo", "adjoint", "freedom"):
        one, two = (json.loads((place / name / "steered.json").read_text()) for place in runs)
        assert two["rewards"] == pytest.approx(one["rewards"], rel=1e-6) and one["rewards"] != one["rewards_before"]
    one, two = (json.loads((place / "table.json").read_text()) for place in runs)
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        assert ours["name"] == theirs["name"]
        for column, estimate in theirs["metrics"].items():
            assert ours["metrics"][column] == pytest.approx(estimate, rel=1e-5)
    best = [json.loads((place / "best.json").read_text()) for place in runs]
    assert best[1] == pytest.approx(best[0], rel=1e-6)


def test_one_mistake_is_one_line(models: Path) -> None:
    for options, told in (
        ({}, "network is 'shard', but this is one process; launch several"),
        ({"compile": True}, "network is 'shard' and compile is on"),
        ({"shards": 1}, "shards is 1, but must be at least 2"),
    ):
        with pytest.raises(cr.UserError, match=told):
            cr.load(models / "sd", network="shard", **options)
    with pytest.raises(cr.UserError, match="a pipeline object is used as it is"):
        cr.load(CASES["sd"].pipe(), network="shard")
    with pytest.raises(cr.UserError, match="shards is 2, but network is 'cpu'; take network shard with it"):
        cr.load(models / "sd", network="cpu", shards=2)


def test_shards_that_do_not_divide_are_refused_and_a_process_that_is_gone_is_told(models: Path) -> None:
    def work(rank: int) -> None:
        torch.set_num_threads(1)
        with pytest.raises(cr.UserError, match="shards is 3, but must divide the number of processes, which is 2"):
            opened(models, "sd", "shard", shards=3)
        model = opened(models, "sd", "shard")
        if rank:
            os._exit(0)
        with pytest.raises(cr.UserError, match="another process has ended, or did not answer in time"):
            model.render(PROMPTS[:1], [0], 2)

    ended(together(lambda rank: partial(work, rank), models / "said"))


def test_every_process_has_as_many_rounds_and_something_to_go_along_with() -> None:
    for index, own in ((0, [range(2), range(4, 5)]), (1, [range(2, 4), range(0)])):
        found = list(Processes(index, 2).rounds(5, 2))
        assert found == [Round(own[0], 2), Round(own[1], 1)] and [*Processes(index, 2).batches(5, 2)] == own
        assert [each.along(True) for each in found] == [own[0], own[1] or range(1)]
        assert [each.along(False) for each in found] == own


def test_all_take_the_smallest_memory_policy_that_any_chose(models: Path, tmp_path: Path) -> None:
    """Else some would make a forward pass more than others."""

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        fits = lambda model, methods, reward, settings, share: settings.model_copy(update={"memory": POLICIES[rank]})
        small = {"batch": 2, "sample_steps": 2, "rank": 2, "updates": 2, "sample_every": 0, "memory": "auto"}
        with mock.patch("chainrule.finetune.fitted", fits):
            cr.finetune(opened(models, "sd", "shard"), "sdo", gray, PROMPTS, out=tmp_path / "run", **small)

    ended(together(lambda rank: partial(work, rank), tmp_path / "said"))
    assert "memory: recompute" in (tmp_path / "run/config.yaml").read_text()


@pytest.mark.heavy
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_is_the_same_to_1e6_in_float32_from_shards(name: str, processes: int, tmp_path: Path) -> None:
    """As by as many processes with the whole of it. Four hold two copies between them. Three methods, by one policy each."""
    case = CASES[name]
    case.pipe().save_pretrained(tmp_path / name)

    def tune(place: Path, network: str) -> None:
        torch.set_num_threads(1)
        model = cr.load(tmp_path / name, size=case.size, network=network, shards=2 if network == "shard" else None)
        small = {"updates": 4, "batch": 4, "sample_steps": 3, "rank": 2, "sample_every": 0, "guidance": case.guidances[-1]}
        for method, memory in (("sdo", "recompute"), ("draft-lv", "blocks"), ("draft-1", "keep")):
            cr.finetune(model, method, gray, PROMPTS, out=place / method, memory=memory, **small)

    for network in ("shard", "device"):
        ended(together(lambda rank, network=network: partial(tune, tmp_path / network, network), tmp_path / "said", processes))
    for method in ("sdo", "draft-lv", "draft-1"):
        file = f"{method}/adapter/pytorch_lora_weights.safetensors"
        whole, parts = (load_file(tmp_path / place / file) for place in ("device", "shard"))
        for key in whole:
            torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-6)


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nnodes 2 --node-rank {rank} --nproc-per-node 1 "
    "--master-addr 127.0.0.1 --master-port {port}",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank} "
    "--main_process_ip 127.0.0.1 --main_process_port {port} --mixed_precision no --dynamo_backend no",
}


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_machines_train_what_one_process_does_and_tell_of_one_mistake_once(launcher: str, models: Path, tmp_path: Path) -> None:
    """The launcher is started twice, as on two machines, which here have one address. Images and a table are made as well."""
    CASES["sd"].pipe().save_pretrained(tmp_path / "sd")
    train = ["train", "--method", "draft-1", "--model", "sd", "--reward", "symmetry", "--prompts", "animals", "--updates", "3"]
    train += ["--batch", "4", "--sample-steps", "3", "--rank", "2", "--sample-every", "2", "--out"]
    sample = ["sample", "sd", "--prompts", "a fox", "--seeds", "3", "--steps", "2", "--out"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def launch(*line: str) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        commands = [
            [sys.executable, "-m", *LAUNCHERS[launcher].format(rank=rank, port=port).split(), "-m", "chainrule", *line]
            for rank in range(2)
        ]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = [subprocess.Popen(command, text=True, **options) for command in commands]
        told = [each.communicate(timeout=300) for each in started]
        return [subprocess.CompletedProcess("", each.returncode, *said) for each, said in zip(started, told, strict=True)]

    for line in ([*train, "two"], [*sample, "images-two"]):
        for each in launch(*line, "--network", "shard"):
            assert not each.returncode, each.stderr[-3000:]
    wrong = launch(*train, "wrong", "--network", "shard", "--shards", "3")
    assert all(each.returncode for each in wrong)
    assert sum(each.stderr.count("error: shards is 3, but must divide the number of processes") for each in wrong) == 1
    for line in ([*train, "one"], [*sample, "images-one"]):
        subprocess.run([sys.executable, "-m", "chainrule", *line], cwd=tmp_path, check=True, capture_output=True)
    one, two = (load_file(tmp_path / place / "adapter/pytorch_lora_weights.safetensors") for place in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-6)
    assert (tmp_path / "images-one/images.jsonl").read_bytes() == (tmp_path / "images-two/images.jsonl").read_bytes()
