"""What a run is made from: a typed config per kind of run, written to `config.yaml` and read from it by the same class.

In a file the fields of `opening` and of `settings` stand beside the others, on one level:

    model: tiny-emoji
    method: draft-lv
    reward: pickscore
    updates: 60

Files of earlier versions are read too, whose keys and kinds have other names (`OLD_KEYS`, `OLD_KINDS`).
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, field_validator
from pydantic.fields import FieldInfo

from chainrule import yaml_text
from chainrule.checked import Checked, check_keys, spellings
from chainrule.errors import UserError, unknown
from chainrule.named import name_and_options
from chainrule.settings import Distillation, Finetuning, Opening, Steering

COMMANDS = {"finetune": "train", "distill": "distill", "steer": "steer"}
"""The kinds of run, and the command that makes one."""
OLD_KINDS = {"student": "distill", "steered": "steer"}
OLD_KEYS = {"under": "adapter", "images": "image"}
"""Kinds and keys as earlier versions wrote them, and what they are now."""


def _listed(value: Any) -> Any:
    """One text stands for a list of one."""
    return (value,) if isinstance(value, str) else value


def _method(value: Any) -> Any:
    """A name stands for the method with no options."""
    name, options = name_and_options({"name": "draft-lv", **value} if isinstance(value, Mapping) else value, "method")
    return {"name": name, **options}


Places = Annotated[tuple[str, ...], BeforeValidator(_listed)]
MethodSpec = Annotated[dict[str, Any], BeforeValidator(_method)]


class RunConfig(Checked, ABC):
    """What every kind of config has."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset()
    """The keys that may differ when a run is resumed: they do not touch the numbers of an update."""

    kind: str
    model: str = Field(default="tiny-emoji", description="bundled model, diffusers folder or hub id")
    opening: Opening = Opening()
    out: str | None = Field(default=None, exclude=True, description="folder of the run")

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards that the run was made for, and those that were watched."""
        return ()

    @classmethod
    def sections(cls) -> dict[str, type[Checked]]:
        """The fields that are settings of their own, whose fields stand beside the others in a file."""
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Checked)}

    @classmethod
    def flat_fields(cls) -> dict[str, FieldInfo]:
        """The fields by their names in a file, in the order in which they are written: `settings` and `opening` last."""
        sections = cls.sections()
        found = {name: field for name, field in cls.model_fields.items() if name not in sections}
        for section in reversed(sections.values()):
            found |= section.model_fields
        return found

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str = "option") -> Self:
        """The config that flat values say. Raises UserError naming the first wrong key and value."""
        cls._check(values, what)
        own, made = dict(values), dict[str, Any]()
        for name, section in cls.sections().items():
            keys = {key for field, info in section.model_fields.items() for key in spellings(field, info)}
            made[name] = section(**{key: own.pop(key) for key in list(own) if key in keys})
        return cls(**own, **made)

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any] | None = None, under: Mapping[str, Any] | None = None) -> Self:
        """The config of a YAML file, with some values put in the place of the file's, and others `under` them.

        Raises UserError naming the file or the first wrong key and value.
        """
        values = read_yaml(path)
        cls._check(values, f"key in {path}")
        return cls.layered(under or {}, values, changes or {})

    @classmethod
    def layered(cls, *layers: Mapping[str, Any]) -> Self:
        """The config of several sets of values, a later one going before an earlier one, by whichever spelling of a key."""
        names = {key: keys for name, field in cls.flat_fields().items() for keys in [spellings(name, field)] for key in keys}
        values: dict[str, Any] = {}
        for layer in layers:
            changed = {key for name in layer for key in names.get(name, ())}
            values = {key: value for key, value in values.items() if key not in changed} | dict(layer)
        return cls.of(values)

    @classmethod
    def _check(cls, values: Mapping[str, Any], what: str) -> None:
        """Raises UserError for values of another kind of run, and for unknown keys."""
        kind = values.get("kind")
        if kind in COMMANDS and kind != cls.model_fields["kind"].default:
            raise UserError(f"kind is {kind!r}; this config is for chainrule {COMMANDS[kind]}")
        check_keys(cls.flat_fields(), values, what)

    def values(self) -> dict[str, Any]:
        """The flat values as YAML holds them; `of` makes the same config of them. The device and the folder are not among them."""
        found = self.model_dump()
        for name in reversed(self.sections()):
            found |= found.pop(name)
        return plain(found, "config")

    @property
    def code(self) -> dict[str, Any]:
        """The values that may name code, by their keys."""
        values = self.values()
        return {key: values[key] for key in ("method", "reward", "held_out", "guidance") if values.get(key)}

    def text(self) -> str:
        """The config as YAML."""
        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True)


class FinetuneConfig(RunConfig):
    """A run of fine-tuning: `chainrule train`."""

    CHANGEABLE = frozenset({"updates", "save_every", "sample_every", "memory", "micro_batch"})

    kind: Literal["finetune"] = "finetune"
    adapter: Places = Field(
        default=(), description="a run or adapter to train on top of, which stays on and frozen; may be repeated"
    )
    student: str | None = Field(default=None, description="few-step student for the jumps of shortft; default: the model's own")
    method: MethodSpec = Field(default={"name": "draft-lv"}, description="one of `chainrule methods`, or path/to/file.py:Class")
    reward: str | None = Field(default=None, description='for example "10*pickscore + 2*hpsv2"; see `chainrule rewards`')
    held_out: str | None = Field(default=None, description="a reward that is measured along the way, but not trained")
    prompts: str | tuple[str, ...] = Field(default="animals:train", description="prompt set, file or dataset")
    watch: Places = Field(
        default=(),
        description="a prompt, set or file that the sample grids show; may be repeated; default: eight it trains on",
    )
    settings: Finetuning = Finetuning()

    @field_validator("student", mode="before")
    @classmethod
    def _own(cls, value: Any) -> Any:
        return None if value == "its own" else value  # as earlier versions wrote the model's own student

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward that is trained and the one that is watched."""
        return tuple(filter(None, (self.reward, self.held_out)))


class DistillConfig(RunConfig):
    """A run of distilling: `chainrule distill`."""

    CHANGEABLE = frozenset({"save_every"})

    kind: Literal["distill"] = "distill"
    prompts: str | tuple[str, ...] = Field(default="emoji", description="prompt set, file or dataset")
    settings: Distillation = Distillation()


class SteerConfig(RunConfig):
    """A run of steering: `chainrule steer`. It has one prompt, one seed and, if it starts from pictures, one of them per image."""

    CHANGEABLE = frozenset({"save_every", "memory"})

    kind: Literal["steer"] = "steer"
    model: str = Field(default="tiny-emoji", description="bundled model, diffusers folder, hub id or run")
    adapter: Places = Field(default=(), description="a run or adapter to put on the model; may be repeated")
    reward: str | None = Field(default=None, description='for example "clip:an angry face"; see `chainrule rewards`')
    prompts: Places = Field(default=(), description="prompts, prompt sets or prompt files")
    seeds: tuple[int, ...] | None = Field(default=None, description="the seed of each image")
    image: Places = Field(default=(), description="a picture to start from instead of noise; may be repeated")
    out: str | None = Field(default="runs/steer", exclude=True, description="folder for the images, the curve and a report")
    settings: Steering = Steering()

    @property
    def rewards(self) -> tuple[str, ...]:
        """The reward of the steering."""
        return (self.reward,) if self.reward else ()


AnyConfig: TypeAlias = FinetuneConfig | DistillConfig | SteerConfig
KINDS: dict[str, type[FinetuneConfig] | type[DistillConfig] | type[SteerConfig]] = {
    "finetune": FinetuneConfig,
    "distill": DistillConfig,
    "steer": SteerConfig,
}


def read_config(path: Path) -> AnyConfig:
    """The config in a file, of the kind that it says. Raises UserError naming the file and what is wrong with it."""
    values = read_yaml(path)
    kind = values.get("kind", "finetune")
    try:
        if kind not in KINDS:
            raise unknown("kind", str(kind), KINDS)
        return KINDS[kind].of(values, "key")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises UserError if it is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"the config file {path} does not exist")
    try:
        values = yaml_text.read(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    if values is not None and not isinstance(values, dict):
        raise UserError(f"the config file {path} must hold keys and values")
    return _renamed({str(key): value for key, value in (values or {}).items()}, path)


def _renamed(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The values of a file of an earlier version, by today's keys. Raises UserError for a file that has both."""
    for old, new in OLD_KEYS.items():
        if old in values and new in values:
            raise UserError(f"{old} and {new} are the same key in {path}; leave one out")
    if "kind" not in values and "under" in values:
        values["kind"] = "finetune"  # which was not written then
    if values.get("kind") in OLD_KINDS:
        values["kind"] = OLD_KINDS[values["kind"]]
        values.pop("method", None)  # steering wrote "sdo over latent" beside the gradient and the variable
    return {OLD_KEYS.get(key, key): value for key, value in values.items()}


def difference(before: Mapping[str, Any], now: Mapping[str, Any], but: frozenset[str]) -> tuple[str, Any, Any] | None:
    """The first key, `but` for some, whose values differ, dotted if nested, with both values."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, "(not set)"), now.get(key, "(not set)")
        if old == new or key in but:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and (inner := difference(old, new, frozenset())):
            return f"{key}.{inner[0]}", *inner[1:]
        return key, old, new
    return None


def plain(value: Any, key: str) -> Any:
    """The same value in what YAML and JSON can hold: tuples and ranges become lists, numpy scalars numbers.

    Raises UserError naming the key of a value that is none of these.
    """
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item, key) for item in value]
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if callable(getattr(value, "item", None)):
        with contextlib.suppress(ValueError, RuntimeError):  # an array or tensor of more than one number
            return plain(value.item(), key)
    raise UserError(f"{key}: a {type(value).__name__} cannot be written to the run folder; pass a name or a number")
