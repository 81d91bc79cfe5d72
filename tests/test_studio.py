"""The studio without its page: what it lists, what its pictures are, how it steers, and what it refuses."""

from __future__ import annotations

import json
import threading
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

import chainrule as cr
from chainrule.report.pictures import cells
from chainrule.studio import Desk, Opened, Shelf
from chainrule.studio.desk import Asked, Part, number, whole
from chainrule.studio.showing import BASE, curve, make_study, pairs, report, result
from chainrule.studio.steering import Moment, Wish, steered

STEPS = 4
ASKED = Asked("a fox", 3, STEPS, 2.0)
RUN = "kind: finetune\nmodel: base\nreward: symmetry\n"


def made(folder: Path) -> Desk:
    """A small random model, two adapters that show, and a run, in a folder."""
    make_pipeline(dtype=torch.float32).save_pretrained(folder / "base")
    for i, place in enumerate(("one", "tuned/adapter")):
        adapter = cr.load(str(folder / "base")).adapt("mine", rank=2)
        torch.manual_seed(i)
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.2)
        adapter.save(folder / place)
    (folder / "tuned" / "config.yaml").write_text(RUN)
    (folder / "tuned" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    return Desk(Shelf(folder), lambda name: Opened(cr.load(name), STEPS))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return made(tmp_path / "runs")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """One that nothing is changed on."""
    return made(tmp_path_factory.mktemp("studio") / "runs")


def array(image: Image.Image) -> Any:
    return np.asarray(image).astype(int)


def plain(desk: Desk, **adapters: float) -> cr.Model:
    model = cr.load(str(desk.shelf.folder / "base"))
    for name, scale in adapters.items():
        model = model.using(desk.shelf.folder / name, scale=scale)
    return model


def drawn(model: cr.Model) -> Any:
    return array(model.sample(["a fox"], [3], STEPS, 2.0)[0])


def test_the_pictures_are_those_of_plain_sampling_and_the_base_is_made_once(desk: Desk) -> None:
    calls: list[int] = []
    base, shown = desk.pictures("base", ASKED, [Part("one", 0.5)], lambda: calls.append(1))
    assert len(calls) == 2 * STEPS
    assert (array(base) == drawn(plain(desk))).all() and (array(shown) == drawn(plain(desk, one=0.5))).all()
    assert (array(base) != array(shown)).any()
    span = plain(desk).using(desk.shelf.folder / "one", adapter_steps=(1, 3), steps=STEPS)
    calls.clear()
    again, shown = desk.pictures("base", ASKED, [Part("one", 1.0, 1, 3)], lambda: calls.append(1))
    assert len(calls) == STEPS and again is base and (array(shown) == drawn(span)).all()
    other, same = desk.pictures("base", Asked("a fox", 4, STEPS, 2.0), [])
    assert same is other and (array(other) != array(base)).any()


def test_a_grid_and_a_saved_mix_are_the_scaled_adapters(desk: Desk) -> None:
    both = [Part("one", 0.8), Part("tuned", -0.5)]
    sheet = desk.grid("base", ASKED, both, 1)
    corner = Image.fromarray(drawn(plain(desk, one=0.8, tuned=-0.5)).astype(np.uint8))
    found = cells(sheet, [corner] * 4, 2, captioned=True)[3]
    assert (array(found) == array(corner.resize(found.size, Image.Resampling.NEAREST))).all()
    place = desk.save(both, "my mix")
    assert place == desk.shelf.folder / "my mix" and "my mix" in desk.shelf.adapters()
    _, mixed = desk.pictures("base", ASKED, [Part("my mix")])
    assert abs(array(mixed) - array(corner)).max() <= 1  # sums in another order, rounded to 256 shades
    with pytest.raises(cr.UserError, match="is there already"):
        desk.save(both, "my mix")


def moments(desk: Desk, wish: Wish, parts: tuple[Part, ...] = (), *, most: int = 99, keep: str = "") -> list[Moment]:
    stop, found = threading.Event(), []
    for moment in steered(desk, "base", ASKED, parts, wish, stop, keep):
        found.append(moment)
        if len(found) == most:
            stop.set()
    return found


def wish(reward: str = "symmetry", over: str = "latent", gradient: str = "sdo", updates: int = 4, bound: str = "") -> Wish:
    return Wish.of(ASKED, reward, over, gradient, updates, 0.05, bound)


def test_steering_shows_every_update_and_ends_where_the_library_does(desk: Desk) -> None:
    found = moments(desk, wish(bound="0.1"), (Part("one", 0.5),))
    truth = cr.steer(
        plain(desk, one=0.5), ["a fox"], cr.rewards.parse("symmetry"), updates=4, lr=0.05, bound=0.1, steps=STEPS, guidance=2.0,
        seed=3,
    )  # fmt: skip
    assert [moment.over for moment in found] == [False] * 4 + [True]
    assert [len(moment.curve) for moment in found[1:]] == sorted(len(moment.curve) for moment in found[1:])
    assert (array(found[-1].image) == array(truth.images[0])).all() and (array(found[0].before) == array(truth.before[0])).all()
    assert [reward for _, reward in found[-1].curve] == [row["reward"] for row in truth.curve]
    assert found[-1].about.startswith("done: update 4 of 4; symmetry ")
    assert curve(found[-1].curve).startswith("<svg")


def test_stop_ends_after_the_update_under_way_and_leaving_stops_too(desk: Desk) -> None:
    found = moments(desk, wish(updates=500), most=1)
    assert found[-1].over and found[-1].about.startswith("stopped: update ") and len(found) < 20
    going = steered(desk, "base", ASKED, (), wish(updates=500), threading.Event())
    next(going)
    (worker,) = (thread for thread in threading.enumerate() if thread.name == "steering")
    going.close()
    assert not worker.is_alive() and not desk.busy.locked()


def test_a_steered_image_is_kept_as_a_run_with_a_report(desk: Desk) -> None:
    moments(desk, wish(updates=2), (Part("one"),), keep="calm fox")
    kept = cr.Run(desk.shelf.folder / "calm fox")
    assert kept.config.adapter == (str(desk.shelf.folder / "one"),) and (kept.folder / "best.png").is_file()
    assert "calm fox" in desk.shelf.runs() and "steered for symmetry" in unescape(unescape(report(desk.shelf, "calm fox")))
    with pytest.raises(cr.UserError, match="put one to scale 1"):
        moments(desk, wish(), (Part("one", 0.5),), keep="other")


def test_the_page_runs_no_code(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("open('ran', 'w')\ndef bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    for reward in ("mine.py:bright", "symmetry + 2*mine.py:bright", "process:touch ran", "symmetry - process:touch ran", "mine.py"):
        with pytest.raises(cr.UserError, match="names code, which the page does not run"):
            wish(reward)
    assert not Path("ran").exists()


def test_the_shelf_lists_the_folder_and_what_was_named_and_nothing_outside(desk: Desk, tmp_path: Path) -> None:
    folder = desk.shelf.folder
    (tmp_path / "outside").mkdir()
    (folder / "one" / "pytorch_lora_weights.safetensors").rename(tmp_path / "outside" / "pytorch_lora_weights.safetensors")
    (folder / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "config.yaml").write_text(RUN)
    assert list(desk.shelf.models()) == ["base", "tuned", "tiny-emoji", "tiny-faces"]
    assert list(desk.shelf.adapters()) == ["tuned"] and list(desk.shelf.runs()) == ["tuned"]
    assert desk.own("tuned") == "tuned" and desk.own("base") is None
    named = Shelf(folder, (str(folder / "tuned"), str(tmp_path / "outside"), "owner/name"))
    assert list(named.adapters()) == [str(folder / "tuned"), str(tmp_path / "outside")]
    assert list(named.models())[:3] == [*named.adapters(), "owner/name"] and "base" in named.models()
    for name in ("../x", "/x", "a/b", "", None, ".hidden", "..", "x" * 101):
        with pytest.raises(cr.UserError, match="the name is"):
            desk.shelf.free(name)
    for name in ("link", "../outside", str(tmp_path / "outside"), "tuned/../tuned", None):
        with pytest.raises(cr.UserError, match=r"unknown run|no run chosen"):
            report(desk.shelf, name)


def test_a_report_is_read_and_nothing_is_written(desk: Desk) -> None:
    folder = desk.shelf.folder / "tuned"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    frame = report(desk.shelf, "tuned")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert frame.startswith('<iframe class="studio-frame" title="report" sandbox="" srcdoc="') and frame.count('"') == 8
    assert unescape(frame).count("<!doctype html>") == 1


def test_a_study_is_made_voted_on_and_counted(desk: Desk, tmp_path: Path) -> None:
    name = make_study(desk, "base", ASKED, ["a fox", "a bee"], 2, [BASE, "one"], "study")
    frame = unescape(pairs(desk.shelf, name))
    assert 'sandbox="allow-scripts allow-downloads"' in frame and "one" not in json.loads(
        frame.partition('id="data">')[2].partition("</script>")[0]
    )
    key = json.loads((desk.shelf.folder / "study" / "key.json").read_text())
    assert len(key["pairs"]) == 4 and {key["pairs"][0]["left"], key["pairs"][0]["right"]} == {BASE, "one"}
    votes = {str(i): "left" if pair["left"] == "one" else "right" for i, pair in enumerate(key["pairs"])}
    (tmp_path / "votes.json").write_text(json.dumps({"study": key["study"], "voter": "v", "votes": votes}))
    assert result(desk.shelf, "study", [tmp_path / "votes.json"]).startswith(f"{BASE} over one: 0.0%")


BAD = {
    "no such model": (lambda desk: desk.pictures("bse", ASKED, []), "unknown model 'bse'; did you mean 'base'"),
    "no such adapter": (lambda desk: desk.pictures("base", ASKED, [Part("on")]), "unknown adapter 'on'"),
    "no scale": (lambda desk: Part.of("one", float("inf"), 0, 4, 4), "the scale of one is inf"),
    "a range of no step": (lambda desk: desk.pictures("base", ASKED, [Part("one", 1, 3, 2)]), "is on from step 3 until 2"),
    "guidance": (lambda desk: Asked.of("x", 0, 4, "-1"), "guidance is -1, but must be between 0 and 100"),
    "guidance as a word": (lambda desk: Asked.of("x", 0, 4, "much"), "guidance is 'much', but must be a number"),
    "no number": (lambda desk: number("bound", "nan"), "bound is 'nan'"),
    "no seed": (lambda desk: Asked.of("x", None, 4, ""), "seed is empty, but must be a whole number"),
    "half a seed": (lambda desk: whole("seed", 0.5), "seed is 0.5"),
    "an endless seed": (lambda desk: whole("seed", float("inf")), "seed is inf"),
    "a seed below 0": (lambda desk: Asked.of("x", -1, 4, ""), "a seed is -1"),
    "no steps": (lambda desk: desk.pictures("base", Asked.of("x", 0, 0, ""), []), "steps is 0"),
    "a grid of none": (lambda desk: desk.grid("base", ASKED, [], 4), "one adapter or two, not 0"),
    "a grid of one twice": (lambda desk: desk.grid("base", ASKED, [Part("one")] * 2, 4), "one is chosen twice"),
    "a grid too fine": (lambda desk: desk.grid("base", ASKED, [Part("one")], 99), "cells is 99"),
    "a mix of none": (lambda desk: desk.save([], "x"), "nothing to save"),
    "a mix of some steps": (lambda desk: desk.save([Part("one", 1, 1)], "x"), "a mix has its adapters on at every step"),
    "no reward": (lambda desk: wish(""), "no reward given"),
    "no such reward": (lambda desk: moments(desk, wish("symetry")), "did you mean 'symmetry'"),
    "no such variable": (lambda desk: wish(over="latnt"), "over is 'latnt'"),
    "no such gradient": (lambda desk: wish(gradient="sd"), "unknown gradient 'sd'; did you mean 'sdo'"),
    "a bound of an embedding": (lambda desk: wish(over="prompt", bound="0.1"), "bound and renormalize are for a latent"),
    "a study of one": (lambda desk: make_study(desk, "base", ASKED, ["x"], 1, [BASE], "s"), "at least two contestants"),
    "a study of nothing": (lambda desk: make_study(desk, "base", ASKED, [], 1, [BASE, "one"], "s"), "these are 0 pairs"),
    "no study": (lambda desk: pairs(desk.shelf, "tuned"), "unknown study 'tuned'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, kept: Desk) -> None:
    do, said = BAD[name]
    with pytest.raises(cr.UserError) as caught:
        do(kept)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (kept.shelf.folder / "x").exists() and not (kept.shelf.folder / "s").exists()


def test_the_command_without_the_extra_is_one_line(chainrule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.cli.studio.find_spec", lambda name: None)
    found = chainrule("ui")
    assert (found.code, found.err) == (2, "error: the studio needs gradio; pip install 'chainrule[ui]'\n")
