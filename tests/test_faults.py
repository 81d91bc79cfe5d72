"""What a run survives: kills, torn files, full disks, divergence. `make faults` tries many more of each."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import load_file
from tuned import PROMPTS, Killed, differences, drawn, gray, outcome, tuned

import chainrule as cr
from chainrule import files
from chainrule.errors import Note
from chainrule.files import whole, write_text


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run leaves that nothing happened to, watched by a held-out reward that draws."""
    return outcome(tuned(tmp_path_factory.mktemp("whole") / "run", drawn, held_out=drawn).folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def other_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


TORN = {
    "nothing": ("state.json", lambda path: None), "cut": ("state.safetensors", cut), "flipped": ("state.safetensors", flip),
    "gone": ("state.safetensors", Path.unlink), "cut JSON": ("state.json", cut), "another JSON": ("state.json", other_step),
    "no JSON": ("state.json", Path.unlink), "empty": ("state.json", lambda path: path.write_text("")),
}  # fmt: skip


CORE = ("nothing", "flipped", "gone", "another JSON")
KINDS = [pytest.param(*kind, marks=() if name in CORE else pytest.mark.heavy, id=name) for name, kind in TORN.items()]


@pytest.mark.parametrize(("name", "damage"), KINDS)
def test_a_killed_run_ends_like_another_whatever_became_of_its_last_checkpoint(name, damage, undisturbed, tmp_path):
    """Rewards that draw, held-out rewards, the best adapter and the pictures are the same too."""
    with pytest.raises(Killed):
        tuned(tmp_path / "run", drawn, held_out=drawn, die=5)
    place = tmp_path / "run/checkpoints/step-000004" / name
    damage(place)
    torn = place.parent.joinpath("state.json").exists() and damage is not TORN["nothing"][1]
    torch.manual_seed(1)  # what was drawn before does not matter
    if torn:
        with pytest.warns(Note, match="step-000004 is damaged .* passed over"):
            again = tuned(tmp_path / "run", drawn, held_out=drawn, resume=True)
    else:
        again = tuned(tmp_path / "run", drawn, held_out=drawn, resume=True)
    assert differences(outcome(again.folder), undisturbed) == []
    rows = undisturbed["metrics.jsonl"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and "held_out" in rows[0]
    assert any(name.startswith("best/") for name in undisturbed)
    assert {"samples/before_after.png", "samples/step-000003.png", "plan.txt"} <= undisturbed.keys()


def test_a_run_without_one_whole_checkpoint_says_so(tmp_path):
    with pytest.raises(Killed):
        tuned(tmp_path / "run", die=5)
    for path in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        cut(path)
    with pytest.warns(Note), pytest.raises(cr.UserError, match=r"no checkpoint of .* is whole; start it again with overwrite"):
        tuned(tmp_path / "run", resume=True)


def test_patience_goes_on_where_it_was(tmp_path):
    def against(images, prompts):
        return -gray(images, prompts)

    options = {"held_out": against, "patience": 2, "updates": 20}
    runs = [tuned(tmp_path / "whole", **options)]
    with pytest.raises(Killed):
        tuned(tmp_path / "cut", die=3, **options)
    runs.append(tuned(tmp_path / "cut", resume=True, **options))
    assert differences(*(outcome(run.folder) for run in runs)) == [] and len(runs[0].metrics()) == 3
    assert "held-out" in (runs[0].folder / "stopped.txt").read_text()


def test_an_update_whose_images_are_not_finite_is_taken_back(tmp_path):
    """A step of 1e30 leaves weights that are finite, and images that are not."""
    with pytest.raises(cr.UserError, match="the last updates, 8 times, had a NaN or Inf reward or gradient, or led to one"):
        tuned(tmp_path / "lost", lr=1e30, updates=30, ema=0.0)
    rows = cr.Run(tmp_path / "lost").metrics()
    assert rows[1]["taken_back"] and rows[1]["skipped"] == 2 and "taken_back" not in rows[0] and len(rows) < 30
    with pytest.raises(cr.UserError, match="the last update had a NaN or Inf"):
        tuned(tmp_path / "one", lr=1e30, updates=1, ema=0.0)
    for name in ("lost", "one"):
        run = cr.Run(tmp_path / name)
        saved = load_file(run.adapter / "pytorch_lora_weights.safetensors")
        assert all(not weight.any() for key, weight in saved.items() if "lora_B" in key)  # what was good: the beginning
        images = cr.load(make_pipeline(dtype=torch.float32)).using(run.folder).render(PROMPTS, [0, 1], 3, 2.0)
        assert images.isfinite().all()


# Files


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    place = tmp_path / "file.txt"
    write_text(place, "old")

    def half() -> None:
        with whole(place) as file:
            file.write(b"ne")
            raise Killed

    with pytest.raises(Killed):
        half()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(cr.UserError, match=r"cannot write .*file.txt: No space left on device; what was saved before is whole"):
        write_text(place, "new")
    assert place.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_run_writes_is_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        run = tuned(tmp_path / "run", updates=1)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.folder.rglob("*.*") if path.is_file()}
    modes.pop(".lock", None)
    assert {"state.safetensors", "state.json", "pytorch_lora_weights.safetensors", "before.png", "config.yaml"} <= modes.keys()
    assert set(modes.values()) == {0o644}


def test_a_disk_that_is_full_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(tmp_path, monkeypatch):
    calls, real = [], os.fsync

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(cr.UserError, match="No space left on device"):
        tuned(tmp_path / "run")
    monkeypatch.setattr(files.os, "fsync", real)
    assert not list((tmp_path / "run").rglob("*.part"))
    runs = tuned(tmp_path / "run", resume=True), tuned(tmp_path / "whole")
    assert differences(*(outcome(run.folder) for run in runs)) == []


# On the command line


LINES = ["sample run --prompts fox", "eval run", "train run/config.yaml --out other", "experiment table.yaml"]


@pytest.mark.parametrize("line", LINES)
def test_code_that_a_file_names_is_not_run_unasked(line, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('ran.txt', 'w')\ndef good(images, prompts): return images.mean((1, 2, 3))\n")
    Path("run").mkdir()
    guidance = {"sample": "guidance: {name: 'mine.py:good'}"}.get(line.split()[0], "")
    Path("run/config.yaml").write_text(f"model: tiny-emoji\nreward: 2*mine.py:good\n{guidance}\n")
    Path("table.yaml").write_text("title: T\ncolumns: [{title: a, of: a}]\nrows: {x: {settings: {reward: 'mine.py:good'}}}\n")
    found = chainrule(*line.split())
    assert found.code == 2 and "mine.py:good; read it, then pass --allow-code" in found.err and found.err.count("\n") == 1
    assert not Path("ran.txt").exists()


def test_pictures_and_mixes_replace_nothing_unasked(chainrule, tmp_path, monkeypatch, sd_folder):
    monkeypatch.chdir(tmp_path)
    sample = ["sample", sd_folder, "--prompts", "a fox", "--steps", "1", "--out", "there"]
    assert chainrule(*sample).code == 0
    Image.new("RGB", (4, 4)).save("there/0000.png")
    found = chainrule(*sample)
    assert found.code == 2 and "there/0000.png is there already; pass --overwrite" in found.err
    assert Image.open("there/0000.png").size == (4, 4)
    assert chainrule(*sample, "--overwrite").code == 0 and Image.open("there/0000.png").size != (4, 4)
    run = tuned(tmp_path / "run", updates=1)
    mix = ["mix", f"{run.folder}=1", "--out", "mixed", "--kohya", "one.safetensors"]
    assert chainrule(*mix).code == 0
    found = chainrule(*mix[:-2])
    assert found.code == 2 and "mixed/pytorch_lora_weights.safetensors is there already" in found.err
    assert chainrule(*mix[:2], "--out", "new", *mix[-2:]).code == 2 and not Path("new").exists()
    assert chainrule(*mix, "--overwrite").code == 0
