"""What every test shares. Nothing heavy is loaded here: the process that hands out the tests runs none of them."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

gc.set_threshold(200_000, 20, 100)  # a test makes many small objects beside a million that stay: less often is an eighth faster


def pytest_collection_finish() -> None:
    """Let garbage collection pass over those that stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def brief_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the analysis that ends a distillation have few steps, where it is not what is tested."""
    room = importlib.import_module("chainrule.distill")
    monkeypatch.setattr(room, "shortcut", partial(room.shortcut, steps=10, points=2))


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random-weight pipeline, as a hub download would lie on disk."""
    import torch
    from pipelines import make_pipeline

    folder = tmp_path_factory.mktemp("models") / "sd"
    make_pipeline(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def chainrule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the program with these arguments, as its entry point does: its exit code and what it printed."""
    from chainrule.cli import main

    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["chainrule", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=caught.value.code or 0, out=out, err=err)

    return call


def words(line: str) -> list[str]:
    """A command line in words, quotes respected."""
    return [word.strip("'") for word in re.findall(r"'[^']*'|[^\s']+", line)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random reward models of every kind; see reward_models.py."""
    from reward_models import save_all

    root = tmp_path_factory.mktemp("reward-models")
    save_all(root)
    return root
