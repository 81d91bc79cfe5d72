"""What people ask for: prompts and seeds, as lists, wherever they come in."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

from chainrule.errors import UserError


def texts(prompts: str | Iterable[str]) -> list[str]:
    """Prompts as a list: of several, or one by itself. Raises UserError for one that is not text (None, NaN, bytes, a list)."""
    found = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, str) else [prompts]
    for number, prompt in enumerate(found, 1):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {number} is {prompt!r}, but must be text")
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError(f"prompt {number} is {prompt!r}, which is not text in UTF-8; write it in UTF-8")
    return found


def numbers(seeds: int | Iterable[int]) -> list[int]:
    """Seeds as a list: of several, or one by itself. Raises UserError for one that is no whole number in [0, 2^64)."""
    return [_seed(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]


def pairs(prompts: str | Iterable[str], seeds: int | Iterable[int]) -> tuple[list[str], list[int]]:
    """Prompts and their seeds, one each. Raises UserError for what is neither, and if there are more of one than of the other."""
    said, drawn = texts(prompts), numbers(seeds)
    if len(said) != len(drawn):
        raise UserError(f"{len(said)} prompts but {len(drawn)} seeds; give one seed per prompt")
    return said, drawn


def _seed(given: int) -> int:
    try:
        found = index(given)
    except TypeError:
        found = -1
    if not 0 <= found < 2**64:
        raise UserError(f"a seed is {given!r}, but must be a whole number between 0 and 2^64 - 1")
    return found
