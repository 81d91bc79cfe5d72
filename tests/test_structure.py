"""The house keeps its rooms: who may import whom, who may know torch and diffusers, how long a file and a function may be."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import chainrule as cr

SOURCE = Path(cr.__file__).parent

# Room -> the rooms it may import. A room is a file or a folder of the package; a room imports only rooms above it.
MAY_IMPORT = {
    "errors": "",
    "asked": "errors",
    "environment": "",
    "files": "errors",
    "tensors": "errors files",
    "yaml_text": "",
    "named": "errors yaml_text",
    "size": "errors",
    "checked": "errors named",
    "settings": "errors named size checked",
    "config": "errors yaml_text named checked settings",
    "display": "",
    "presets": "errors config",
    "rows": "errors files config",
    "runs": "errors environment files config display rows",
    "estimate": "",
    "plan": "",
    "pictures": "",
    "appearance": "",
    "processes": "errors settings",
    "methods": "errors named plan",
    "noise": "",
    "checkpoints": "errors files tensors runs",
    "loop": "errors config runs processes noise checkpoints",
    "half": "",
    "meters": "",
    "offload": "errors",
    "shards": "errors processes",
    "solve": "plan noise",
    "adapters": "errors files tensors display",
    "rewards": "errors named pictures offload",
    "denoise": "",
    "guidance": "errors named denoise",
    "cast": "adapters denoise guidance",
    "taken": "errors plan solve",
    "chain": "errors plan noise half solve taken denoise cast",
    "learned": "errors files tensors guidance cast chain",
    "objective": "plan half solve rewards denoise cast",
    "models": "errors asked pictures files tensors display offload processes shards size plan noise solve adapters denoise "
    "guidance cast chain learned",
    "report": "errors config estimate plan runs methods rewards",
    "card": "errors files config runs report methods adapters models",
    "push": "errors files runs adapters card",
    "gradient": "asked plan rewards guidance taken chain objective models",
    "tiny": "errors rewards",
    "prompts": "errors asked tiny",  # the names of what tiny-emoji can draw
    "album": "errors files size runs report",
    "learner": "learned",
    "balance": "errors settings processes noise chain rewards objective models",
    "estimators": "errors plan processes methods noise half solve adapters rewards chain objective models gradient learner",
    "learnable": "errors settings guidance learned models",
    "training": "errors balance plan settings processes loop methods noise adapters rewards learned models objective gradient "
    "learner estimators learnable",
    "standins": "errors rewards models",
    "footprint": "errors standins settings methods meters offload shards adapters rewards denoise guidance cast models training",
    "grids": "errors files rows runs pictures appearance noise loop rewards models report training",
    "trackers": "errors loop",
    "finetune": "errors balance config runs settings footprint processes loop methods noise adapters rewards guidance chain models "
    "prompts report training grids trackers card",
    "scores": "files",
    "evaluate": "errors appearance scores asked files display processes shards estimate rewards guidance models prompts",
    "vote": "errors estimate files",
    "baselines": "errors asked pictures files processes shards rewards guidance models prompts evaluate",
    "sampling": "processes rewards guidance models album baselines",
    "analyze": "errors pictures files estimate plan methods rewards guidance chain objective models gradient prompts report",
    "steer": "errors asked pictures files tensors size config plan runs processes loop settings noise half solve adapters rewards "
    "denoise guidance cast chain learned objective models report card",
    "looked": "models tiny",
    "doctor": "errors meters shards adapters methods rewards models gradient looked",
    "distill": "errors files config plan runs settings processes shards loop noise half adapters guidance cast objective models "
    "prompts learner analyze card",
    "experiments": "errors appearance files yaml_text estimate plan runs loop settings methods meters rewards chain objective "
    "models gradient prompts report evaluate baselines finetune steer",
    "studio": "errors asked named settings runs loop adapters rewards models report steer analyze vote",
    "cli": "errors asked balance yaml_text files processes named size checked config plan runs settings methods adapters rewards "
    "guidance models prompts report standins footprint finetune steer doctor distill evaluate vote baselines pictures analyze "
    "experiments push presets sampling album scores card studio",
    "__main__": "cli",
}
WITHOUT_TORCH = (
    "errors", "asked", "environment", "files", "display", "presets", "yaml_text", "named", "size", "checked", "settings", "config",
    "rows", "runs", "estimate", "plan", "methods", "prompts", "report", "album", "scores", "vote", "cli",
)  # fmt: skip
KNOW_DIFFUSERS = ("models", "tiny")
KNOWS_GRADIO = "chainrule.studio.page"
KNOW_ACCELERATE = ("processes", "trackers", "offload")
FILES = sorted(SOURCE.rglob("*.py"))
ROOT = Path(__file__).parents[1]
MOST_LINES = {"src": 300, "tests": 450, "benchmarks": 450}  # of a file
MOST_LINES_OF_A_FUNCTION = 50
EVERY_FILE = sorted(path for folder in (*MOST_LINES, "docs", "examples") for path in (ROOT / folder).rglob("*.py"))


def room(module: str) -> str:
    """The room of a dotted module: "models" of "chainrule.models.load"; "chainrule" of the package itself."""
    return module.removeprefix("chainrule.").split(".")[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path, *, types: bool = False) -> tuple[ast.AST, ...]:
    """Everything in the file; with `types` what only a type checker reads too."""
    found, left = [], [parsed(path)]
    while left:
        children = [child for child in ast.iter_child_nodes(left.pop()) if types or not for_types_only(child)]
        found += children
        left += children
    return tuple(found)


@cache
def imports(path: Path, *, types: bool = False) -> frozenset[str]:
    """The modules a file imports, dotted; `from chainrule import methods` is "chainrule.methods"."""
    found = set()
    for node in nodes(path, types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES or {str(node.module)}
    return frozenset(found)


MODULES = {module_of(path) for path in FILES}
IDS = [str(path.relative_to(SOURCE)) for path in FILES]


def test_every_room_is_in_the_list_and_imports_only_rooms_above_it():
    rooms = {room(name) for name in MODULES} - {"chainrule"}
    assert rooms == set(MAY_IMPORT), "say in MAY_IMPORT what the new room may import"
    above: set[str] = set()
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= above
        above.add(name)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != SOURCE or p.stem != "__init__"], ids=IDS[1:])
def test_a_file_imports_only_what_its_room_may(path):
    here = room(module_of(path))
    there = {room(name) for name in imports(path) if name.split(".")[0] == "chainrule"}
    assert there <= {here, *MAY_IMPORT[here].split()}


def test_the_package_imports_nothing_until_asked():
    assert not [name for name in imports(SOURCE / "__init__.py") if room(name) in MAY_IMPORT]


def test_no_module_imports_itself_around_a_corner():
    """What only a type checker reads counts too: two modules that cannot be described without each other are one."""
    edges = {module_of(path): imports(path, types=True) & MODULES for path in FILES if path != SOURCE / "__init__.py"}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in finished:
            for other in sorted(edges.get(name, set()) - {name}):
                visit(other, (*path, name))
            finished.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_models_and_tiny_know_diffusers(path):
    if room(module_of(path)) not in KNOW_DIFFUSERS:
        assert not [name for name in imports(path, types=True) if name.split(".")[0] == "diffusers"]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_these_rooms_know_accelerate(path):
    if room(module_of(path)) not in KNOW_ACCELERATE:
        assert not [name for name in imports(path, types=True) if name.split(".")[0] == "accelerate"]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_one_file_knows_gradio_and_nobody_loads_it_unasked(path):
    named = {name for name in imports(path, types=True) if name.split(".")[0] in ("gradio", "gradio_client")}
    assert not named or module_of(path) == KNOWS_GRADIO


def test_rooms_without_torch_can_be_entered_where_there_is_no_torch():
    rooms = [name for name in sorted(MODULES) if room(name) in WITHOUT_TORCH] + ["chainrule.rewards.registry"]
    absent = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
    code = f"import sys, importlib\nsys.modules.update(dict.fromkeys({absent!r}))\n[importlib.import_module(m) for m in {rooms!r}]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("path", [p for p in FILES if room(module_of(p)) in WITHOUT_TORCH], ids=lambda p: p.name)
def test_rooms_without_torch_do_not_fetch_it_later_either(path):
    assert not {name.split(".")[0] for name in imports(path, types=True)} & {"torch", "diffusers", "transformers", "peft"}


@pytest.mark.parametrize("name", cr.__all__)
def test_every_public_name_is_a_class_or_a_function_that_says_what_it_is(name):
    value = getattr(cr, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", ["distill", "finetune", "evaluate", "prompts", "report"])
def test_a_name_that_is_a_module_too_stays_a_function(name):
    importlib.import_module(f"chainrule.{name}")
    assert inspect.isfunction(getattr(cr, name))
    code = (
        f"import importlib; m = importlib.import_module('chainrule.{name}'); import chainrule as cr; from chainrule import {name}\n"
        f"assert cr.{name} is {name} is m.{name}, cr.{name}"
    )
    if name in ("prompts", "report"):  # a fresh interpreter, where the module comes first; the others would load torch again
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fintune'"):
        cr.fintune  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_reads_no_pickle(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    tensors_only: set[ast.expr] = set()
    for node in nodes(path):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":  # tensors alone, or not at all
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords], f"line {node.lineno}"
            tensors_only.add(node.func)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
            assert node in tensors_only, f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"line {node.value.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_room_is_a_drawer_for_the_rest(path):
    assert not {"utils", "common", "helpers", "misc", "manager"} & set(path.with_suffix("").relative_to(SOURCE).parts)


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_its_functions_are_short_and_it_adds_no_folder_to_the_path(path):
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    every = list(ast.walk(parsed(path)))
    assert len(text.splitlines()) <= MOST_LINES.get(name.split("/")[0], 450)
    functions = [node for node in every if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION}
    assert not long
    assert not [node.lineno for node in every if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"]


def undocumented(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """The public classes, functions and methods without a docstring. A protocol's members are described by the protocol."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
                yield from undocumented(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_everything_public_has_a_docstring(path):
    found = list(undocumented(parsed(path)))
    assert not found
