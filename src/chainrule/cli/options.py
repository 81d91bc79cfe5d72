"""Options of commands, made from the fields of settings and configs, so that each option is written down once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from chainrule import yaml_text
from chainrule.checked import Checked, spellings
from chainrule.config import RunConfig

Given = Mapping[str, Any]
"""What was given on the command line, by the names of fields."""
NOTHING: Given = MappingProxyType({})


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every field of the settings it takes.

    A parameter of settings, `opening: Opening`, is filled with the settings that the options spell. A parameter
    `given: Annotated[Given, FinetuneConfig]` is filled with the given options alone, because a file may hold the rest.
    A field with the name of one of the command's own parameters gets no option.
    """
    own = inspect.signature(function, eval_str=True).parameters
    shown: list[inspect.Parameter] = []
    sections: dict[str, tuple[type[Checked], list[str]]] = {}
    for parameter in own.values():
        kind = _settings_of(parameter.annotation)
        made = (
            [parameter] if kind is None else [p for name, f in _fields(kind).items() if name not in own for p in _options(name, f)]
        )
        shown += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in made]
        if kind:
            sections[parameter.name] = kind, [each.name for each in made]

    def command(**values: Any) -> None:
        for name, (kind, options) in sections.items():
            said = {key: values.pop(key) for key in options}
            given = {key: value for key, value in said.items() if value is not None}
            values[name] = given if issubclass(kind, RunConfig) else kind(**given)
        function(**values)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return command


def _settings_of(annotation: Any) -> type[Checked] | None:
    """The settings or config that a parameter stands for; None for an ordinary one."""
    kinds = [annotation, *(get_args(annotation)[1:] if get_origin(annotation) is Annotated else ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Checked)), None)


def _fields(kind: type[Checked]) -> dict[str, FieldInfo]:
    fields = kind.flat_fields() if issubclass(kind, RunConfig) else kind.model_fields
    return {name: field for name, field in fields.items() if name != "kind"}


def _options(name: str, field: FieldInfo) -> list[inspect.Parameter]:
    """The option of a field, and a hidden one for each other spelling of it."""
    kind, (_, *others) = _kind(field.annotation), spellings(name, field)
    text = str(field.description)
    text = f"{text[0].upper()}{text[1:]}"
    if choices := _choices(field.annotation):
        text = f"{text} ({' | '.join(choices)})"
    text += f".{_default(field.default)}" + "".join(f" Also --{other}." for other in others)
    parse: dict[str, Any] = {"parser": as_in_a_file, "metavar": "<str>"} if kind is None else {}
    found = []
    for spelling in (name, *others):
        option = typer.Option(help=text, show_default=False, hidden=spelling != name, **parse)
        annotation = Annotated[kind or str | None, option]  # type: ignore[valid-type]
        found.append(inspect.Parameter(spelling, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return found


def _default(value: Any) -> str:
    if isinstance(value, dict):
        value = value["name"]
    return "" if value is None or value == () else f" [default: {value}]"


def _members(annotation: Any) -> list[Any]:
    """The kinds a value may be of, but for None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [] if annotation is NoneType else [annotation]


def _choices(annotation: Any) -> list[str]:
    return [choice for member in _members(annotation) if get_origin(member) is Literal for choice in get_args(member)]


def _kind(annotation: Any) -> Any:
    """What typer reads for a field: a simple kind, or a list of one. None: text that is read as YAML, as in a file."""
    members = _members(annotation)
    if _choices(annotation):  # pydantic checks the value
        return str
    if any(get_origin(member) is dict for member in members) or len({*members} & {int, float, str}) > 1:
        return None
    if str in members:
        return str
    (member,) = members
    return list[get_args(member)[0]] if get_origin(member) in (list, tuple) else member  # type: ignore[misc]


def as_in_a_file(text: str) -> Any:
    """The value of a text as YAML has it; the text itself if it is not YAML. An empty one is no value."""
    if not text.strip():
        raise typer.BadParameter("it is empty; leave the option out")
    try:
        return yaml_text.read(text)
    except ValueError:
        return text
