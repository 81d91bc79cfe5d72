"""A run folder keeps what it is given, survives a kill in the middle of a line, and refuses what would hurt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainrule.config import FinetuneConfig
from chainrule.errors import UserError
from chainrule.runs import Run

VALUES: dict[str, Any] = {"method": {"name": "DRaFTLV", "n": 2}, "lr": 4e-5, "updates": 200, "prompts": ("a fox", "été")}


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.of(VALUES | changes)


CONFIG = config()


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_config_and_environment_round_trip(tmp_path: Path) -> None:
    method = {"name": "mine", "levels": (1.5, 2), "k": np.int64(8), "data": Path("a/b")}
    run = Run.create(tmp_path / "deep" / "run", config(method=method))
    assert run == Run(tmp_path / "deep" / "run")
    assert run.config == config(method={"name": "mine", "levels": [1.5, 2], "k": 8, "data": "a/b"})
    assert list(run.config.values())[:2] == ["kind", "model"] and run.config.settings.lr == 4e-5
    assert run.environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"platform", "date", "torch", "diffusers", "transformers", "peft", "accelerate"} <= set(run.environment)


def test_opening_and_creating_import_no_torch(tmp_path: Path) -> None:
    code = "import sys; from chainrule.config import FinetuneConfig; from chainrule.runs import Run\n"
    code += "assert Run.create(sys.argv[1], FinetuneConfig()).config == FinetuneConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True)


def test_a_value_that_is_no_text_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Run.create(tmp_path / "run", config(method={"name": "mine", "inner": object()}))
    assert "inner: a object cannot be written" in one_line(error)
    assert not (tmp_path / "run").exists()


def test_metrics_round_trip(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.log({"step": 1, "reward": 1 / 3, "loss": float("nan"), "terms": {"a": np.float32(0.1)}, "skipped": 0})
    run.log({"step": 2, "reward": 123456789.0, "ok": True})
    assert run.metrics() == [
        {"step": 1, "reward": 0.333333, "loss": None, "terms": {"a": 0.1}, "skipped": 0},
        {"step": 2, "reward": 123457000.0, "ok": True},
    ]
    assert Run(tmp_path / "nothing").metrics() == []


@pytest.mark.parametrize("tail", ['{"step": 3, "rew', '{"step": 3, "prompt": "\u00e9'.encode()[:-1], "4", "nul"])
def test_a_torn_last_line_is_left_out_and_healed(tmp_path: Path, tail: str | bytes) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    for step in (1, 2):
        run.log({"step": step})
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(tail if isinstance(tail, bytes) else tail.encode())
    assert [row["step"] for row in run.metrics()] == [1, 2]
    run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_text("metrics.jsonl", '{"step": 1}\n{"step": 2}')
    run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_text("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError) as error:
        run.metrics()
    assert "line 2" in one_line(error)


def test_truncate_leaves_each_step_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.truncate(3)
    assert not (run.folder / "metrics.jsonl").exists()
    for step in range(1, 8):
        run.log({"step": step})
    run.truncate(5)
    run.log({"step": 6})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_are_complete_and_in_the_order_of_steps(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    assert run.checkpoints() == []
    for step in (1_000_000, 20, 3):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text("{}")
    run.checkpoint(40).mkdir()
    (run.folder / "checkpoints" / "step-last").mkdir()
    assert [path.name for path in run.checkpoints()] == ["step-000003", "step-000020", "step-1000000"]
    assert run.adapter == run.folder / "adapter" and run.samples == run.folder / "samples"


def test_a_used_folder_is_refused(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(UserError) as error:
        Run.create(tmp_path / "run", CONFIG)
    assert "not empty" in one_line(error) and "resume" in str(error.value) and "overwrite" in str(error.value)


def test_a_file_is_refused_also_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        for resume in (False, True):
            with pytest.raises(UserError) as error:
                Run.create(place, CONFIG, resume=resume)
            assert "is a file" in one_line(error)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user may write anywhere")
def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError) as error:
            Run.create(tmp_path / "run", CONFIG)
    finally:
        tmp_path.chmod(0o700)
    assert "cannot write to" in one_line(error)


def test_a_place_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError) as error:
        Run.create(tmp_path / "run", CONFIG)
    assert "Read-only file system" in one_line(error)


def test_resume_keeps_the_run_and_takes_the_new_length(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.log({"step": 1})
    again = Run.create(tmp_path / "run", config(updates=400, save_every=5), resume=True)
    assert again.metrics() == [{"step": 1}]
    assert again.config.settings.updates == 400
    assert len(again.environment["resumed"]) == 1 and "torch" in again.environment["resumed"][0]
    third = Run.create(tmp_path / "run", CONFIG, resume=True)
    assert len(third.environment["resumed"]) == 2


def test_resume_of_nothing_starts_afresh(tmp_path: Path) -> None:
    assert Run.create(tmp_path / "run", CONFIG, resume=True).config == CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-3, "sample_every": 7}, ("lr was 4e-05 and is now 0.001",)),
        ({"method": {"name": "DRaFTLV", "n": 4}}, ("method.n was 2 and is now 4",)),
        ({"method": {"name": "DRaFTLV", "n": 2, "k": 8}}, ("method.k was '(not set)' and is now 8",)),
    ],
)
def test_resume_names_the_first_difference(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(UserError) as error:
        Run.create(tmp_path / "run", config(**change), resume=True)
    assert all(word in one_line(error) for word in words)
    assert Run(tmp_path / "run").config == CONFIG


def test_resume_and_overwrite_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Run.create(tmp_path / "run", CONFIG, resume=True, overwrite=True)


def test_overwrite_deletes_a_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.log({"step": 1})
    run.checkpoint(1).mkdir(parents=True)
    (run.folder / "samples").mkdir()
    for mine in ("link", "samples/holiday.png"):
        (run.folder / mine).symlink_to(tmp_path)
        with pytest.raises(UserError, match=f"no run wrote {mine}; move it away"):
            Run.create(tmp_path / "run", config(lr=1), overwrite=True)
        (run.folder / mine).unlink()
    assert run.metrics() and run.config == CONFIG
    new = Run.create(tmp_path / "run", config(lr=1), overwrite=True)
    assert sorted(path.name for path in new.folder.iterdir()) == ["config.yaml", "environment.json"]
    assert new.config == config(lr=1)


def test_a_run_that_was_killed_while_it_was_made_or_replaced_can_be_made_again(tmp_path: Path) -> None:
    place = tmp_path / "run"
    Run.create(place, CONFIG).log({"step": 1})
    (place / "config.yaml").unlink()  # which goes first when a run is replaced
    assert Run.create(place, config(lr=1), overwrite=True).metrics() == []
    (place / "config.yaml").unlink()  # which comes last when a run is made
    (place / ".config.yaml.part").write_text("kind: fin")
    for again in ({}, {"resume": True}, {"overwrite": True}):
        assert Run.create(place, CONFIG, **again).config == CONFIG
        (place / "config.yaml").unlink()


def test_one_run_has_one_writer(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    lines = f"from chainrule import Run\nwith Run({str(run.folder)!r}).locked():\n  print('held', flush=True)\n  input()"
    with subprocess.Popen([sys.executable, "-c", lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"held\n"
        for again in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is writing to"):
                Run.create(run.folder, CONFIG, **again)
        other.kill()
    assert Run.create(run.folder, CONFIG, resume=True).config == CONFIG


def test_a_run_that_was_moved_away_is_not_written_into_a_new_folder(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    run.log({"step": 1})
    run.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is no longer there"):
        run.log({"step": 2})
    assert not run.folder.exists() and len(Run(tmp_path / "elsewhere").metrics()) == 1


@pytest.mark.parametrize("name", ["thesis.txt", "config.yaml"])
def test_overwrite_spares_what_is_not_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine: yes")
    with pytest.raises(UserError) as error:
        Run.create(tmp_path, CONFIG, overwrite=True)
    assert "does not look like a run" in one_line(error)
    assert (tmp_path / name).read_text() == "mine: yes"


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        _ = Run(tmp_path).config
    assert "config.yaml" in one_line(error)


def test_texts_are_written_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", CONFIG)
    path = run.write_text("evaluation.json", json.dumps({"rows": []}))
    assert path == run.folder / "evaluation.json" and json.loads(path.read_text()) == {"rows": []}
    assert not list(run.folder.glob(".*"))
