"""Arguments of commands that are more than one value: methods with options, prompts, mixing weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chainrule import methods, named
from chainrule.config import RunConfig
from chainrule.errors import UserError
from chainrule.prompts import is_source, prompts
from chainrule.settings import MOST_IMAGES

AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the code that a config, run or table names, as path/to/file.py:NAME.")
]
Strength = Annotated[str, typer.Option(help="Strength of the adapters; 0:1 goes from 0 at the noise to 1 at the image.")]
BestOfOption = Annotated[int, typer.Option("--best-of", help="Images tried for each one; the best by the first reward is taken.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]


def is_config(argument: str | Path) -> bool:
    """Whether an argument is a config file rather than a prompt or a model."""
    return str(argument).endswith((".yaml", ".yml"))


def check_code(config: RunConfig, given: Mapping[str, Any], where: str | Path | None, allowed: bool) -> None:
    """Raises UserError if a config file names code, which was not given on the command line, and it is not `allowed` to run."""
    if where:
        named.refuse_code({key: value for key, value in config.code.items() if key not in given}, where, allowed)


def check_free(places: Iterable[Path], overwrite: bool) -> None:
    """Raises UserError if one of the files is there already, unless it may be overwritten."""
    there = next((place for place in places if place.exists()), None)
    if there and not overwrite:
        raise UserError(f"{there} is there already; pass --overwrite to replace it, or choose another place")


def place_of(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> str:
    """The folder of a run. Raises UserError if none is given, or a run cannot be put there."""
    from chainrule.runs import Run

    if not config.out:
        raise UserError("no out given; pass --out")
    Run(Path(config.out)).check_place(resume=resume, overwrite=overwrite)
    return config.out


def method_of(spec: Mapping[str, Any], pairs: Sequence[str] | None) -> methods.Method:
    """The method of {"name": ..., option: ...}, with more options written as "k=5".

    Raises UserError for an unknown name or option, and for a value that does not fit.
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    return methods.make(spec["name"], options | named.options_of(pairs or (), "method option"))


def prompts_of(sources: Iterable[str]) -> list[str]:
    """Prompts as they stand, or from prompt sets, files and datasets. Raises UserError for an empty one."""
    found: list[str] = []
    for source in sources:
        found += prompts(source) if is_source(source) else [source]
    if not all(prompt.strip() for prompt in found):
        raise UserError("a prompt is empty")
    return found


def check_counts(**values: int | None) -> None:
    """Raises UserError naming the number of things that is below 1, or above a million."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, but must be at least 1")
        if value is not None and value > MOST_IMAGES:
            raise UserError(f"{name} is {value}, but must be at most {MOST_IMAGES}")


def check_once(rewards: Sequence[str]) -> None:
    """Raises UserError for a reward that is given twice, by its name."""
    if twice := next((name for name in rewards if rewards.count(name) > 1), None):
        raise UserError(f"the reward {twice} is given twice")


def scale_of(text: str) -> float | tuple[float, float]:
    """A scale, "0.7", or one that changes from noise to image, "0:1". Raises UserError for anything else."""
    try:
        found = [float(part) for part in text.split(":")]
    except ValueError:
        found = []
    if len(found) not in (1, 2) or not all(map(math.isfinite, found)):
        raise UserError(f"scale is {text}, but must be a finite number, or two as in 0:1, from noise to image")
    return found[0] if len(found) == 1 else (found[0], found[1])


def counted(number: int, thing: str) -> str:
    """A number of things, in the plural but for one."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def weights(terms: Iterable[str]) -> dict[Path, float]:
    """Terms like runs/pick=0.6 as a path and a weight; the weights of one path add. Raises UserError for any other term."""
    found: dict[Path, float] = {}
    for term in terms:
        name, _, value = term.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise UserError(f"{term!r} must look like runs/pick=0.6")
        if not weight:
            raise UserError(f"{term!r} gives a weight of 0; leave it out")
        found[Path(name)] = found.get(Path(name), 0.0) + weight
    return found
