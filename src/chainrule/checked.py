"""Values that are checked when they are made: what is wrong with them is one line that names the key as it was given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from chainrule.errors import UserError, unknown
from chainrule.named import WITHOUT_POINT

# What pydantic says of a wrong type, in plain words.
KINDS = {
    "string_type": "text", "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "bool_type": "true or false", "bool_parsing": "true or false",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "a name with options",
}  # fmt: skip


def spellings(name: str, field: FieldInfo) -> list[str]:
    """The names a field may be given by, its own first."""
    choices = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else []
    return list(dict.fromkeys([name, *(choice for choice in choices if isinstance(choice, str))]))


def check_keys(fields: Mapping[str, FieldInfo], keys: Iterable[str], what: str = "option") -> None:
    """Raises UserError for a key that no field is given by, with the nearest known one, and for one field given twice."""
    names = {spelling: name for name, field in fields.items() for spelling in spellings(name, field)}
    seen: dict[str, str] = {}
    for key in map(str, keys):
        if key not in names:
            raise unknown(what, key, names)
        if names[key] in seen:
            raise UserError(f"{seen[names[key]]} and {key} are the same {what}; leave one out")
        seen[names[key]] = key


def _refused(error: ValidationError) -> UserError:
    """The first wrong key and its value in one line, by the name it was given by."""
    errors = error.errors()
    first = errors[0]
    if first["type"] == "value_error":
        return UserError(str(first["ctx"]["error"]))
    name = first["loc"][0]
    # A field of several kinds has an error for each of them; the shortest path holds the whole value.
    same = [each for each in errors if each["loc"][0] == name]
    value = min(same, key=lambda each: len(each["loc"]))["input"]
    wanted = [KINDS.get(each["type"]) or _plainly(each["msg"]) for each in same]
    return UserError(f"{name} is {value!r}, but must be {' or '.join(dict.fromkeys(wanted))}")


def _plainly(message: str) -> str:
    for theirs, ours in (("Input should be ", ""), ("greater than or equal to", "at least"), ("less than or equal to", "at most")):
        message = message.replace(theirs, ours)
    return message


def _kinds(annotation: Any) -> set[Any]:
    """The simple kinds a value may be of, or be a list of."""
    if get_origin(annotation) is dict:
        return {dict}
    inner = [kind for each in get_args(annotation) for kind in _kinds(each)]
    return set(inner) or ({annotation} if isinstance(annotation, type) else set())


class Checked(BaseModel):
    """Frozen values. Whatever is wrong with them is a UserError in one line that names the key as it was given."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """A number is not true or false, nor a text in quotes, but for 1e-3, which YAML takes for one."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        wanted = "float_parsing" if float in kinds else "int_parsing"
        for each in value if isinstance(value, list | tuple) else [value]:
            if kinds & {int, float} and not kinds & {bool, str}:
                quoted = isinstance(each, str) and dict not in kinds and not (float in kinds and WITHOUT_POINT.fullmatch(each))
                if isinstance(each, bool) or quoted:
                    raise PydanticCustomError(wanted, "another kind")
        return value

    def __init__(self, **values: Any) -> None:
        check_keys(type(self).model_fields, values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refused(error) from error
