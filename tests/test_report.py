"""The report holds everything in one page, shows whatever part there is, and lets no text out of its quotes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.methods import describe
from chainrule.report import before_after, grid, report
from chainrule.report.charts import intervals, line, smooth, ticks
from chainrule.report.pictures import cell_size, wrapped
from chainrule.report.words import duration, measured, number, phrase
from chainrule.runs import Run

CONFIG = {
    "method": {"name": "DRaFTLV", "n": 2},
    "reward": "PickScore()",
    "model": "tiny-emoji",
    "lr": 4e-4,
    "prompts": [f"prompt {index}" for index in range(45)],
}
EVALUATION = {
    "prompts": ["a fox", "a <script>alert(1)</script> owl"],
    "rows": [
        {"name": name, "metrics": {"aesthetic": {"mean": 5.1, "interval": 0.1}, "pickscore:tiny": trained}}
        for name, trained in (("before", {"mean": 1.2, "interval": 0.05}), ("after", {"mean": 1.7, "interval": 0.04}))
    ],
    "gains": {"pickscore:tiny": {"mean": 0.5, "interval": 0.06}},
}


class Tags(HTMLParser):
    """Collects a page's tags, and checks that they are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def picture(size: tuple[int, int] = (64, 64), color: str = "teal") -> Image.Image:
    return Image.new("RGB", size, color)


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "reward": step / 10,
            "loss": -step / 10,
            "grad_norm": 0.3,
            "lr": 4e-4,
            "seconds": 2.0,
            "skipped": 0,
        }
        for step in range(1, count + 1)
    ]


@pytest.fixture
def full(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "pick", FinetuneConfig.of(CONFIG))
    for row in rows(40):
        run.log({**row, "terms": {"pickscore": row["reward"], "<b>odd</b>": 1.0}})
    run.write_text("evaluation.json", json.dumps(EVALUATION))
    run.write_text("plan.txt", "--------[##]   <two> calls\n")
    run.samples.mkdir()
    run.adapter.mkdir()
    picture().save(run.samples / "before_after.png")
    for step in range(0, 400, 10):
        picture().save(run.samples / f"step-{step:06d}.png")
    return run


def test_a_full_page_is_self_contained(full: Run) -> None:
    path = report(full.folder)
    page = path.read_text(encoding="utf-8")
    tags = Tags(page)
    assert path == full.folder / "report.html"
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in tags.found}
    for _, attributes in tags.found:
        assert "href" not in attributes
        assert str(attributes.get("src", "data:image/")).startswith("data:image/")
    assert len(tags.of("img")) == 1 + 12
    assert "prefers-color-scheme: dark" in page


def test_a_learned_guidance_is_drawn(full: Run) -> None:
    place = full.adapter / "learned" / "guidance"
    place.mkdir(parents=True)
    told = {"guidance": 7.5, "schedule": [[900.0, 7.0], [500.0, 8.25], [100.0, 6.5]]}
    (place / "guidance.json").write_text(json.dumps(told))
    page = report(full.folder).read_text(encoding="utf-8")
    assert "Guidance scale: 7" in page and "to 6.5" in page.partition("Guidance scale: ")[2][:40] and "over steps 1 to 3" in page
    for damaged in ("[[1", "[]", '{"guidance": null, "schedule": [[1]]}', '{"guidance": {"scale": "x"}, "schedule": 3}'):
        (place / "guidance.json").write_text(damaged)
        assert "Guidance scale" not in report(full.folder).read_text(encoding="utf-8")


def test_a_full_page_shows_what_the_run_holds(full: Run) -> None:
    page = report(full.folder).read_text(encoding="utf-8")
    for words in (
        "DRaFTLV(n=2)",
        "tiny-emoji, trained for PickScore()",
        "Reward, pickscore:tiny",
        "Held-out, aesthetic",
    ):
        assert words in page
    assert "1.200 ± 0.050 →" in page and "change +0.500 ± 0.060" in page and "(45 in all)" in page
    assert "chainrule sample pick --prompts" in page and "load_lora_weights" not in page  # no card, and nothing made up
    assert "After 0 updates<" in page and "After 390 updates<" in page and "Seconds per update" in page
    assert "Learning rate" not in page and "Skipped" not in page
    assert page.index("Reward, pickscore:tiny") < page.index("Held-out, aesthetic")


def test_names_of_this_library_are_explained_and_others_are_not(full: Run) -> None:
    config = {**CONFIG, "method": {"name": "sdo", "samples": 2}, "reward": "mine.py:clip + symmetry"}
    full.write_text("config.yaml", json.dumps(config))
    told = report(full.folder).read_text(encoding="utf-8").partition("What the names mean")[2].partition("</dl>")[0]
    for words in (f"sdo: {describe('sdo').partition(' `')[0]}", "symmetry: left-right symmetry.", "pickscore: which of two"):
        assert words in told
    assert "clip:" not in told
    full.write_text("config.yaml", json.dumps({**CONFIG, "reward": "mine.py:clip"}))
    full.write_text("evaluation.json", json.dumps({**EVALUATION, "gains": {}}))
    assert "What the names mean" not in report(full.folder).read_text(encoding="utf-8")


def test_held_out_is_only_said_of_what_was_not_trained_on(full: Run) -> None:
    for reward, words in (
        ("10 * PickScore() + Aesthetic()", ("Reward, pickscore:tiny", "Reward, aesthetic")),
        ("Aesthetic()", ("Reward, aesthetic", "Held-out, pickscore:tiny")),
        ("mine", ("Reward, aesthetic", "<dt>pickscore:tiny</dt>")),
    ):
        full.write_text("config.yaml", json.dumps({**CONFIG, "reward": reward}))
        page = report(full.folder).read_text(encoding="utf-8")
        assert all(word in page for word in words)
        assert ("Held-out," in page) == (reward == "Aesthetic()")


def test_texts_from_outside_are_escaped(full: Run) -> None:
    page = report(full.folder).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<b>" not in page and "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "<two>" not in page and "[##]   &lt;two&gt; calls" in page


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_metrics_alone_make_a_page(tmp_path: Path, count: int) -> None:
    run = Run(tmp_path / "bare")
    run.prepare()
    run.write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows(count)))
    page = report(run.folder).read_text(encoding="utf-8")
    Tags(page)
    assert "<h1>bare</h1>" in page and "Reward in training" in page and "<svg" in page
    assert "<h2>Plan" not in page and "<h2>Pictures" not in page and "<h2>Config" not in page


def test_each_part_alone_makes_a_page(full: Run, tmp_path: Path) -> None:
    for name in ("config.yaml", "evaluation.json", "plan.txt", "metrics.jsonl"):
        part = Run(tmp_path / name)
        part.prepare()
        part.write_text(name, (full.folder / name).read_text(encoding="utf-8"))
        Tags(report(part.folder).read_text(encoding="utf-8"))


def test_odd_metrics_are_survived(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"step": 1, "reward": None, "held_out": {"a": 1.0, "b": 3.0}, "terms": None},
        {"reward": 1e-9, "seconds": 0.0, "skipped": 2},
        {"step": 3, "reward": -1e12, "held_out": 2.5, "terms": {"a": None}, "skipped": 0},
    ]
    run = Run.create(tmp_path / "run", FinetuneConfig())
    run.write_text("plan.txt", "")
    for row in odd:
        run.log(row)
    page = report(run.folder).read_text(encoding="utf-8")
    Tags(page)
    assert "Held-out reward" in page and "3 updates, 2 skipped" in page and "nan" not in page


def test_large_and_broken_pictures(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.samples.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (1200, 2400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.samples / "before.png", compress_level=1)
    (run.samples / "after.png").write_text("no picture")
    page = report(run.folder).read_text(encoding="utf-8")
    assert page.count("<img") == 1 and "data:image/jpeg" in page
    assert len(page) < (run.samples / "before.png").stat().st_size / 3


def test_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError):
            report(folder)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json"):
        report(tmp_path)


def test_the_report_imports_no_torch() -> None:
    code = "import sys, chainrule.report; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_grid_has_the_size_of_its_cells() -> None:
    assert cell_size([picture((64, 64))]) == (192, 192)
    assert cell_size([picture((1024, 512))]) == (512, 256)
    assert cell_size([picture((256, 128)), picture((128, 200))]) == (256, 200)
    sheet = grid([picture((200, 200), color) for color in ("red", "lime", "blue")], 2)
    assert sheet.size == (2 * 200 + 3 * 14, 2 * 200 + 3 * 14)
    centers = [sheet.getpixel((14 + 100 + column * 214, 14 + 100 + row * 214)) for row in (0, 1) for column in (0, 1)]
    assert centers == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    with_captions = grid([picture((200, 200))] * 3, 2, ["one", "two", "a very long caption " * 20])
    assert with_captions.width == sheet.width and with_captions.height > sheet.height
    assert grid([picture((200, 200))], 5).width == 200 + 2 * 14


def test_a_small_image_keeps_its_pixels_on_a_sheet() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sheet = np.asarray(grid([image], 1))
    margin = (sheet.shape[0] - 192) // 2
    assert np.array_equal(sheet[margin + 1 : margin + 192 : 3, margin + 1 : margin + 192 : 3], np.asarray(image))


def test_pairs_stand_one_above_the_other() -> None:
    sheet = before_after([picture((200, 200), "red")] * 2, [picture((200, 200), "blue")] * 2, ["a fox", "an owl"])
    pixels = np.asarray(sheet).reshape(-1, 3)
    for color in ((255, 0, 0), (0, 0, 255)):
        assert (pixels == color).all(axis=1).sum() == 2 * 200 * 200
    eight = before_after([picture()] * 8, [picture()] * 8, ["p"] * 8)
    four = before_after([picture()] * 4, [picture()] * 4, ["p"] * 4)
    assert eight.width == four.width and 1.9 < eight.height / four.height < 2.1


def test_grids_refuse_what_does_not_match() -> None:
    with pytest.raises(UserError):
        grid([], 2)
    with pytest.raises(UserError, match="2 captions for 1 images"):
        grid([picture()], 2, ["a", "b"])
    with pytest.raises(UserError, match="1 before, 0 after"):
        before_after([picture()], [], ["a"])


def test_captions_are_cut_to_their_lines() -> None:
    font = ImageFont.load_default(14)
    for text in ("", "fox", "a very long caption that goes on and on", "x" * 200, "a " + "x" * 200 + " b c"):
        lines = wrapped(text, 90, font)
        assert len(lines) <= 2 and all(font.getlength(entry) <= 90 for entry in lines)
    assert wrapped("a red fox", 300, font) == ["a red fox"]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == [0, 0.5, 1] or ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(1, 3, 6, whole=True) == [1, 2, 3]
    for low, high in ((-0.00013, 0.0004), (17, 911_111), (5, 5)):
        found = ticks(low, high)
        assert found and low <= min(found) <= max(found) <= high and len(found) <= 7


def test_the_mean_line_keeps_constants_and_straight_middles() -> None:
    assert np.allclose(smooth([2.0] * 50), 2.0)
    ramp = list(range(100))
    assert np.allclose(smooth(ramp)[20:80], ramp[20:80])
    for count in (1, 2, 13):
        assert len(smooth([1.0] * count)) == count


def test_a_curve_stays_inside_its_frame() -> None:
    points = [(float(step), math.sin(step / 9)) for step in range(3000)] + [(3000.0, float("nan")), (3001.0, None)]
    drawing = line(points, title="A & B", reference=1.5, reference_label="<base>")
    Tags(drawing)
    paths = re.findall(r' d="M([^"]+)"', drawing)
    assert len(paths) == 2 and "nan" not in drawing and "A &amp; B" in drawing and "&lt;base&gt;" in drawing
    places = np.array([[float(part) for part in pair.split(" ")] for path in paths for pair in path.split("L")])
    assert len(places) < 2000
    assert places.min() >= 0 and places[:, 0].max() <= 720 and places[:, 1].max() <= 260
    assert line([], title="") == "" and line([(1, None)], title="") == ""


def test_every_metric_has_a_bar_per_row() -> None:
    before, after = {"a": (1.0, 0.1), "b": (20.0, 0.0)}, {"a": (2.0, 0.1)}
    drawing = intervals([("before", before), ("<after>", after)], {"a": (1.0, 0.05)})
    Tags(drawing)
    assert drawing.count("<circle") == 3 and "+1.000 ± 0.050" in drawing and "&lt;after&gt;" in drawing
    assert intervals([]) == "" and intervals([("x", {})]) == ""


def test_numbers_are_worded_for_reading() -> None:
    worded = [number(value).replace("\N{MINUS SIGN}", "-") for value in (0.0, -0.5, 12345.6, 0.00012)]
    assert worded == ["0", "-0.500", "12,346", "1.20e-4"]
    assert number(None) == number(float("nan")) == "\N{EN DASH}"
    assert measured(21.3456, 0.12) == "21.35 ± 0.12" and measured(0.5, signed=True) == "+0.500"
    assert [duration(value) for value in (4.2, 42, 720, 12_000)] == ["4.2 s", "42 s", "12 min", "3 h 20 min"]
    assert phrase({"name": "Draft", "k": None}) == "Draft(k=\N{EN DASH})" and phrase([1, 2]) == "1, 2"
