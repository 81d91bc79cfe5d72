"""Values by name with options: read as their types say, nested, and written back."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Protocol

import pytest
import torch
import yaml
from pydantic import Field
from torch import Tensor

from chainrule.errors import UserError
from chainrule.named import Catalog, name_and_options, options_of, read_as


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True)
class Disk:
    radius: float | Tensor = 1.0

    def area(self) -> float:
        return 3.0 * float(self.radius) ** 2


@dataclass(frozen=True)
class Ring:
    outer: Shape
    inner: Shape = field(default_factory=Disk)

    def area(self) -> float:
        return self.outer.area() - self.inner.area()


@dataclass(frozen=True)
class Several:
    shapes: tuple[Any, ...]
    note: str | None = None
    total: float = field(default=0.0, init=False)

    def area(self) -> float:
        return sum(shape.area() for shape in self.shapes)


SHAPES: Catalog[Shape] = Catalog("shape", {"disk": Disk, "ring": Ring, "several": Several})
VALUES = [
    ("disk", Disk()),
    ("DISK", Disk()),
    ({"name": "disk", "radius": 2}, Disk(2.0)),
    ({"name": "ring", "outer": {"name": "disk", "radius": 3}}, Ring(Disk(3.0))),
    ({"name": "ring", "outer": {"name": "ring", "outer": {"name": "disk"}}, "inner": {"name": "disk", "radius": 0.5}},
     Ring(Ring(Disk()), Disk(0.5))),
    ({"name": "several", "shapes": [{"name": "disk"}, {"name": "several", "shapes": []}], "note": "two"},
     Several((Disk(), Several(())), "two")),
]  # fmt: skip


@pytest.mark.parametrize(("given", "value"), VALUES, ids=str)
def test_a_value_is_read_and_written_so_that_it_reads_back(given: object, value: Shape) -> None:
    assert SHAPES.read(given) == value
    written = SHAPES.spelled(value)
    assert SHAPES.read(yaml.safe_load(yaml.safe_dump(written))) == value


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert SHAPES.spelled(Ring(Disk(2.0), Disk())) == {"name": "ring", "outer": {"name": "disk", "radius": 2.0}}


def test_a_value_of_a_class_that_has_no_name_is_written_as_it_prints() -> None:
    @dataclass(frozen=True)
    class Own(Disk):
        pass

    assert SHAPES.spelled(Own(2.0)) == {"name": repr(Own(2.0))}


def test_an_object_is_an_option_where_its_type_says_so_but_cannot_be_written_down() -> None:
    made = SHAPES.make("disk", {"radius": torch.tensor(2.0)})
    assert made.area() == 12
    with pytest.raises(UserError, match="option radius of disk is a Tensor, which cannot be written down"):
        SHAPES.spelled(made)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "shape is 3, but must be a name, or a name with options"),
        ({"radius": 3}, "shape is {'radius': 3}, but must be a name"),
        ({"name": 3}, "shape is {'name': 3}, but must be a name"),
        ("disc", "unknown shape 'disc'; did you mean 'disk'? (known: disk, ring, several)"),
        ("ring", "shape ring needs the option outer"),
        ({"name": "ring", "outer": 3}, "option outer of ring is 3, but must be a Shape"),
        ({"name": "ring", "outer": {"name": "disc"}}, "unknown shape 'disc'"),
        ({"name": "disk", "radius": "2"}, "option radius of disk is '2', but must be a number or a Tensor"),
        ({"name": "several", "shapes": [], "total": 1}, "unknown option of several 'total'"),
    ],
)
def test_what_cannot_be_read_is_one_line(given: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        SHAPES.read(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class Color(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("hint", "given", "value"),
    [
        (float, 5, 5.0), (float, float("inf"), float("inf")), (float, "1e-3", 0.001), (float, "-2E4", -2e4), (str, "1e-3", "1e-3"),
        (int, 2**70, 2**70), (float | str, "1e-3", "1e-3"), (int | float, 5, 5), (bool | None, None, None),
        (list[int], (1, 2), [1, 2]),
        (tuple[tuple[float, float], ...], [[1, 2]], ((1.0, 2.0),)), (dict[str, float], {"a": 1}, {"a": 1.0}),
        (Color, "red", Color.RED),
        (Color, Color.RED, Color.RED), (Path, "a/b", Path("a/b")), (Annotated[float, Field(gt=0)], 1, 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_is_read_as_its_type_says(hint: Any, given: object, value: object) -> None:
    found = read_as(hint, given, "it")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "given", "message"),
    [
        (int, "5", "it is '5', but must be a whole number"), (int, True, "it is True"), (int, 5.0, "it is 5.0"),
        (float, "5", "must be a number"), (float, False, "must be a number"), (str, 5, "must be text"), (bool, 1, "true or false"),
        (float, "0x10", "must be a number"), (tuple[int, int, int], [1, 2], "must be a list of 3 whole numbers"),
        (tuple[int, ...] | None, 3, "must be a list of whole numbers or null"), (list[list[str]], 3, "a list of lists of texts"),
        (Annotated[float, Field(gt=0)], 0, "it is 0, but must be greater than 0"), (Color, "rod", "must be a Color"),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_turned_into_something_else(hint: Any, given: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_as(hint, given, "it")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_lines_options_are_yaml() -> None:
    assert options_of(["k=5", "x = [1, 2.5]", "name='5'", "none=null"], "option") == {
        "k": 5,
        "x": [1, 2.5],
        "name": "5",
        "none": None,
    }
    assert name_and_options({"name": "disk", "radius": 2}, "shape") == ("disk", {"radius": 2})
    with pytest.raises(UserError, match="option 'k' must look like k=5"):
        options_of(["k"], "option")
