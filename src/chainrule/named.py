"""Values by name with options, read and written back: `draft-lv`, `{name: rescaled, scale: 5}`, `path/to/file.py:Class`.

A value is a frozen dataclass, and its fields are its options. They are read as their types say, from Python, YAML or the command
line; what is written can be read again. There is no torch here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from chainrule import yaml_text
from chainrule.errors import UserError, unknown

T = TypeVar("T")
WITHOUT_POINT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # 1e-3, which YAML 1.1 reads as text
PROGRAM = re.compile(r"(?:^|[-+*])\s*process:")  # a reward that starts another program
WORDS = {
    int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("text", "texts"),
    bool: ("true or false", "values true or false"), type(None): ("null", "nulls"),
}  # fmt: skip


# An object from a file


def is_place(text: str) -> bool:
    """Whether this names an object of a file, as `path/to/file.py:name` does."""
    return ".py:" in text or text.endswith(".py")


def runs_code(text: str) -> bool:
    """Whether this text, a reward's say, names code to run: an object of a file, or a program."""
    return is_place(text) or bool(PROGRAM.search(text))


def refuse_code(values: Mapping[str, Any], where: str | Path, allowed: bool) -> None:
    """Raises UserError if a file's values name code, `path/to/file.py:name` or a program, and it is not `allowed` to be run."""
    for key, value in values.items():
        for text in _texts(value):
            if runs_code(text) and not allowed:
                raise UserError(f"{where} names code to run, {key}: {text}; read it, then pass --allow-code")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in _texts(each))
    elif isinstance(value, Sequence):
        yield from (text for each in value for text in _texts(each))


def from_file(place: str, what: str, kind: str) -> Any:
    """The object of `path/to/file.py:name`, whose file is run once. `what` it is for and `kind` of object are for the errors.

    Raises UserError for a missing file, one that fails to run, and an unknown name, with the nearest known one.
    """
    path, _, name = place.rpartition(":") if not place.endswith(".py") else (place, "", "")
    if not name:
        raise UserError(f"say which {kind} of {path!r} is the {what}, as {path}:NAME")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no {what} file {path!r}")
    try:
        module = _run(path, file.resolve(), file.stat().st_mtime_ns)
    except Exception as error:
        raise UserError(f"{what} file {path!r} failed to run: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == path and key[0] != "_"]
        raise unknown(f"{kind} of {path}", name, own)
    return getattr(module, name)


@lru_cache
def _run(path: str, file: Path, changed: int) -> types.ModuleType:
    """The module of a file as it was `changed`, called by its path as it was given: `spelled` finds it there."""
    spec = importlib.util.spec_from_file_location(path, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = sys.modules[path] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


# A value by name


@dataclass(frozen=True, slots=True)
class Catalog(Generic[T]):
    """The values of one sort by name: `what` they are called in errors, and the frozen dataclasses."""

    what: str
    classes: Mapping[str, Callable[..., T]]

    def read(self, given: object) -> T:
        """A value from its name, or from its name with options, `{name: ..., option: ...}`. Raises UserError for anything else."""
        return self.make(*name_and_options(given, self.what))

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> T:
        """A value by the name of its class, or by `path/to/file.py:Class`, with its fields as options.

        An option that is itself of this sort is written as `read` takes it. Raises UserError, in one line, for an unknown name or
        option, with the nearest known one, for one that is missing and for a value that is not of the field's type.
        """
        kind, options = self._class(name), dict(options or {})
        called = name if is_place(name) else _key(name)
        known, types_of = _options(kind), _hints(kind)
        for option, value in options.items():
            if option not in known:
                raise unknown(f"option of {called}", str(option), known)
            options[option] = read_as(types_of[option], self._nested(value), f"option {option} of {called}")
        for option, field in known.items():
            if option not in options and field.default is MISSING and field.default_factory is MISSING:
                raise UserError(f"{self.what} {called} needs the option {option}")
        return kind(**options)

    def spelled(self, value: T) -> dict[str, Any]:
        """The name and options that `read` turns back into this value, in what YAML can hold.

        A value of a class that is neither here nor from a file that `make` has run is written as its repr, which cannot be read
        again. Raises UserError for an option that cannot be written down.
        """
        name = self._name(value)
        if name is None:
            return {"name": repr(value)}
        found: dict[str, Any] = {"name": name}
        for option, field in _options(type(value)).items():
            now = getattr(value, option)
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if type(now) is not type(default) or now != default:
                found[option] = self._written(now, f"option {option} of {name}")
        return found

    def _class(self, name: str) -> Callable[..., T]:
        if not is_place(name):
            if _key(name) not in self.classes:
                raise unknown(self.what, name, self.classes)
            return self.classes[_key(name)]
        found = from_file(name, self.what, "class")
        if not (isinstance(found, type) and is_dataclass(found)):
            raise UserError(f"{name} is no dataclass, but a {self.what} must be one; its fields are the options")
        return found  # type: ignore[return-value]

    def _name(self, value: object) -> str | None:
        kind = type(value)
        named = next((name for name, known in self.classes.items() if known is kind), None)
        return named or (f"{kind.__module__}:{kind.__qualname__}" if is_place(f"{kind.__module__}:") else None)

    def _nested(self, value: Any) -> Any:
        """The same with values of this sort for `{name: ...}`."""
        if isinstance(value, Mapping) and isinstance(value.get("name"), str):
            return self.read(value)
        return [self._nested(item) for item in value] if isinstance(value, list | tuple) else value

    def _written(self, value: Any, where: str) -> Any:
        """The same in what YAML can hold."""
        if is_dataclass(value) and self._name(value):
            return self.spelled(value)  # type: ignore[arg-type]
        if isinstance(value, list | tuple):
            return [self._written(item, where) for item in value]
        try:
            return to_jsonable_python(value)
        except PydanticSerializationError as error:
            raise UserError(f"{where} is a {type(value).__name__}, which cannot be written down; give a name or numbers") from error


def name_and_options(given: object, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a name, or of `{name: ..., option: ...}`. Raises UserError for anything else."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return given["name"], {key: value for key, value in given.items() if key != "name"}
    raise UserError(f"{what} is {given!r}, but must be a name, or a name with options")


def options_of(pairs: Sequence[str], what: str) -> dict[str, Any]:
    """Options as the command line has them, "k=5", with their values read as YAML. Raises UserError for one without a = in it."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        try:
            found[key.strip()] = yaml_text.read(value)
        except ValueError:
            sign = ""
        if not sign or not key.strip():
            raise UserError(f"{what} {pair!r} must look like k=5")
    return found


def _key(name: str) -> str:
    return name.lower().replace("_", "-")


# An option by its type


def _options(kind: Any) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(kind) if field.init}


def _hints(kind: Any) -> dict[str, Any]:
    """The types of a class's fields. Raises UserError for one that cannot be found where the class is."""
    try:
        return get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise UserError(f"the types of the options of {kind.__name__} cannot be read: {error}") from error


def read_as(hint: Any, value: Any, where: str) -> Any:
    """A value as a field of this type holds it: as YAML has it, with whole numbers for numbers and tuples for lists.

    Nothing else is turned into something else: "5" and true are no numbers. Raises UserError that names the value, as `where`,
    and what it must be.
    """
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        if value is None or isinstance(value, str | int | float | list | Mapping):
            raise UserError(f"{where} is {value!r}, but must be a {hint.__name__}")
        return value
    try:
        reader = TypeAdapter(hint, config=None if is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True))
        return _strictly(reader, value)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:
        raise UserError(f"{where} has the type {hint}, which cannot be read") from error
    except ValidationError as error:
        raise UserError(f"{where} is {value!r}, but {_wanted(hint, error)}") from error


def _strictly(reader: TypeAdapter[Any], value: Any) -> Any:
    """As JSON, where the value is such, which tells lists from tuples as little as YAML does; else as it is."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return reader.validate_python(_tuples(value), strict=True)
    try:
        return reader.validate_json(text, strict=True)
    except ValidationError:
        numbers = _numbers(value)
        if numbers == value:
            raise
        return reader.validate_json(json.dumps(numbers), strict=True)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _numbers(value: Any) -> Any:
    """The same with a number for a text such as 1e-3."""
    if isinstance(value, list | tuple):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and WITHOUT_POINT.fullmatch(value) else value


def _wanted(hint: Any, error: ValidationError) -> str:
    """What a value must be: by its type in plain words where that says it all, else as pydantic says it."""
    words, first = _words(hint), error.errors()[0]
    return f"must be {words}" if words else str(first["msg"]).replace("Input should be", "must be")


def _words(hint: Any, many: bool = False) -> str | None:
    """A type in words, of one value or of many; None for one with bounds of its own."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in WORDS:
        return WORDS[hint][many]
    if origin in (Union, types.UnionType):
        either = [_words(part, many) for part in inner]
        return " or ".join(map(str, either)) if all(either) else None
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (tuple, list, Sequence) and inner:
        return _list_words(inner, origin is tuple and ... not in inner, many)
    return f"a {hint.__name__}" if isinstance(hint, type) else None


def _list_words(inner: tuple[Any, ...], fixed: bool, many: bool) -> str | None:
    """A list's type in words: of as many items as there are types, or of any number of the first."""
    lists, items = "lists of" if many else "a list of", _words(inner[0], True)
    if not items or not fixed:
        return items and f"{lists} {items}"
    if len(set(inner)) > 1:
        return f"{lists} {', '.join(str(_words(part)) for part in inner)}"
    return f"{'pairs of' if many else 'a pair of'} {items}" if len(inner) == 2 else f"{lists} {len(inner)} {items}"
