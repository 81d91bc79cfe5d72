"""The command line's help is the committed page, and what only prints loads nothing heavy."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from chainrule.cli import app

DOCS = Path(__file__).parent.parent / "docs"
GROUP = typer.main.get_command(app).commands
COMMANDS = dict(GROUP) | {
    f"{name} {word}": inner for name, command in GROUP.items() for word, inner in getattr(command, "commands", {}).items()
}
Call = Callable[..., SimpleNamespace]


def committed() -> dict[str, str]:
    """The help texts of docs/cli.md, by the words of the command."""
    return dict(
        re.findall(r"^## (chainrule[^\n]*)\n\n```text\n(.*?)\n```$", (DOCS / "cli.md").read_text(), re.DOTALL | re.MULTILINE)
    )


def test_the_page_has_every_command():
    assert list(committed()) == ["chainrule", *(f"chainrule {name}" for name in COMMANDS)]


@pytest.mark.parametrize("words", [(), *(tuple(name.split()) for name in COMMANDS)], ids=" ".join)
def test_help_equals_the_committed_text(words, chainrule, monkeypatch):
    monkeypatch.setenv("COLUMNS", "102")  # click leaves two columns free
    found = chainrule(*words, "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.strip("\n") == committed()[" ".join(("chainrule", *words))], "run python docs/make_cli.py"


@pytest.mark.parametrize("columns", ["40", "300"])
def test_the_script_writes_the_committed_page_in_any_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.page() == (DOCS / "cli.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    for parameter in COMMANDS[name].params:
        assert parameter.name == "help" or parameter.help, f"{name} {parameter.name}"
    assert COMMANDS[name].help.strip().endswith(".")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plan", "sdo"], ["methods"], ["rewards"]], ids=" ".join)
def test_what_only_prints_loads_neither_torch_nor_diffusers(arguments):
    code = f"""
import sys
from chainrule.cli import main
sys.argv = ["chainrule", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *[name for name in ("torch", "diffusers", "transformers", "peft") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.endswith("\nloaded:\n")
    assert len(found.stdout.splitlines()) > 4


LIGHT = {"PIL", "annotated_doc", "annotated_types", "click", "cython_runtime", "numpy", "pydantic", "pydantic_core", "shellingham",
         "typer", "typing_extensions", "typing_inspection", "yaml", "chainrule"}  # fmt: skip
"""What `chainrule --help` loads besides Python's own; all of it together is about a quarter of a second."""


@pytest.mark.parametrize(
    ("code", "loaded"), [("import chainrule", {"chainrule"}), ("import chainrule.cli", LIGHT)], ids=["package", "cli"]
)
def test_what_comes_first_is_light_and_warns_of_nothing(code, loaded):
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules if name[0] != '_'} - set(sys.stdlib_module_names))"
    run = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, timeout=60, check=True)
    assert set(found.stdout.split()) <= loaded and not found.stderr


def test_plan_draws_the_method_and_counts_its_cost(chainrule):
    found = chainrule("plan", "draft-lv", "--steps", 10)
    assert found.out.splitlines() == [
        "DRaFTLV(n=2, reuse_reward_gradient=False)",
        "---------[#|^#|^#]",
        "recompute  12 network calls, 3 backward calls, about 1.80x the time of sampling, memory of 1 call graph",
        "keep       12 network calls, 3 backward calls, about 1.50x the time of sampling, memory of 1 call graph",
        "- constant call   = its weights   ~ its input   # both   > another member's call   ^ noised again   [ branches | ]",
    ]
    drawings = {chainrule("plan", "sdo", "--steps", 4, "--seed", seed).out.splitlines()[1] for seed in range(30)}
    assert drawings == {"[#---]", "[-#--]", "[--#-]", "[---#]"}
    assert chainrule("plan", "drtune", "--method-option", "k=2", "--method-option", "m=1").out.startswith("DRTune(k=2, m=1)\n")


def test_the_lists_name_everything_once(chainrule):
    from chainrule.methods import REGISTRY as METHODS
    from chainrule.rewards import REGISTRY as REWARDS

    for command, names in (("methods", METHODS), ("rewards", REWARDS)):
        assert [line.split()[0] for line in chainrule(command).out.splitlines()] == list(names)
    assert chainrule("models").out.startswith("tiny-emoji ")


def test_without_a_command_the_help_is_shown(chainrule):
    found = chainrule()
    assert "Commands:\n  train " in found.out + found.err


def test_the_version_is_the_package_s(chainrule):
    assert chainrule("--version").out == f"chainrule {version('chainrule')}\n"
