"""How many bytes of tensors a function holds at its worst moment. Used by the memory test and by benchmarks/bench.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within the block, `live` is the bytes of all storages made in it that are still held, and `peak` its maximum.

    Storages that were there before, weights above all, count nothing, nor do views. It sees what operations return, in
    forward, backward and recomputed passes; not the scratch space inside a single kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._watch(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._watch(tensor, new=True)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._watches.clear()  # a dropped weak reference calls nothing

    def _watch(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if new else 0
            self._watches[key] = weakref.ref(storage, partial(self._forget, key))
            self.live += self._sizes[key]
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _: object) -> None:
        self.live -= self._sizes.pop(key)
        del self._watches[key]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in an operation's arguments or results."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for leaf in tree:
            yield from _tensors(leaf)


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """The most bytes that `run()` held at once, above what was there before it.

    On a GPU the caching allocator's own count, which has the kernels' scratch space too; elsewhere `LiveBytes`.
    """
    if device is not None and device.type == "cuda":
        gc.collect()  # garbage freed during the run would be subtracted
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as meter:
        run()
    return meter.peak
