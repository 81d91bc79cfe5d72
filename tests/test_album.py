"""Images of many prompts: written as they are made with what made them, continued after a kill, few in memory at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faults.trial import run, together, touching
from PIL import Image
from pipelines import make_pipeline
from tuned import tuned

import chainrule as cr
from chainrule import album as albums
from chainrule import sampling
from chainrule.album import Album, facts_of
from chainrule.baselines import BestOf
from chainrule.cli import app
from chainrule.files import write_text
from chainrule.processes import Processes
from chainrule.report.pictures import cells
from chainrule.runs import Run

SMALL = ["--steps", "2", "--guidance", "2", "--size", "24x16"]
Call = Callable[..., SimpleNamespace]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def place(sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and two prompts in it, where the command line is."""
    monkeypatch.chdir(tmp_path)
    Path("sd").symlink_to(sd_folder)
    Path("two.txt").write_text("a fox\ntwo bees — «zwei»\n")
    return tmp_path


def test_an_image_says_by_itself_how_it_is_made_again(place: Path, chainrule: Call) -> None:
    tuned(place / "run", updates=1)
    line = ["sample", "sd", "--adapter", "run", "--scale", "0.5", "--prompts", "two.txt", "--seeds", "2", "--first-seed", "4"]
    found = chainrule(*line, *SMALL, "--reward", "symmetry", "--reward", "-filesize", "--out", "there")
    assert found.code == 0 and found.out == "4 images in there, all together in there/grid.png\n", found.err
    told = lines(place / "there")
    assert [(each["file"], each["prompt"], each["seed"]) for each in told] == [
        (f"{k:04d}.png", ["a fox", "two bees — «zwei»"][k // 2], 4 + k % 2) for k in range(4)
    ]
    for each in told:
        path = place / "there" / each.pop("file")
        assert facts_of(path) == each and json.loads(Image.open(path).text["chainrule"]) == each  # type: ignore[attr-defined]
        (adapter,) = each["adapters"]
        assert (adapter["adapter"], adapter["scale"]) == ("run", 0.5)
        model = cr.load(each["model"], size=each["size"], solver=each["solver"], dtype=each["dtype"])
        model = model.using(adapter["adapter"], scale=adapter["scale"])
        (again,) = model.sample(each["prompt"], each["seed"], each["steps"], each["guidance"])
        assert np.abs(pixels(path).astype(int) - np.asarray(again)).max() <= 1  # in a batch of one, not of four
        images = torch.from_numpy(pixels(path) / 255).permute(2, 0, 1)[None].float()
        assert each["rewards"]["symmetry"] == pytest.approx(float(-(images - images.flip(-1)).abs().mean()), abs=1 / 255)
        assert set(each["rewards"]) == {"symmetry", "-filesize"}
    # the form that other programs' images have: the prompt, then a line of settings, width before height
    shown = Image.open(place / "there/0002.png").text["parameters"]  # type: ignore[attr-defined]
    assert shown == "two bees — «zwei»\nSteps: 2, Sampler: ddim, CFG scale: 2.0, Seed: 4, Size: 16x24, Model: sd"


def test_the_best_of_several_and_all_rewards_are_in_the_list(place: Path, chainrule: Call) -> None:
    line = ["sample", "sd", "--prompts", "a fox", "--seeds", "2", *SMALL, "--best-of", "3", "--out", "best"]
    assert "--best-of needs a --reward" in chainrule(*line).err
    assert chainrule(*line, "--reward", "symmetry", "--reward", "rotation", "--size", "16").code == 0
    model, told = cr.load("sd"), lines(place / "best")
    for k, each in enumerate(told):
        seeds = [3 * k, 3 * k + 1, 3 * k + 2]
        images = model.render(["a fox"] * 3, seeds, 2, 2.0)
        scores = -(images - images.flip(-1)).abs().mean((1, 2, 3))
        assert each["seed"] == seeds[int(scores.argmax())] and each["best_of"] == 3
        assert each["rewards"]["symmetry"] == pytest.approx(float(scores.max()), rel=1e-4) and "rotation" in each["rewards"]
    before = contents(place / "best")
    again = chainrule(*line, "--reward", "symmetry", "--reward", "rotation", "--size", "16")
    assert "2 images in best (2 there before)" in again.out and contents(place / "best") == before


@pytest.mark.parametrize("best_of", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_killed_sample_is_continued_by_the_same_command_to_the_same_bytes(place: Path, best_of: int, monkeypatch: Any) -> None:
    """Killed at every third of its touches of a file, and continued; batches of two, so that some are half written."""
    monkeypatch.setattr(sampling, "BATCH", 2)

    def sample(out: str) -> None:
        torch.set_num_threads(1)
        ways = ["--reward", "symmetry", "--best-of", str(best_of)]
        app(["sample", "sd", "--prompts", "two.txt", "--seeds", "3", *SMALL, *ways, "--out", out], standalone_mode=False)

    run(touching(partial(sample, "whole"), count=place / "count"), place / "said.txt")
    whole = contents(place / "whole")
    assert sorted(whole) == [*(f"{k:04d}.png" for k in range(6)), "grid.png", "images.jsonl"]
    for die in range(2, int((place / "count").read_text()) + 1, 3):
        out = f"cut-{die}"
        assert run(touching(partial(sample, out), die, torn=True), place / "said.txt").code == -9
        left = {path.name: path.stat().st_mtime_ns for path in (place / out).glob("0*.png")}
        ended = run(partial(sample, out), place / "said.txt")
        assert ended.code == 0 and contents(place / out) == whole, ended.said
        assert all((place / out / name).stat().st_mtime_ns == time for name, time in left.items())  # none was made again


CHANGED = {
    "--prompts 'a cat' --seeds 2": 'prompt "a fox", and now prompt is "a cat"',
    "--prompts 'a fox' --seeds 2 --first-seed 1": "seed 0, and now seed is 1",
    "--prompts 'a fox' --seeds 2 --steps 3": "steps 2, and now steps is 3",
    "--prompts 'a fox' --seeds 2 --guidance 3": "guidance 2.0, and now guidance is 3.0",
    "--prompts 'a fox' --seeds 2 --guidance '{name: rescaled, scale: 2}'": 'guidance 2.0, and now guidance is {"name": "rescaled"',
    "--prompts 'a fox' --seeds 2 --size 16": 'size "24x16", and now size is 16',
    "--prompts 'a fox' --seeds 2 --solver euler": 'solver "ddim", and now solver is "euler"',
    "--prompts 'a fox' --seeds 2 --dtype float64": 'dtype "float32", and now dtype is "float64"',
    "--prompts 'a fox' --seeds 2 --adapter run": "adapters not given, and now adapters is [",
    "--prompts 'a fox' --seeds 2 --reward symmetry": 'rewards not given, and now rewards is ["symmetry"]',
    "--prompts 'a fox' --seeds 1": "there/0001.png is one image more than the 1 that were asked for",
}


def test_another_setting_is_one_line_that_names_it_and_touches_nothing(place: Path, chainrule: Call) -> None:
    from conftest import words

    tuned(place / "run", updates=1)
    assert chainrule("sample", "sd", "--prompts", "a fox", "--seeds", "2", *SMALL, "--out", "there").code == 0
    before = contents(place / "there")
    for line, message in CHANGED.items():
        given = words(line)
        rest = [word for k in range(0, len(SMALL), 2) if SMALL[k] not in given for word in SMALL[k : k + 2]]
        found = chainrule("sample", "sd", *given, *rest, "--out", "there")
        assert found.code == 2 and message in found.err and found.err.count("\n") == 1, found.err
        assert "pass --overwrite to replace it, or choose another out" in found.err and contents(place / "there") == before
    # a scale of two numbers comes back out of a file as a list
    ramp = ["sample", "sd", "--prompts", "a fox", *SMALL, "--adapter", "run", "--scale", "0:1", "--out", "ramp"]
    assert chainrule(*ramp).code == 0 and "(1 there before)" in chainrule(*ramp).out
    assert "made with adapters" in chainrule(*ramp, "--scale", "0:0.5").err
    # an adapter that was trained further under the same name is another one
    with_run = ["sample", "sd", "--prompts", "a fox", *SMALL, "--adapter", "run", "--out", "adapted"]
    assert chainrule(*with_run).code == 0 and chainrule(*with_run).code == 0
    tuned(place / "run", updates=2, resume=True)
    assert "made with adapters" in chainrule(*with_run).err


def test_overwriting_leaves_nothing_of_the_images_that_were_there(place: Path, chainrule: Call, monkeypatch: Any) -> None:
    monkeypatch.setattr(albums, "PAGE", 2)
    line = ["sample", "sd", "--prompts", "a fox", *SMALL, "--out", "there"]
    assert "on 2 pages, there/grid-001.png to grid-002.png" in chainrule(*line, "--seeds", "4").out
    (place / "there/mine.png").write_bytes(b"")
    assert chainrule(*line, "--seeds", "1", "--first-seed", "9", "--overwrite").code == 0
    assert sorted(contents(place / "there")) == ["0000.png", "grid.png", "images.jsonl", "mine.png"]
    # more seeds of one prompt only add to what is there
    assert chainrule(*line, "--seeds", "3", "--first-seed", "9").out.startswith("3 images in there (1 there before)")
    assert sorted(contents(place / "there"))[-5:] == ["0002.png", "grid-001.png", "grid-002.png", "images.jsonl", "mine.png"]


def test_a_second_process_in_the_folder_is_refused(place: Path, chainrule: Call) -> None:
    (place / "there").mkdir()
    words = ["sample", "sd", "--prompts", "a fox", *SMALL, "--out", "there"]
    with Run(place / "there").locked():
        assert run(partial(app, words, standalone_mode=False), place / "said.txt").code == 2  # a UserError
    assert not contents(place / "there")
    assert run(partial(app, words, standalone_mode=False), place / "said.txt").code == 0


def test_a_place_that_cannot_be_written_is_said_before_anything_is_loaded(place: Path, chainrule: Call, monkeypatch: Any) -> None:
    monkeypatch.setattr("chainrule.models.loading.load", lambda *a, **k: pytest.fail("loaded"))
    found = chainrule("sample", "sd", "--prompts", "a fox", "--out", "/proc/there")
    assert found.code == 2 and found.err.startswith("error: cannot write to /proc/there: ") and found.err.count("\n") == 1
    write_text("there", "a file")
    assert "there is a file" in chainrule("sample", "sd", "--prompts", "a fox", "--out", "there").err


@pytest.mark.parametrize("best_of", [0, 4])
def test_images_in_memory_do_not_grow_with_the_prompts(best_of: int, tmp_path: Path, monkeypatch: Any) -> None:
    """Living images, as tensors and as pictures, are counted whenever a file is written."""
    model = cr.load(make_pipeline(dtype=torch.float32))
    monkeypatch.setattr(sampling, "BATCH", 2)
    monkeypatch.setattr(albums, "PAGE", 4)
    write = albums.write_picture
    gc.collect()
    gc.freeze()  # what is there before is not counted, and counting is quick

    def living() -> int:
        gc.collect()
        every = gc.get_objects()
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in every if type(x) is torch.Tensor}
        tensors = sum(size // (3 * 16 * 16 * 4) for size in held.values())
        return tensors + sum(isinstance(each, Image.Image) for each in every)

    def most(count: int) -> int:
        album, seen = Album(tmp_path / f"{count}", [("a fox", k) for k in range(count)]), []
        monkeypatch.setattr(albums, "write_picture", lambda *given: (seen.append(living()), write(*given)))
        maker = BestOf(model, cr.rewards.parse("symmetry"), best_of) if best_of else model
        before = living()
        sampling.fill(
            album, maker, sampling.facts_of_model(model, 1, 1.0) | {"model": "sd"}, steps=1, guidance=1.0, done=album.begin()
        )
        assert len(seen) == count + count // 4
        return max(seen) - before

    assert most(24) <= most(8) < 24


def test_pages_show_every_image_once_and_are_of_one_size(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(albums, "PAGE", 12)
    monkeypatch.setattr(sampling, "BATCH", 7)
    model = cr.load(make_pipeline(dtype=torch.float32), size=(24, 16))
    album = Album(tmp_path / "there", [("a fox", k) for k in range(26)])
    sampling.fill(album, model, sampling.facts_of_model(model, 1, 1.0) | {"model": "sd"}, steps=1, guidance=1.0, done=album.begin())
    assert [path.name for path in album.sheets] == ["grid-001.png", "grid-002.png", "grid-003.png"]
    sheets = [Image.open(path) for path in album.sheets]
    assert sheets[0].size == sheets[1].size and sheets[2].height < sheets[0].height
    images = [Image.open(album.picture(k)) for k in range(26)]
    shown = [
        cell
        for at, sheet in zip((0, 12, 24), sheets, strict=True)
        for cell in cells(sheet, images[at : at + 12], 6, captioned=True)
    ]
    factor = shown[0].width // 16
    for image, cell in zip(images, shown, strict=True):
        assert (
            cell.size == (16 * factor, 24 * factor) and cell.resize((16, 24), Image.Resampling.NEAREST).tobytes() == image.tobytes()
        )


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_several_processes_write_each_their_share_and_go_on_after_a_kill(count: int, place: Path, monkeypatch: Any) -> None:
    """Whole batches are the same on any number of processes, so the bytes are those of one process."""
    monkeypatch.setattr(sampling, "BATCH", 2)

    def sample(out: str, dies: int = 0) -> None:
        torch.set_num_threads(1)
        words = ["sample", "sd", "--prompts", "two.txt", "--seeds", "5", *SMALL, "--reward", "symmetry", "--out", out]
        touching(lambda: app(words, standalone_mode=False), dies)()

    assert run(partial(sample, "one"), place / "said.txt").code == 0
    for each in together(lambda rank: partial(sample, "killed", 4 * (rank == 1)), place / "several", count):
        assert each.end().code != 0
    left = len(list((place / "killed").glob("0*.png")))
    assert 0 < left < 10
    for each in together(lambda rank: partial(sample, "killed"), place / "several", count):
        ended = each.end()
        assert ended.code == 0, ended.said
    assert contents(place / "killed") == contents(place / "one")
    assert [each["file"] for each in lines(place / "killed")] == [f"{k:04d}.png" for k in range(10)]


@pytest.mark.parametrize(("count", "processes", "batch"), [(7, 1, 3), (7, 2, 3), (40, 3, 16), (3, 4, 16), (0, 2, 4)])
def test_batches_are_everything_once_and_as_many_for_each_process(count: int, processes: int, batch: int) -> None:
    shares = [list(Processes(index, processes).batches(count, batch)) for index in range(processes)]
    assert len({len(share) for share in shares}) == 1
    rounds = [number for together_ in zip(*shares, strict=True) for some in together_ for number in some]
    assert rounds == list(range(count))  # in order, round by round
    done = {number for number in range(count) if number != count - 1}
    left = [
        number for index in range(processes) for some in Processes(index, processes).batches(count, batch, done) for number in some
    ]
    assert not count or (count - 1 in left and len(left) <= batch)


def test_what_is_no_image_of_ours_has_no_facts(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    write_text(tmp_path / "text.png", "no picture")
    assert facts_of(tmp_path / "plain.png") == facts_of(tmp_path / "text.png") == facts_of(tmp_path / "gone.png") == {}
