"""What the pages show works: every command line as far as the model it opens, every block of code as it stands.

The pages are read anew each time, so that a new block or line is tested without a word here. What opens a model on the hub is
known by its name, OWNER/NAME, and goes as far as its own options and settings.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from documented import BLOCKS, INLINE, LINES, ROOT, Piece
from PIL import Image

import chainrule as cr
from chainrule.checked import Checked
from chainrule.cli import app
from chainrule.config import FinetuneConfig
from chainrule.experiments.table import read as read_table
from chainrule.models.loading import check
from chainrule.settings import Distillation, Finetuning, Opening, Steering

Program = Callable[..., SimpleNamespace]
STANDS_FOR = {
    "plan NAME": "plan sdo", "experiment NAME": "experiment tradeoff", "vote FILES": "vote vote/votes.json",
    "--balance RULE": "--balance deviation", "--model ...": "--model tiny-emoji", " ...": "",
}  # fmt: skip
"""What a reader puts in the place of these words."""
IS_A_PART = {"train": {"--reward": "pickscore + symmetry", "--out": "runs/new"}}
"""What a command within a sentence may leave to its reader."""
NOT_YET = "nothing of the table tradeoff was run yet"  # which a command that draws results says where there are none
OTHERS = ("--build-arg", "--nproc_per_node")  # options of other programs


class Opened(Exception):
    """All options were read and checked, and what takes long would begin."""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages assume on a reader's disk: runs of the bundled model, a student, prompts, pictures, a config, a study."""
    from chainrule.models.bundled import student
    from chainrule.vote import study

    root = tmp_path_factory.mktemp("shelf")
    run = cr.finetune(
        cr.load("tiny-emoji"), "draft-1", "pickscore:tiny", "animals:train", updates=1, batch=2, sample_steps=2, sample_every=0,
        watch=["a painting of a fox"], out=root / "runs/pick",
    )  # fmt: skip
    for copy in ("runs/other", "runs/a", "runs/b", "runs/c", "runs/few", "rotation", "pickscore"):
        shutil.copytree(run.folder, root / copy)
    shutil.copytree(student("tiny-emoji"), root / "runs/student/adapter")
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    (root / "run.yaml").write_text(yaml.safe_dump(config | {"out": "runs/yaml"}))
    (root / "prompts.txt").write_text("a painting of a fox\na painting of a cat\n")
    for folder in ("HPDv2", "HPDv2/benchmark"):
        (root / folder).mkdir(exist_ok=True)
        for style in ("anime", "concept-art", "paintings", "photo"):
            (root / folder / f"{style}.json").write_text('["a fox"]')
    for name in ("photo.png", "picture.png"):
        Image.linear_gradient("L").convert("RGB").resize((128, 128)).save(root / name)
    (root / "late.py").write_text(next(piece.text for piece in BLOCKS if "class Late" in piece.text).split("'''")[1])
    (root / "mine.yaml").write_text(next(piece.text for piece in BLOCKS if piece.language == "yaml"))
    study({name: [Image.new("RGB", (8, 8))] for name in ("a", "b")}, ["a fox"], root / "vote")
    from test_vote import votes

    votes(root / "vote", "one", lambda pair: "left").rename(root / "vote/votes.json")
    return root


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all of that, where a command may write."""
    shutil.copytree(shelf, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    return tmp_path / "desk"


def opened(*arguments: object, **options: object) -> None:
    raise Opened


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command end where it would open a model, start many runs or serve a page."""
    for place in ("cli.opened.Source.load", "models.outline.outline", "experiments.runner.run", "studio.served.started"):
        monkeypatch.setattr(f"chainrule.{place}", opened)
    monkeypatch.setattr("chainrule.cli.studio.find_spec", lambda name: name)  # gradio is not asked for before


def spelled(text: str) -> str:
    for word, meant in STANDS_FOR.items():
        text = text.replace(word, meant)
    return text


def wanted(piece: Piece) -> list[str]:
    """The words of a command line with what it leaves to its reader."""
    words = replace(piece, text=spelled(piece.text)).command
    if piece.language == "inline" and "list" not in words and not [word for word in words if word.endswith(".yaml")]:
        words += [part for name, value in IS_A_PART.get(words[0], {}).items() if name not in words for part in (name, value)]
    return words


def is_mention(piece: Piece) -> bool:
    """Whether a sentence names a command and no argument of it."""
    return piece.language == "inline" and len(piece.command) <= (2 if piece.command[0] == "analyze" else 1)


def different(pieces: list[Piece]) -> list[Piece]:
    """The first of those with the same words."""
    return list({(piece.language, piece.text): piece for piece in reversed(pieces)}.values())[::-1]


COMMANDS = different([piece for piece in [*LINES, *INLINE] if piece.command])
WHOLE = [piece for piece in COMMANDS if not is_mention(piece)]


def test_the_pages_are_read():
    """The counts are of what stands there now, so that a reader of pages who sees nothing is seen."""
    assert len(WHOLE) > 60 and len([piece for piece in BLOCKS if piece.language == "python"]) > 15
    assert {piece.language for piece in BLOCKS} == {"python", "yaml", "text"}


@pytest.mark.parametrize("piece", [piece for piece in COMMANDS if is_mention(piece)], ids=str)
def test_a_command_that_is_named_is_there(piece, chainrule):
    assert chainrule(*piece.command, "--help").code == 0


def follow(words: list[str], chainrule: Program) -> None:
    """Run a command line of the pages; it is wrong where it is refused."""
    make_room(words)
    try:
        found = chainrule(*words)
    except Opened:
        return
    assert found.code == 0 or NOT_YET in found.err, found.err


def make_room(words: list[str]) -> None:
    """Take away what a command is about to make: the pages make it first and use it later."""
    place = words[words.index("--out") + 1] if "--out" in words else words[0]
    if words[0] in ("train", "distill", "vote") and not any(word.startswith(f"{place}/") for word in words):
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("piece", WHOLE, ids=str)
def test_a_command_line_gets_as_far_as_its_model(piece, chainrule, desk, stops):
    follow(wanted(piece), chainrule)


@pytest.mark.parametrize(
    "line", ["train --reward pickscore --out runs/x --rates 3", "sample runs/pick --prompts x --seeds few", "eval runs/gone",
             "train --reward pickscore --out runs/x --lr -1", "mix runs/pick=1", "plan sdo --memory-of 24XB", "vot runs/a runs/b"],
)  # fmt: skip
def test_a_line_that_is_wrong_is_seen(line, chainrule, desk, stops):
    with pytest.raises(AssertionError):
        follow(wanted(Piece("x.md", 1, "line", f"chainrule {line}")), chainrule)


def options_of(command: Any) -> set[str]:
    """Every option of a command and of those in it."""
    found = {word for parameter in command.params for word in (*parameter.opts, *parameter.secondary_opts)}
    return found.union(*(options_of(inner) for inner in getattr(command, "commands", {}).values()))


def test_an_option_that_is_named_is_there():
    known = options_of(typer.main.get_command(app)) | {"--help"}
    texts = {str(piece): piece.text for piece in INLINE if re.match(r"--[a-z]", piece.text)}
    named = {(where, word) for where, text in texts.items() for word in re.findall(r"(?<!-)--[a-z][a-z-]+", text)}
    assert len({word for _, word in named}) > 30
    assert not {(where, word) for where, word in named if word not in known and word not in OTHERS}


def test_other_programs_are_called_with_what_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for piece in [*LINES, *INLINE]:
        words = piece.text.split()
        if piece.command or not words:
            continue
        if words[0] == "make" and len(words) > 1:
            assert set(words[1:]) <= set(targets), piece
        elif words[:2] == ["pip", "install"]:
            assert set(re.findall(r"chainrule\[(.*?)\]", piece.text)) <= set(extras), piece
        elif words[0] in ("pytest", "python") and len(words) > 1:
            assert_there(words, piece)
        else:
            assert piece.language == "inline", f"{piece}: nothing here knows {piece.text!r}"


def assert_there(words: list[str], piece: Piece) -> None:
    """A file or module that is called is in the repository, and has tests of the words that `-k` chooses by."""
    file = ROOT / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    assert file.is_file(), piece
    chosen = re.findall(r"-k '?\"?([\w ]+)", piece.text)
    tests = " ".join(re.findall(r"def (test_\w+)", file.read_text()))
    assert all(word in tests for word in " ".join(chosen).split() if word not in ("and", "or", "not")), piece


RUN_ELSEWHERE = ("docs/extending.md",)  # tests/test_extending.py
SCRIPTS = {
    page: [piece for piece in BLOCKS if (piece.page, piece.language) == (page, "python")] for page in {p.page for p in BLOCKS}
}


def shorter(function: Callable[..., Any], kind: type[Checked], **small: int | None) -> Callable[..., Any]:
    """The function with less to do, after the settings that it was called with were checked; it makes its run anew."""

    def call(*arguments: Any, **options: Any) -> Any:
        kind(**{name: value for name, value in options.items() if name in kind.model_fields})
        shutil.rmtree(options.get("out", "nothing"), ignore_errors=True)
        return function(*arguments, **options | small)

    return call


def on_the_hub(name: str) -> bool:
    """Whether a model's name is OWNER/NAME."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


@pytest.fixture
def brief(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chains have few steps, training and steering one update. A model of the hub is the bundled one, its options checked."""
    load = cr.load

    def opened(source: Any, **options: Any) -> cr.Model:
        if on_the_hub(str(source)):
            check(source, Opening(**options).solver)
            source, options = "tiny-emoji", {}
        model = load(source, **options)
        return replace(model, defaults=replace(model.defaults, steps=2))

    monkeypatch.setattr(cr, "load", opened)
    monkeypatch.setattr(cr, "finetune", shorter(cr.finetune, Finetuning, updates=1, batch=2, sample_steps=None))
    monkeypatch.setattr(cr, "steer", shorter(cr.steer, Steering, updates=1, sample_steps=5))
    monkeypatch.setattr(cr, "distill", shorter(cr.distill, Distillation, updates=1, batch=2, teacher_steps=8, starts=2))


@pytest.mark.parametrize("page", sorted(page for page, scripts in SCRIPTS.items() if scripts and page not in RUN_ELSEWHERE))
def test_the_python_of_a_page_runs(page, brief):
    """In order, with the names of its earlier blocks, and those that a page takes for granted."""
    given = "import chainrule as cr\nfrom chainrule import methods, rewards\nmodel = cr.load('tiny-emoji')\n"
    names: dict[str, Any] = {"__name__": "page", "prompts": ["a painting of a fox", "a painting of a cat"]}
    exec(given, names)
    for piece in SCRIPTS[page]:
        exec(compile("\n" * (piece.line - 1) + piece.text, str(ROOT / page), "exec", dont_inherit=True), names)


def test_the_settings_of_a_page_are_read(tmp_path):
    for piece in (piece for piece in BLOCKS if piece.language == "yaml"):
        (tmp_path / "page.yaml").write_text(piece.text)
        if "rows" in yaml.safe_load(piece.text):
            assert read_table(str(tmp_path / "page.yaml")).rows
        else:
            FinetuneConfig.read(tmp_path / "page.yaml", {})


SMALL = {
    "train": "--updates 4 --batch 4 --sample-steps 6 --sample-every 0 --save-every 0 --watch fox",
    "distill": "--updates 1 --batch 2 --teacher-steps 8 --starts 2",
    "sample": "--steps 4 --seeds 1", "eval": "--steps 4 --seeds 1",
    "search": "--steps 4 --seeds 1 --template {} --prompts animals:test",
    "vote": "--steps 4", "steer": "--updates 1 --sample-steps 5",
    "analyze steps": "--steps 4 --cells 2", "analyze picard": "--steps 4 --images 1", "analyze gradients": "--steps 4 --batches 1",
    "analyze shortcut": "--steps 4 --seeds 1 --points 2",
}  # fmt: skip
"""What makes a command short: an option that is given twice has its last value."""


def word_of(words: list[str]) -> str:
    return " ".join(words[: 1 + (words[0] == "analyze")])


def at_home(words: list[str]) -> bool:
    """Whether one process does a command's work with a bundled model, and not one of the hub, by its name or by a preset."""
    return (
        "--preset" not in words
        and "shard" not in words
        and not any(two[0] == "--model" and "/" in two[1] for two in pairwise(words))
    )


LONG = {tuple(wanted(piece)): piece for piece in WHOLE if word_of(wanted(piece)) in SMALL and at_home(wanted(piece))}


@pytest.mark.heavy
@pytest.mark.parametrize("piece", LONG.values(), ids=str)
def test_a_command_line_does_its_work(piece, chainrule, desk, brief_analysis):
    words = wanted(piece)
    small = SMALL[word_of(words)]
    if "--adapter" in words:  # a student has steps of its own
        small = small.replace("--sample-steps 6", "")
    follow([*words, *small.split()], chainrule)
