"""The one error users see: a sentence that names the bad value and says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, explained in one line. The command line prints it without a traceback."""


class Note(UserWarning):
    """Something the user should know and that is no error, in one line. The command line prints it as "note: ..."."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An unknown name, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, 1, 0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})")
