"""A network in shards is the whole network: the same images, gradients and runs, from a part of its weights on each process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

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
from chainrule.offload import blocks_of
from chainrule.processes import Processes, Round
from chainrule.rewards import reward_of
from chainrule.settings import Opening

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


def held(network: torch.nn.Module) -> int:
    """The bytes of a network's blocks that this process really holds."""
    weights = [weight for block in blocks_of(network) for weight in block.parameters()]
    stored = [(w.to_local() if isinstance(w, DTensor) else w).untyped_storage() for w in weights]
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
        facts[f"{name} held"], whole = held(model.network), watched(model)
        tensors[f"{name} images"] = model.render(PROMPTS, range(3), 2, guidance, processes=processes)
        tensors[f"{name} one image"] = model.render(PROMPTS[:1], [0], 2, guidance, processes=processes)
        tensors |= {f"{name} {memory}": gradient(model, name, memory) for memory in MEMORY}
        tensors[f"{name} after"] = model.render(PROMPTS[:1], [0], 2, guidance, processes=processes)
        facts |= {
            f"{name} held after": held(model.network),
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


def run_everything(folder: Path, out: Path, network: str) -> None:
    """What trains, steers, distills, samples and evaluates; unequal shares everywhere."""
    torch.set_num_threads(1)
    model = opened(folder, "sd", network)
    processes = Processes.here(model.device)
    small = {
        "batch": 4,
        "accumulate": 2,
        "sample_steps": 3,
        "guidance": 2.0,
        "rank": 2,
        "updates": 3,
        "sample_every": 1,
        "ema": 0.5,
    }
    for memory in MEMORY:
        cr.finetune(model, "draft-lv", gray, PROMPTS, held_out=gray, out=out / memory, memory=memory, **small)
    cr.finetune(model, "sdo", gray, PROMPTS, out=out / "cut", **{**small, "updates": 4})
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
    small = {
        "batch": 4,
        "accumulate": 2,
        "sample_steps": 3,
        "guidance": 2.0,
        "rank": 2,
        "updates": 6,
        "sample_every": 1,
        "ema": 0.5,
    }
    cr.finetune(opened(folder, "sd", network), "sdo", gray, PROMPTS, out=out / "cut", resume=True, **small)


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
