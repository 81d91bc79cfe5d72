"""What the command line was given, checked: options, the config file, prompts, mixing weights. Imports nothing heavy."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from pydantic import BaseModel

from chainrule import methods, named
from chainrule.errors import UserError, unknown
from chainrule.prompts import is_source, prompts
from chainrule.settings import Opening, Settings

TRAIN_KEYS = ("model", "student", "adapter", "method", "reward", "held_out", "prompts", "out")
"""What `train` takes besides the settings, on the command line or in its config file."""


def with_settings(settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for every field of its settings, so that they are written down once."""
    return functools.partial(_with, settings)


def _with(settings: type[BaseModel], function: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(function, eval_str=True)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, field in settings.model_fields.items():
        kind, help_text = field.annotation, str(field.description)
        if get_args(kind) and str in {type(a) for a in get_args(kind)}:  # a Literal: pydantic checks the value
            help_text, kind = f"{help_text} ({' | '.join(get_args(kind))})", str
        if type(None) in get_args(kind):
            kind = next(a for a in get_args(kind) if a is not type(None))
        shown = "" if field.default is None else f" [default: {field.default}]"
        option = typer.Option(help=f"{help_text[0].upper()}{help_text[1:]}.{shown}", show_default=False)
        annotation = Annotated[kind | None, option]  # type: ignore[operator, valid-type]
        kept.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return function


def configured(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The YAML file's values, overridden by what was given on the command line. UserError for an unknown key."""
    values, known = _yaml(config) if config else {}, [*TRAIN_KEYS, *Opening.model_fields, *Settings.model_fields]
    for key in values:
        if key not in known:
            raise unknown(f"key in {config}", str(key), known)
    values |= {key: value for key, value in given.items() if value is not None}
    for key in ("model", "student", "adapter", "reward", "held_out", "out"):
        if not isinstance(values.get(key), str | None):
            raise UserError(f"{key} is {values[key]!r}, but must be text")
    return values


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    if values is not None and not isinstance(values, dict):
        raise UserError(f"the config file {path} must hold keys and values")
    return values or {}


def method_of(chosen: Any, pairs: Sequence[str] | None) -> methods.Method:
    """The method by name, by file, or by {"name": ..., option: ...}, with options written as "k=5"."""
    given = {"name": "draft-lv"} | chosen if isinstance(chosen, dict) else chosen
    name, options = named.name_and_options(given, "method")
    return methods.make(name, options | named.options_of(pairs or (), "method option"))


def said(sources: Iterable[str]) -> list[str]:
    """Prompts as they stand, or from prompt sets, files and datasets. UserError for an empty one."""
    found: list[str] = []
    for source in sources:
        found += prompts(source) if is_source(source) else [source]
    if not all(prompt.strip() for prompt in found):
        raise UserError("a prompt is empty")
    return found


def at_least_one(**values: int | None) -> None:
    """UserError naming the value that is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")


def counted(number: int, thing: str) -> str:
    """A number of things, in the plural but for one."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def weights(parts: Iterable[str]) -> dict[Path, float]:
    """Parts like runs/pick=0.6 as a path and a weight; the weights of one path add."""
    found: dict[Path, float] = {}
    for part in parts:
        name, _, value = part.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"{part!r} must look like runs/pick=0.6")
        found[Path(name)] = found.get(Path(name), 0.0) + weight
    return found
