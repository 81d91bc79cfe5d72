"""The jumps of a path as they are taken: the move each makes, and the one that the backward pass goes back by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from chainrule.errors import UserError
from chainrule.plan import Grad, Jump, Path, passed_over
from chainrule.solve import Solver, Step


@dataclass(slots=True)
class Taken:
    """One jump that was made, by its `move`. Of a live call also the state it read, and under KEEP its answer with its graph.

    `back` is the move that the backward pass goes back by, None where it is passed over. Where a leap reads the call, `leap` is the
    level that it lands on, and what this call counts in it. `after` is where the jump led to, where that is kept (`Chain.along`).
    """

    jump: Jump
    move: Step
    back: Step | None
    leap: tuple[float, Step] | None = None
    x: Tensor | None = None
    answer: Tensor | None = None
    after: Tensor | None = None


def taken(solver: Solver, path: Path, moves: Sequence[Step]) -> list[Taken]:
    """The jumps of a path with the moves they make, and those the backward pass goes back by.

    Raises UserError for a leap that the solver has no closed form for.
    """
    over, leaping, steps = passed_over(path), leaps(solver, path), []
    for i, (jump, move) in enumerate(zip(path, moves, strict=True)):
        leap = leaping.get(i)
        back: Step | None = leap[1] if leap else move
        if i in over:  # the leap's own start carries the state
            back = Step(1.0, leap[1].b) if leap and jump.grad is not Grad.NONE else None
        steps.append(Taken(jump, move, back, leap))
    return steps


def leaps(solver: Solver, path: Path) -> dict[int, tuple[float, Step]]:
    """Of every call that a leap reads, by its place in the path: the level it lands on, and what the call counts in it.

    Raises UserError for a leap that the solver has no closed form for.
    """
    found: dict[int, tuple[float, Step]] = {}
    places = {jump.start: i for i, jump in enumerate(path) if not jump.up}
    for jump in path:
        if jump.lands is not None:
            finish = any(other.finish and other.stop == jump.lands for other in path)
            nodes = (jump.start, *jump.reads)
            weights = _leap(solver, nodes, jump.lands, finish)
            found |= {places[level]: (jump.lands, weight) for level, weight in zip(nodes, weights, strict=True)}
    return found


def _leap(solver: Solver, nodes: Sequence[float], stop: float, finish: bool) -> tuple[Step, ...]:
    leap: Callable[[Sequence[float], float, bool], tuple[Step, ...]] | None = getattr(solver, "leap", None)
    if leap is None:
        raise UserError(f"the solver {type(solver).__name__} has no closed form for a leap over several steps; take ddim or euler")
    try:
        return leap(nodes, stop, finish)
    except ValueError as error:
        raise UserError(f"{error}, so a leap from there has no weights of several answers; take leapalign") from error
