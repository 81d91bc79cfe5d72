"""The report's main curves, its alarm, its first lines and its page of several runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.evaluate import Table
from chainrule.report import report
from chainrule.report.curves import LINE, Curve, apart, bands
from chainrule.report.guard import alarm
from chainrule.report.watched import Watched, watched_of
from chainrule.report.words import MINUS
from chainrule.runs import Run

YES = "Yes: the trained reward and another rose by more than chance."
PROMPTS = [f"prompt {i}" for i in range(8)]
BASE = {"reward": 4.0, "held_out": 0.4, "diversity": 0.18, "edges": 0.05, "colors": 3.0, "brightness": 0.5, "saturation": 0.3}
BASE |= {"sharpness": 0.05}


def rows(last: dict[str, float], *, spread: float = 0.05, extra: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Grids of 8 prompts that lie far apart: each measure goes from `BASE` to `last`, give or take a share `spread` of it."""
    rng, same = np.random.default_rng(seed), np.random.default_rng(0)
    offsets = {name: same.normal(0, 0.3, 8 + extra) * mean for name, mean in BASE.items()}
    found = []
    for step in (0, 5, 10):
        values = {}
        for name, mean in BASE.items():
            now = mean + (last.get(name, mean) - mean) * step / 10
            values[name] = (now + offsets[name] + (step > 0) * rng.normal(0, spread * mean, 8 + extra)).tolist()
        prompts = [*PROMPTS, *(f"new {i}" for i in range(extra))]
        found.append({"step": step, "prompts": prompts, "trained": [True] * 8 + [False] * extra, "extra": extra, "values": values})
    return found


def watched(last: dict[str, float], **options: Any) -> Watched:
    found, _ = watched_of(rows(last, **options))
    assert found is not None
    return found


def run_of(folder: Path, last: dict[str, float], **options: Any) -> Run:
    config = {"method": "draft-lv", "reward": "pickscore", "held_out": "hpsv2", "prompts": "animals:train", "lr": 4e-4, **options}
    run = Run.create(folder, FinetuneConfig.of(config))
    for row in rows(last, extra=8, seed=round(1e5 * run.config.settings.lr)):
        run.watch(row)
    for step in range(1, 11):
        run.log({"step": step, "reward": 4.0, "seconds": 2.0, "skipped": 0})
    run.adapter.mkdir()
    run.samples.mkdir()
    for name in ("before", "after", "before_after", "unseen"):
        Image.new("RGB", (64, 64), "teal").save(run.samples / f"{name}.png")
    return run


def test_a_change_is_paired_by_prompt_as_students_test_has_it() -> None:
    some = watched({"reward": 4.4})
    first, last = np.array(some.column("reward", 0)), np.array(some.column("reward", -1))
    found, theirs = some.change("reward"), stats.ttest_rel(last, first).confidence_interval()
    assert found.mean == pytest.approx((last - first).mean())
    assert found.mean - found.interval == pytest.approx(theirs.low, abs=2e-3)
    alone = stats.ttest_ind(last, first).confidence_interval()
    assert theirs.low > 0 > alone.low  # what the noise between prompts would hide
    assert next(half for _, _, half in some.curve("reward")) == 0


@pytest.mark.parametrize(
    "hurt", [{"held_out": 0.3}, {"diversity": 0.1}, {"edges": 0.2, "sharpness": 0.2}, {"colors": 1.0}], ids=str
)
def test_a_reward_that_rises_while_something_else_gets_worse_is_an_alarm(hurt: dict[str, float]) -> None:
    found = alarm(watched({"reward": 6.0, **hurt}))
    assert found and found.step in (5, 10) and len(found.seen) == len(hurt)
    assert alarm(watched({"reward": 4.0, **hurt})) is None  # a reward that does not rise


def test_pictures_that_become_brighter_and_more_colorful_are_no_alarm() -> None:
    assert alarm(watched({"reward": 6.0, "held_out": 0.5, "diversity": 0.3, "saturation": 0.9, "brightness": 0.9})) is None


def test_chance_is_hardly_ever_an_alarm() -> None:
    assert sum(alarm(watched({"reward": 6.0}, spread=0.3, seed=seed)) is not None for seed in range(300)) <= 3


def test_rows_of_something_else_and_missing_numbers_are_passed_over() -> None:
    good = rows({"reward": 6.0})
    good[1]["values"]["reward"][3] = None
    some, unseen = watched_of([{"step": 1}, {"step": "x", "prompts": [], "values": {}}, *good])
    assert some and unseen is None and some.steps == [0, 5, 10] and len(some.column("reward", 0)) == 7
    assert watched_of([]) == (None, None)


class Words(HTMLParser):
    """A page's words as a reader meets them, a line for each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.feed(page.partition("<body>")[2])

    def handle_data(self, data: str) -> None:
        self.lines += [data.strip()] if data.strip() else []


def test_the_first_lines_answer_a_strangers_four_questions(tmp_path: Path) -> None:
    run = run_of(tmp_path / "pick", {"reward": 6.0, "held_out": 0.6})
    first = "\n".join(Words(report(run.folder).read_text(encoding="utf-8")).lines[:14])
    for said in ("A LoRA adapter of rank 8 for tiny-emoji", "pickscore", "animals:train", "draft-lv"):
        assert said in first
    assert re.search(
        re.escape(YES) + r" On 8 prompts that it was not trained on, one image each: the trained reward \+",
        first,
    )
    assert "20 s of training: 10 updates of 8 images, 2 s each." in first and "chainrule sample pick --prompts" in first
    assert "chainrule eval pick --prompts animals:test" in first
    told = {
        "prompts": ["new 0", "new 1"],
        "rows": [{"name": "after", "metrics": {"pickscore": 4.0}}],
        "gains": {"pickscore": {"mean": 0.1, "interval": 0.2}},
    }
    run.write_text("evaluation.json", json.dumps(told))
    said = "Not shown: the reward rose, but the interval reaches zero, so it may be chance. On 2 prompts that it was not trained on"
    assert said in report(run.folder).read_text()
    told["gains"] = {"pickscore": {"mean": 0.3, "interval": 0.2}, "diversity": {"mean": -0.3, "interval": 0.2}}
    run.write_text("evaluation.json", json.dumps(told))
    assert "Its reward rose, but at a price: diversity fell. On 2" in report(run.folder).read_text()
    run.write_text("evaluation.json", json.dumps({**told, "rows": [{"name": "after", "metrics": {"aesthetic": 4.0}}]}))
    assert "The trained reward was not measured. On 2" in report(run.folder).read_text()
    run.write_text("evaluation.json", json.dumps({**told, "prompts": ["new 0", "prompt 1"]}))
    assert "Some of them were trained on" in report(run.folder).read_text()


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ({"pickscore": (0.3, 0.2), "hpsv2": (0.1, 0.05), "diversity": (0.0, 0.1)}, YES),
        ({"pickscore": (0.3, 0.2), "hpsv2": (0.1, 0.1)}, "Its reward rose. That other rewards rose too is not shown"),
        ({"pickscore": (0.3, 0.2), "hpsv2": (-0.1, 0.1), "aesthetic": (0.2, 0.1)}, YES),
        ({"pickscore": (0.3, 0.2), "diversity": (0.3, 0.1)}, "Its reward rose. No other reward was measured"),
        ({"pickscore": (0.2, 0.2)}, "Not shown: the reward rose, but the interval reaches zero"),
        ({"pickscore": (-0.1, 0.2), "hpsv2": (0.1, 0.05)}, "Not shown: the reward fell, but the interval reaches zero"),
        ({"pickscore": (0.3, None)}, "Not shown: the reward rose, but one prompt has no interval"),
        ({"pickscore": (-0.3, 0.2)}, "No: the reward fell."),
    ],
)  # fmt: skip
def test_the_verdict_is_no_stronger_than_the_intervals(
    tmp_path: Path, gains: dict[str, tuple[float, float | None]], verdict: str
) -> None:  # fmt: skip
    run = run_of(tmp_path / "run", {"reward": 6.0})
    told = {name: {"mean": mean, "interval": half} for name, (mean, half) in gains.items()}
    metrics = {name: {"mean": 4.0, "interval": 0.5} for name in gains}
    run.write_text(
        "evaluation.json", json.dumps({"prompts": ["new 0"], "rows": [{"name": "after", "metrics": metrics}], "gains": told})
    )
    assert verdict in "\n".join(Words(report(run.folder).read_text(encoding="utf-8")).lines[:14])


def test_a_gain_is_put_beside_how_far_prompts_lie_apart(tmp_path: Path) -> None:
    """Of watched values by numpy; of an evaluation's by the interval that its own code makes of the same values."""
    run = run_of(tmp_path / "run", {"reward": 6.0, "held_out": 0.5, "diversity": 0.27})
    _, some = watched_of(run.watched())
    assert some
    before, after = (np.array([np.array(some.values[name])[at] for name in ("reward", "held_out")]) for at in (0, -1))
    share = (after - before).mean(1) / before.std(1, ddof=1)
    text = "\n".join(Words(report(run.folder).read_text(encoding="utf-8")).lines[:16])
    assert f"the change is: the trained reward {share[0]:+.2f}, the held-out reward {share[1]:+.2f}. By a rule of thumb" in text
    apart = np.array(some.values["diversity"]).mean(1)
    moved = f"It changed by {100 * (apart[-1] / apart[0] - 1):+.0f}%."
    assert f"those of the other prompts, from 0, all alike, to 1, one black and one white. {moved}" in text

    values = {"before": {"pickscore": [18.0, 20.5, 19.0, 22.0], "diversity": [0.2] * 4}}
    values["after"] = {"pickscore": [19.0, 21.0, 20.0, 23.5], "diversity": [0.15] * 4}
    Table.of([f"new {i}" for i in range(4)], values).save(run.folder / "evaluation.json")
    text = "\n".join(Words(report(run.folder).read_text(encoding="utf-8")).lines[:16])
    assert f"the change is: pickscore {1 / np.std([18.0, 20.5, 19.0, 22.0], ddof=1):+.2f}. By" in text
    assert (
        f"the images of one prompt are apart, from 0, all alike, to 1, one black and one white. It changed by {MINUS}25%." in text
    )


def test_what_else_changed_is_said_unless_the_warning_says_it(tmp_path: Path) -> None:
    louder = report(run_of(tmp_path / "louder", {"reward": 6.0, "saturation": 0.5}).folder).read_text(encoding="utf-8")
    assert re.search(r"look different, by more than chance: saturation 0\.\d+ to 0\.\d+\.", louder)
    assert "look different" not in report(run_of(tmp_path / "same", {"reward": 6.0}).folder).read_text(encoding="utf-8")
    warned = report(run_of(tmp_path / "warned", {"reward": 6.0, "edges": 0.3}).folder).read_text(encoding="utf-8")
    assert "look different" not in warned and "edge density went from" in warned


def test_pictures_say_what_is_above_and_what_is_below(tmp_path: Path) -> None:
    page = report(run_of(tmp_path / "run", {"reward": 6.0}).folder).read_text(encoding="utf-8")
    rows = "Top: the model as it was. Bottom: after 10 updates. The noise is the same."
    assert page.count(f"<figcaption>Prompts that it was not trained on. {rows}") == 1
    assert page.count(f"<figcaption>The watched prompts: the same prompts and seeds all along. {rows}") == 1


def test_a_page_says_what_looks_like_hacking_before_all_else(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", {"reward": 6.0, "edges": 0.3})
    page = report(run.folder).read_text(encoding="utf-8")
    assert page.index("It may be hacking its reward.") < page.index("What was trained") and "edge density went from" in page
    assert "Yes: the trained" not in page and page.count('class="band') == len(BASE) and "<td>" in page.partition("By prompt")[2]


def test_several_runs_are_one_page(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "one", {"reward": 5.0}), run_of(tmp_path / "two", {"reward": 6.0}, lr=1e-3)
    path = report(one.folder, two.folder)
    page = path.read_text(encoding="utf-8")
    assert path == one.folder / "compared.html" and "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert "They were watched on the same prompts and seeds" in page and "two over one" in page
    a, b = one.watched()[-1]["values"]["reward"][:8], two.watched()[-1]["values"]["reward"][:8]
    over = np.subtract(b, a).mean()
    assert f"+{over:.2f} ±" in page or f"+{over:.1f} ±" in page
    assert page.count('class="band c1"') == page.count('class="band c0"') == 2 * len(BASE)  # over updates, and over seconds
    assert "lr" in page.partition("Settings that differ")[2] and page.count("<img") == 5
    Run.create(one.folder, one.config, overwrite=True)  # the page is known as a run's own
    assert not path.exists()


def test_runs_of_other_prompts_are_not_compared_value_by_value(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "one", {}), run_of(tmp_path / "two", {})
    two.write_text("watched.jsonl", (two.folder / "watched.jsonl").read_text().replace("prompt 3", "another"))
    page = report(one.folder, two.folder).read_text(encoding="utf-8")
    assert "They were not watched on the same" in page and "two over one" not in page
    with pytest.raises(UserError, match="given twice"):
        report(one.folder, one.folder / ".")


def test_labels_keep_clear_of_each_other() -> None:
    for places in ([50.0, 50.0, 51.0], [10.0, 190.0, 189.0, 188.0], [100.0]):
        found = apart(places, 12, 184)
        ordered = [found[i] for i in np.argsort(places, kind="stable")]
        assert all(b - a >= LINE - 1e-9 for a, b in pairwise(ordered)) and 12 <= min(found) <= max(found) <= 184
    drawing = bands(
        [Curve(points=[(0, 1, 0), (9, 2, 0.5)], name="<a>"), Curve(points=[(0, 1, 0), (9, 2, 0.1)], color=1)], title="T"
    )
    heights = [float(y) for y in re.findall(r'class="value c\d" x="[\d.]+" y="([\d.]+)"', drawing)]
    assert len(heights) == 2 and abs(heights[0] - heights[1]) >= LINE - 0.1 and "&lt;a&gt;" in drawing
    assert bands([], title="T") == "" and bands([Curve(points=[])], title="T") == ""
