"""N processes are one process: fine-tuning, distilling, steering, sampling and evaluating, in two processes and in one."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.trial import together
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import load_file, save_file
from tuned import Judge

import chainrule as cr
from chainrule.cli import app
from chainrule.loop import Row
from chainrule.methods import DDPO, DPG, GRPO, SDO
from chainrule.processes import ALONE, Processes, leave

PROMPTS = ["a fox", "two bees", "a cat"]


def gray(images: torch.Tensor, prompts: object) -> torch.Tensor:
    return -(images - 0.5).square().mean((1, 2, 3))


def work(folder: Path) -> None:
    """What every process does; only the main one writes. Three images in two processes are not shared equally."""
    torch.set_num_threads(1)
    small = {"batch": 4, "sample_steps": 4, "guidance": 2.0, "rank": 2, "updates": 3, "sample_every": 1, "patience": 9}
    net = cr.load(make_pipeline("v_prediction", torch.float32))
    cr.finetune(net, SDO(), gray, PROMPTS, held_out=gray, out=folder / "tuned", **small)

    def terminate(row: Row) -> None:
        if row["step"] == 2 and os.environ.get("RANK", "1") == "1":  # only one of the processes is told to stop
            os.kill(os.getpid(), signal.SIGTERM)

    cr.finetune(net, SDO(), gray, PROMPTS, out=folder / "stopped", on_update=terminate, **{**small, "updates": 9, "patience": 0})
    net = cr.load(make_pipeline("v_prediction"))
    few = {"updates": 2, "batch": 2, "starts": 4, "teacher_steps": 8, "rank": 2, "guidance": 2.0}
    cr.distill(net, prompts=PROMPTS, out=folder / "student", **few)
    steering: dict[str, Any] = {"updates": 3, "steps": 3, "guidance": 2.0, "lr": 0.05, "keep": 0.1}
    cr.steer(net, PROMPTS, gray, batch=2, out=folder / "latents", **steering)  # the second batch is less than one image each
    cr.steer(net, PROMPTS, gray, batch=2, out=folder / "cut", on_update=terminate, **steering)
    cr.steer(net, PROMPTS, gray, batch=2, out=folder / "cut", resume=True, **steering)
    # alone, the second image would be given up an update earlier
    far = {**steering, "keep": 0.0, "lr": 5.0, "updates": 8, "patience": 1}
    cr.steer(net, PROMPTS[:2], gray, over="prompt", gradient="full", out=folder / "embeddings", **far)
    cr.steer(net, PROMPTS, gray, over="weights", rank=2, out=folder / "weights", **steering)
    processes = Processes.here(net.device)
    images = {str(n): net.render(PROMPTS[:n], range(n), 3, 2.0, processes=processes) for n in (1, 3)}
    table = cr.evaluate({"base": net}, PROMPTS, [gray], seeds=range(3), steps=3, guidance=2.0, batch=2, processes=processes)
    if processes.main:
        save_file(images, folder / "images.safetensors")
        table.save(folder / "table.json")
    options = ["--prompts", "a fox", "--seeds", "3", "--steps", "2", "--out", str(folder / "samples")]
    app(["sample", str(folder.parent / "sd"), *options], standalone_mode=False)


@pytest.mark.heavy
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "method", ["sdo", "draft-lv", "draft-1", GRPO(group=2), DDPO(reuse=2, clip=1.0), DPG(rank=2), "sdo and the sampler"], ids=str
)
def test_an_adapter_is_the_same_by_any_number_of_processes(method, count, tmp_path):
    """In float64: AdamW makes of a float32's rounding whatever a small gradient's sign says."""

    def tune(place: Path) -> None:
        net = cr.load(make_pipeline("v_prediction", torch.float64)).solving("sde" if isinstance(method, GRPO | DDPO) else None)
        small = {"updates": 5, "batch": 4, "sample_steps": 4, "guidance": 2.0, "rank": 2, "sample_every": 0}
        reward = Judge().double() if isinstance(method, DPG) else gray
        if method == "sdo and the sampler":
            small["learn"] = "adapter,guidance,negative"
        cr.finetune(net, str(method).split()[0] if isinstance(method, str) else method, reward, PROMPTS, out=place, **small)

    launched = together(lambda rank: partial(tune, tmp_path / "several"), tmp_path / "said", count)
    tune(tmp_path / "one")
    ended = [each.end() for each in launched]
    assert not any(each.code for each in ended), ended[0].said
    one, several = (load_file(max((tmp_path / name / "checkpoints").glob("*/state.safetensors"))) for name in ("one", "several"))
    assert any(value.dtype == torch.float64 for value in one.values())
    for key in one:
        torch.testing.assert_close(several[key], one[key], rtol=0, atol=1e-10)


@pytest.mark.heavy
def test_torchrun_launches_the_command_line_and_one_mistake_is_one_line(tmp_path):
    """Two processes by torchrun write the images of one, and a wrong option is told once."""
    make_pipeline(dtype=torch.float32).save_pretrained(tmp_path / "sd")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = ["-m", "chainrule", "sample", "sd", "--prompts", "a fox", "--seeds", "3", "--steps", "2", "--out"]
    for options, told in ((["two"], 0), (["wrong", "--scale", "nan"], 1)):
        command = [*torchrun, *line, *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
        assert (done.returncode != 0) == bool(told) and done.stderr.count("error: scale is nan") == told, done.stderr[-2000:]
    subprocess.run([sys.executable, *line, "one"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "one/images.jsonl").read_bytes() == (tmp_path / "two/images.jsonl").read_bytes()
    for name in files(tmp_path / "one")[1:-1]:
        pixels = [np.asarray(Image.open(tmp_path / where / name)).astype(int) for where in ("one", "two")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process wrote, and what two did."""
    folder = tmp_path_factory.mktemp("processes")
    make_pipeline(dtype=torch.float32).save_pretrained(folder / "sd")
    launched = together(lambda rank: partial(work, folder / "two"), folder / "said")
    work(folder / "one")
    for each in launched:
        ended = each.end()
        assert ended.code == 0, ended.said
    return folder / "one", folder / "two"


def test_fine_tuning(folders):
    first, second = (load_file(folder / "tuned/adapter/pytorch_lora_weights.safetensors") for folder in folders)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-6)
    rows = [[json.loads(line) for line in (folder / "tuned/metrics.jsonl").read_text().splitlines()] for folder in folders]
    assert len(rows[1]) == 3
    for one, two in zip(*rows, strict=True):
        assert {key: two[key] for key in ("step", "skipped")} == {key: one[key] for key in ("step", "skipped")}
        assert two["reward"] == pytest.approx(one["reward"], rel=1e-4) and two["terms"] == pytest.approx(one["terms"], rel=1e-4)
    assert [row["held_out"] for row in rows[1][:2]] == pytest.approx([row["held_out"] for row in rows[0][:2]], rel=1e-4)
    assert files(folders[0] / "tuned") == files(folders[1] / "tuned")


def test_all_processes_stop_when_one_is_asked_to(folders):
    for folder in folders:
        assert (folder / "stopped/stopped.txt").read_text() == "interrupted at update 2\n"
    assert files(folders[0] / "stopped") == files(folders[1] / "stopped")


def test_distilling(folders):
    first, second = (load_file(folder / "student/checkpoints/step-000002/state.safetensors") for folder in folders)
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-6, atol=1e-9)
    losses = [[json.loads(line)["loss"] for line in (f / "student/metrics.jsonl").read_text().splitlines()] for f in folders]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and files(folders[0] / "student") == files(folders[1] / "student")


@pytest.mark.parametrize("name", ["latents", "embeddings", "weights"])
def test_steering(folders, name):
    """Adam divides by the size of a gradient, so that sums in another order differ by more than they are."""
    one, two = (json.loads((folder / name / "steered.json").read_text()) for folder in folders)
    assert one["rewards"] != one["rewards_before"] and one["prompts"] == two["prompts"] and one["updates"] == two["updates"]
    for key in ("rewards", "rewards_before", "distances"):
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-9)
    rows = [[json.loads(line) for line in (f / name / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert len(rows[0]) == (7 if name == "embeddings" else 4)
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-9)
    assert files(folders[0] / name) == files(folders[1] / name)


def test_steering_resumes_after_one_process_was_told_to_stop(folders):
    for folder in folders:
        for file in ("steered.json", "metrics.jsonl", *(f"images/{k:04d}.png" for k in range(3))):
            assert (folder / "cut" / file).read_bytes() == (folder / "latents" / file).read_bytes()
        assert len(json.loads((folder / "cut/environment.json").read_text())["resumed"]) == 1


def test_sampling_and_evaluating(folders):
    first, second = (load_file(folder / "images.safetensors") for folder in folders)
    assert len(first["1"]) == 1 and len(first["3"]) == 3
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-6)
    one, two = (json.loads((folder / "table.json").read_text())["rows"][0]["metrics"] for folder in folders)
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-5)


def test_the_command_line_writes_once(folders):
    one, two = (folder / "samples" for folder in folders)
    assert files(one) == files(two) == [".lock", "0000.png", "0001.png", "0002.png", "grid.png", "images.jsonl"]
    assert (one / "images.jsonl").read_bytes() == (two / "images.jsonl").read_bytes()
    for name in files(one)[1:-1]:
        pixels = [np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_one_process_starts_nothing(folders):
    assert not torch.distributed.is_initialized() and Processes.here() == ALONE


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_everything_once(count):
    items = list("abcdefg")
    shares = [Processes(index, count).share(items) for index in range(count)]
    assert sorted(itertools.chain(*shares)) == items and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(cr.UserError, match="batch is 6, but must be divisible by 2 processes x accumulate"):
        Processes(0, 2).check_batch(6, 2)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_process_leaves_the_group_where_the_program_ends(tmp_path):
    """At the end of Python: torch's own threads, ended later, were once seen to abort a process that was done."""

    def work(rank: int) -> None:
        for _ in range(2):
            Processes.here("cpu")
        assert torch.distributed.is_initialized()
        atexit._run_exitfuncs()
        assert not torch.distributed.is_initialized()
        leave()  # once is enough

    for each in together(lambda rank: partial(work, rank), tmp_path / "said"):
        ended = each.end()
        assert ended.code == 0, ended.said
