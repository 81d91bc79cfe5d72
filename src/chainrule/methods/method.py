"""What a method is."""

from __future__ import annotations

from random import Random
from typing import Protocol

from chainrule.errors import UserError
from chainrule.plan import Grid, Plan


class Method(Protocol):
    """Anything with a plan is a method."""

    def plan(self, grid: Grid, rng: Random) -> Plan: ...


def within(name: str, value: int | None, low: int, high: int | None = None) -> None:
    """UserError for a number outside [low, high]; None is anywhere."""
    if value is not None and (value < low or (high is not None and value > high)):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} is {value}, but must be {wanted}")
