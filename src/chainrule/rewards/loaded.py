"""A cache of the networks that rewards have loaded. Each is loaded once for a source and a device, and rewards share it."""

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
    """A decorator for loaders: the same arguments give the same network until `release`."""
    cached = lru_cache(maxsize=MOST)(load)
    _CACHES.append(cached)
    return cached  # type: ignore[return-value]


def release() -> None:
    """Free every network that rewards have loaded, on all devices. A reward that is called again loads its networks again."""
    for cached in _CACHES:
        cached.cache_clear()
    gc.collect()
