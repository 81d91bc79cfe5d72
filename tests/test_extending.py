"""Every snippet of docs/extending.md runs, in order, and says what its comments claim."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "extending"}
    text = PAGE.read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(snippets) == text.count("```python") > 5
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec", dont_inherit=True), names)
    said = capsys.readouterr().out
    for claimed in re.findall(r"print\(.*\)  # (\S+)$", text, re.MULTILINE):
        assert claimed.split("'")[0] in said
    assert {"late", "zero-star", "draft-1", "sdo", "shortft", "negative"} <= {run.name for run in (tmp_path / "runs").iterdir()}
