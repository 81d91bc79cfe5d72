"""The pages say what is so: links lead somewhere, drawings are those of the plans, the site has every public name."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

import chainrule as cr
from chainrule import methods
from chainrule.plan import leading

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def check_links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_links_that_lead_nowhere_are_found(check_links, tmp_path):
    (tmp_path / "one.md").write_text(
        "# A page, with `code`\n\n[good](two.md#again-1) [bad](three.md) [no such heading](two.md#third)\n\n![gone](x.png) "
        "[here](#a-page-with-code) [out](../elsewhere.md)\n\n| a | b |\n|---|---|\n"
        "| [in a table](four.md) | `[code](five.md)` |\n\n"
        "```\n[code](six.md)\n```\n\n[elsewhere](https://example.org/nothing)\n"
    )
    (tmp_path / "two.md").write_text(
        "# Again\n\n## Again\n\n### Where-to go? (Now!)\n\n[self](one.md#nothing) [ok](#where-to-go-now)\n"
    )
    found = [re.sub(r":\d+", "", line) for line in check_links.broken(tmp_path)]
    assert found == [
        "one.md: three.md: no such file", "one.md: two.md#third: no such heading", "one.md: x.png: no such file",
        "one.md: ../elsewhere.md: no such file", "one.md: four.md: no such file", "two.md: one.md#nothing: no such heading",
    ]  # fmt: skip


def test_the_projects_own_links_lead_somewhere(check_links):
    assert len(check_links.pages(ROOT)) > 20
    assert not check_links.broken(ROOT)


DRAWN = re.findall(r"^\| `(\w+\(.*?\))` \| `(.+?)` \|", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("method", "drawing"), DRAWN, ids=[method for method, _ in DRAWN])
def test_a_drawing_is_that_of_the_plan(method, drawing):
    made = eval(method, vars(methods))
    assert str(made.plan(leading(12), Random(0))) == drawing.replace(r"\|", "|")


def test_every_published_method_is_drawn():
    assert {name.split("(")[0] for name, _ in DRAWN} == {kind.__name__ for kind in methods.REGISTRY.values()}


def test_the_container_is_made_of_files_that_are_there():
    """It is not built here; what it copies and the package's own licence files have to be in the repository."""
    told = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", told, re.MULTILINE) for word in line.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "src"} <= set(copied) and all((ROOT / word).exists() for word in copied)


def test_the_site_is_built_without_a_network_and_has_every_public_name(tmp_path):
    """A broken link is an error of the build, and so is a name without its entry, or a page that fetches something."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=300)
    reference = (site / "api" / "chainrule.html").read_text(encoding="utf-8")
    assert all(f'id="{getattr(cr, name).__module__}.{name}"' in reference for name in cr.__all__)
    told = (site / "methods.html").read_text(encoding="utf-8")
    assert "<math" in told and r"\frac" not in re.sub(r"<annotation.*?</annotation>", "", told) and "[#|^#|^#]" in told
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".ipynb")]


def test_a_broken_link_fails_the_build(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    for name in ("docs", "mkdocs.yml", "src"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "prompts.md").open("a") as file:
        file.write("\n[gone](nowhere.md)\n")
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode and "nowhere.md" in done.stderr
