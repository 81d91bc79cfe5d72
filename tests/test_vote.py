"""A blind preference study: what the page shows and keeps to itself, and how votes are counted."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pipelines import make_pipeline

import chainrule as cr
from chainrule.estimate import wilson
from chainrule.vote import Outcome, count, study

PROMPTS = ["a fox", "two </script> bees", "a cat"]
COLORS = {"base_m": 40, "tuned_m": 120, "other_m": 200}


def pictures() -> dict[str, list[Image.Image]]:
    """Each contestant's in its own color, a little different for every prompt."""
    return {name: [Image.new("RGB", (8, 8), (shade + i, 0, 0)) for i in range(3)] for name, shade in COLORS.items()}


def told(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def shade(embedded: str) -> int:
    return int(Image.open(io.BytesIO(base64.b64decode(embedded.partition(",")[2]))).getpixel((0, 0))[0])  # type: ignore[index]


def test_every_two_meet_at_every_prompt_and_the_key_alone_says_who_is_who(tmp_path: Path) -> None:
    page = study(pictures(), PROMPTS, tmp_path, seed=3)
    key, data = json.loads((tmp_path / "key.json").read_text()), told(page)
    assert not any(name in page.read_text() for name in COLORS)
    assert data["study"] == key["study"] and len(data["pairs"]) == 9
    for shown, truth in zip(data["pairs"], key["pairs"], strict=True):
        i = PROMPTS.index(truth["prompt"])
        assert shown["prompt"] == truth["prompt"]
        assert [shade(shown[side]) for side in ("left", "right")] == [COLORS[truth[side]] + i for side in ("left", "right")]
    meetings = {(frozenset((p["left"], p["right"])), p["prompt"]) for p in key["pairs"]}
    assert meetings == {(frozenset(two), prompt) for two in itertools.combinations(COLORS, 2) for prompt in PROMPTS}
    orders = {tuple(p["left"] for p in json.loads((study(pictures(), PROMPTS, tmp_path / str(s), seed=s).parent / "key.json")
              .read_text())["pairs"]) for s in range(6)}  # fmt: skip
    assert len(orders) > 3


def votes(folder: Path, voter: str, choose: Any) -> Path:
    """The file of a person who looks at the key, which a real one cannot."""
    key = json.loads((folder / "key.json").read_text())
    given = {str(i): choose(pair) for i, pair in enumerate(key["pairs"])}
    path = folder / f"votes-{voter}.json"
    path.write_text(json.dumps({"study": key["study"], "voter": voter, "votes": {k: v for k, v in given.items() if v}}))
    return path


def side(name: str) -> Any:
    return lambda pair: next((each for each in ("left", "right") if pair[each] == name), "none")


def test_votes_of_several_people_are_joined(tmp_path: Path) -> None:
    study(pictures(), PROMPTS, tmp_path)
    one, two = (
        votes(tmp_path, "one", side("tuned_m")),
        votes(tmp_path, "two", lambda pair: side("base_m")(pair) if pair["prompt"] == "a fox" else None),
    )
    by = {(o.first, o.second): o for o in count(tmp_path, [one, two])}
    assert by["base_m", "tuned_m"] == Outcome("base_m", "tuned_m", wins=1, losses=3, neither=0, people=2)
    assert by["other_m", "tuned_m"] == Outcome("other_m", "tuned_m", wins=0, losses=3, neither=1, people=2)
    assert by["base_m", "other_m"] == Outcome("base_m", "other_m", wins=1, losses=0, neither=3, people=2)
    assert str(by["base_m", "tuned_m"]) == "base_m over tuned_m: 25.0% (4.6 to 69.9) of 4 votes, 0 for neither, 2 people"
    assert str(Outcome("a", "b", 0, 0, 2, 1)) == "a or b: no vote decided"


def test_wilsons_interval_solves_its_equation() -> None:
    for wins, trials in ((1, 4), (0, 7), (60, 100), (9, 9)):
        for end in wilson(wins, trials):
            assert abs(wins / trials - end) == pytest.approx(1.959964 * (end * (1 - end) / trials) ** 0.5, abs=1e-9)


def test_files_that_do_not_count_are_one_line(tmp_path: Path) -> None:
    study(pictures(), PROMPTS, tmp_path / "a")
    study(pictures(), PROMPTS, tmp_path / "b", seed=1)
    one, other = votes(tmp_path / "a", "one", side("tuned_m")), votes(tmp_path / "b", "one", side("tuned_m"))
    wrong = tmp_path / "wrong.json"
    key = json.loads((tmp_path / "a/key.json").read_text())
    for files, said in (
        ([other], "of another study"),
        ([one, one], "of a person whose votes"),
        ([], "no votes"),
        ([wrong], "cannot read"),
    ):
        with pytest.raises(cr.UserError, match=said):
            count(tmp_path / "a", files)
    for number, vote in (("99", "left"), ("0", "up"), ("x", "left")):
        wrong.write_text(json.dumps({"study": key["study"], "voter": "v", "votes": {number: vote}}))
        with pytest.raises(cr.UserError, match="damaged"):
            count(tmp_path / "a", [wrong])
    wrong.write_text("[1]")
    with pytest.raises(cr.UserError, match="no file of a study"):
        count(tmp_path / "a", [wrong])
    with pytest.raises(cr.UserError, match="at least two contestants"):
        study({"one": []}, [], tmp_path / "c")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chainrule: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 0), ("two", 1)):
        make_pipeline(seed=seed).save_pretrained(name)
    options = ["--prompts", "a fox", "--seeds", "2", "--steps", "2", "--out", "v"]
    found = chainrule("vote", "one", "two", *options)
    assert found.code == 0 and "2 pairs in v/vote.html" in found.out, found.err
    found = chainrule("votes", "v", str(votes(Path("v"), "me", side("two"))))
    assert found.out == "one over two: 0.0% (0.0 to 65.8) of 2 votes, 0 for neither, 1 person\n"
    for words, said in ((["one"], "at least two"), (["one", "one"], "given twice"), (["one", "two"], "is there already")):
        refused = chainrule("vote", *words, *options)
        assert refused.code == 2 and said in refused.err, refused.err


@pytest.mark.heavy
def test_a_person_votes_by_keyboard_and_by_mouse_in_a_browser(tmp_path: Path) -> None:
    """In Debian's Chromium, offline, through Playwright; both are optional (`pip install playwright`, `apt install chromium`)."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        pytest.skip("no chromium")
    page_file = study(pictures(), PROMPTS, tmp_path)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 380, "height": 700}, offline=True)
        page, problems = context.new_page(), []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(page_file.as_uri())
        for key in ("ArrowLeft", "ArrowRight", "Backspace", "ArrowDown"):
            page.keyboard.press(key)
        page.locator("#right").click()
        page.reload()  # what was voted is kept
        assert page.locator("#progress").inner_text() == "3 of 9 pairs voted on"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        for _ in range(6):
            page.keyboard.press("ArrowLeft")
        assert page.locator("#end").is_visible() and not page.locator("#pair").is_visible()
        with page.expect_download() as download:
            page.keyboard.press("s")
        download.value.save_as(tmp_path / "votes.json")
        browser.close()
    assert not problems
    saved = json.loads((tmp_path / "votes.json").read_text())["votes"]
    assert saved == {"0": "left", "1": "none", "2": "right", **{str(i): "left" for i in range(3, 9)}}
    assert sum(o.wins + o.losses + o.neither for o in count(tmp_path, [tmp_path / "votes.json"])) == 9
