"""The networks that rewards have loaded: each once for a source and a device, shared by all rewards that look with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Network = TypeVar("Network")
MOST = 8  # of each kind; the one that was not used for longest goes first

_CACHES: list[Any] = []


def load_once(load: Callable[Given, Network]) -> Callable[Given, Network]:
    """This loader, which loads the same thing once until `release`."""
    cached = lru_cache(maxsize=MOST)(load)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def release() -> None:
    """Let go of every network that rewards have loaded, on all devices. A reward that is called again loads its own again."""
    for cached in _CACHES:
        cached.cache_clear()
    gc.collect()
