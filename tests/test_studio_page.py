"""The studio's page, as programs and browsers see it. It needs the extra `ui`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")

from gradio_client import Client, handle_file
from test_studio import ASKED, STEPS, array, drawn, made, plain

from chainrule.studio import Desk
from chainrule.studio.served import started
from chainrule.studio.showing import BASE, make_study

ASK = ["base", ASKED.prompt, ASKED.seed, STEPS, "2"]
NONE = ["", 1, 0, STEPS]
ONE = ["one", 0.5, 0, STEPS]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return made(tmp_path_factory.mktemp("page") / "runs")


@pytest.fixture(scope="module")
def address(desk: Desk) -> Iterator[str]:
    with started(desk, "127.0.0.1", 0) as where:
        yield where.rstrip("/")


@pytest.fixture(scope="module")
def client(address: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("answers")))


def pixels(path: str) -> Any:
    return array(Image.open(path).convert("RGB"))


def test_sampling_through_the_page_is_plain_sampling(client: Client, desk: Desk) -> None:
    base, shown = client.predict(*ASK, *ONE, *NONE, *NONE, api_name="/sample")
    assert (pixels(base) == drawn(plain(desk))).all() and (pixels(shown) == drawn(plain(desk, one=0.5))).all()
    about, _, own = client.predict("base", api_name="/look")
    assert about.startswith(f"{desk.shelf.folder / 'base'}: 16 × 16 pixels, ddim, {STEPS} steps") and own == ""


def test_a_grid_a_mix_and_a_report(client: Client, desk: Desk) -> None:
    sheet = client.predict(*ASK, *ONE, *NONE, *NONE, 2, api_name="/grid")
    assert Image.open(sheet["value"] if isinstance(sheet, dict) else sheet).width > 300
    said = client.predict(STEPS, *ONE, *NONE, *NONE, "half", api_name="/mix")
    assert said.startswith("saved: ") and "half" in desk.shelf.adapters()
    frame = client.predict("tuned", api_name="/report")
    assert 'sandbox=""' in frame and "symmetry" in unescape(frame)


def test_steering_through_the_page_comes_moment_by_moment_and_stops(client: Client) -> None:
    job = client.submit(*ASK, *ONE, *NONE, *NONE, "symmetry", "latent", "sdo", 3, 0.05, "", "", api_name="/steer")
    *_, curve, about, _ = job.result(timeout=60)
    assert about.startswith("done: update 3 of 3") and "<svg" in curve and len(job.outputs()) == 4
    job = client.submit(*ASK, *NONE, *NONE, *NONE, "symmetry", "latent", "sdo", 2000, 0.05, "", "", api_name="/steer")
    while not job.outputs():
        pass
    client.predict(api_name="/stop")
    assert job.result(timeout=60)[3].startswith("stopped: update ")


def test_a_study_is_made_and_counted_through_the_page(client: Client, desk: Desk, tmp_path: Path) -> None:
    client.predict("base", 0, STEPS, "", [BASE, "one"], 1, "study", "a fox\n\na bee", api_name="/study")
    key = json.loads((desk.shelf.folder / "study" / "key.json").read_text())
    votes = tmp_path / "votes.json"
    votes.write_text(json.dumps({"study": key["study"], "voter": "v", "votes": {"0": "left", "1": "none"}}))
    assert "of 1 votes, 1 for neither, 1 person" in client.predict("study", [handle_file(votes)], api_name="/count")


def test_bad_input_is_the_errors_line_and_no_traceback(client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    steer = ["latent", "sdo", 3, 0.05, "", ""]
    for api, values, said in (
        ("/sample", [*ASK[:4], "much", *ONE, *NONE, *NONE], "guidance is 'much', but must be a number"),
        ("/sample", ["../base", *ASK[1:], *ONE, *NONE, *NONE], "unknown model '../base'"),
        ("/steer", [*ASK, *NONE * 3, f"{code}:bright", *steer], "names code, which the page does not run"),
        ("/steer", [*ASK, *NONE * 3, "symetry", *steer], "did you mean 'symmetry'"),
        ("/mix", [STEPS, *ONE, *NONE, *NONE, "../out"], "the name is '../out'"),
        ("/report", ["/etc"], "unknown run '/etc'"),
        ("/grid", [*ASK, *NONE * 3, 2], "a grid shows one adapter or two, not 0"),
    ):
        with pytest.raises(Exception, match=re.escape(said)) as caught:
            client.predict(*values, api_name=api)
        assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value).strip()
    assert "Traceback" not in "".join(capfd.readouterr()) and not (tmp_path / "ran").exists()


def status(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_of_the_disk_is_served_and_no_other_name_is_answered(address: str, desk: Desk) -> None:
    inside = desk.shelf.folder / "tuned" / "config.yaml"
    for path in ("/etc/passwd", Path(__file__), inside, "pyproject.toml", f"{inside.parent}/../tuned/config.yaml"):
        assert status(f"{address}/gradio_api/file={path}") in (403, 404), path
    assert status(address) == 200 and status(address, "elsewhere.example") == 400
    told = desk.shelf.folder / "told.json"  # a file of votes that nobody uploaded
    told.write_text(json.dumps({"study": "x", "voter": "v", "votes": {}}))
    make_study(desk, "base", ASKED, ["a fox"], 1, [BASE, "one"], "another")
    data = json.dumps({"data": ["another", [{"path": str(told), "meta": {"_type": "gradio.FileData"}}]]}).encode()
    post = urllib.request.Request(f"{address}/gradio_api/call/count", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(post, timeout=20) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/gradio_api/call/count/{event}", timeout=20) as answer:
        said = answer.read().decode()
    assert "event: error" in said and "another study" not in said  # which is what reading it would say


def test_the_page_names_nothing_to_fetch_from_elsewhere_and_says_so_to_the_browser(address: str) -> None:
    with urllib.request.urlopen(address, timeout=20) as answer:
        page, policy = answer.read().decode(), answer.headers["content-security-policy"]
    fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//(?!127\.0\.0\.1)[^"]*"', page)
    assert not fetched and "default-src 'self'" in policy and "http" not in policy
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", page, re.DOTALL)[1])  # type: ignore[index]
    assert config["analytics_enabled"] is False


@pytest.mark.heavy
def test_the_command_serves_until_it_is_told_to_end_and_leaves_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "chainrule", "ui", "--port", "0", "--folder", str(tmp_path / "runs")]
    there = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, env=there, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout
        address = re.search(r"http://127\.0\.0\.1:\d+", command.stdout.readline())
        assert address and status(address[0]) == 200 and list(tmp_path.glob("chainrule-*"))
        command.send_signal(signal.SIGTERM)
        assert command.stdout.read() == "the studio is closed\n" and command.wait(30) == 0
    assert not list(tmp_path.glob("chainrule-*"))


@contextmanager
def browsed(address: str) -> Iterator[Any]:
    """The page in Debian's Chromium through Playwright, both optional. Nothing may fail in it, or come from elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        pytest.skip("no chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        page, asked, problems = browser.new_page(viewport={"width": 1360, "height": 1000}), set(), []
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.add(request.url) if request.url.startswith("http") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.locator("#about", has_text="pixels").wait_for()
        yield page
        browser.close()
    assert not problems and {url.split("/")[2] for url in asked} == {address.split("/")[2]}


def choose(page: Any, label: str, name: str) -> None:
    page.get_by_label(label, exact=True).fill(name)
    page.get_by_role("option", name=name, exact=True).click()


@pytest.mark.heavy
def test_a_person_samples_with_an_adapter_and_steers_in_a_browser(address: str) -> None:
    with browsed(address) as page:
        choose(page, "Adapter 2", "one")
        page.get_by_role("button", name="Sample", exact=True).click()
        page.locator(".shown img").nth(1).wait_for()
        page.get_by_role("tab", name="Steer one image").click()
        page.get_by_label("Reward, or a sum of rewards").fill("symmetry")
        page.keyboard.press("Enter")
        page.get_by_label("Updates").fill("3")
        page.get_by_role("button", name="Steer", exact=True).click()
        page.get_by_text("done: update 3 of 3; symmetry").wait_for()
        assert page.locator(".curve svg").is_visible()
        page.get_by_label("Reward, or a sum of rewards").fill("<i>x</i>.py:f")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Steer", exact=True).click()
        page.get_by_text("the reward '<i>x</i>.py:f' names code, which the page does not run").wait_for()


@pytest.mark.heavy
def test_a_person_follows_a_run_and_votes_in_a_browser(address: str, desk: Desk, tmp_path: Path) -> None:
    make_study(desk, "base", ASKED, ["a fox"], 2, [BASE, "one"], "taste")
    with browsed(address) as page:
        page.get_by_role("tab", name="Report").click()
        choose(page, "Run", "tuned")
        report = page.frame_locator("iframe[title=report]")
        report.get_by_text("trained for symmetry").first.wait_for()
        page.get_by_label("Follow a run under way").check()
        (desk.shelf.folder / "tuned" / "plan.txt").write_text("a plan that came later ${6 * 7} {{6 * 7}} <b>")
        report.get_by_text("a plan that came later ${6 * 7} {{6 * 7}} <b>").wait_for()  # no template, no HTML
        page.get_by_role("tab", name="Vote").click()
        choose(page, "Study", "taste")
        pairs = page.frame_locator("iframe[title='pairs to vote on']")
        pairs.locator("#left").click()
        pairs.locator("#none").click()
        with page.expect_download() as download:
            pairs.locator("#save").click()
        download.value.save_as(tmp_path / "votes.json")
        page.locator("input[type=file]").set_input_files(tmp_path / "votes.json")
        page.get_by_text("votes.json").first.wait_for()
        page.get_by_role("button", name="Count the saved votes").click()
        page.get_by_text("of 1 votes, 1 for neither, 1 person").wait_for()
