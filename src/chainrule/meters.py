"""Counting bytes: what a function holds at its worst moment, what autograd keeps of a call, what is on a device already."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

ITEM = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """Within the block, `live` is the bytes of all storages made in it that are still held, and `peak` its maximum.

    Storages that were there before, weights above all, count nothing, nor do views. It sees what operations return, in
    forward, backward and recomputed passes; not the scratch space inside a single kernel. With a `device` only its tensors
    count. On the meta device tensors have no numbers: one that is read is 0 or true, and an operation seen before, on the
    same shapes and arguments, is not asked again what it makes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.device = device
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._known: dict[Any, _Made | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ITEM and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0.0
        repeats = self.device is not None and self.device.type == "meta" and _makes_new(func)
        key = (func, _face(args), _face(kwargs)) if repeats else None
        made = self._known.get(key) if repeats else None
        if made is not None:
            return self._again(made)
        for tensor in _tensors((args, *kwargs.values())):
            self._watch(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._watch(tensor, new=True)
        if repeats:
            self._known[key] = _Made.of(out)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._watches.clear()  # a dropped weak reference calls nothing

    def _again(self, made: _Made) -> Any:
        found = [form and torch.empty_strided(form[0], form[1], dtype=form[2], device="meta") for form in made.forms]
        for tensor in found:
            if tensor is not None:
                self._watch(tensor, new=True)
        return tuple(found) if made.several else found[0]

    def _watch(self, tensor: Tensor, new: bool) -> None:
        if self.device is not None and tensor.device.type != self.device.type:
            return
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


@dataclass(frozen=True, slots=True)
class _Made:
    """What an operation makes: shape, strides and type of each result, None for one it leaves out."""

    several: bool
    forms: tuple[Any, ...]

    @classmethod
    def of(cls, out: Any) -> _Made | None:
        """None where that cannot be made again by its form alone."""
        several = isinstance(out, (tuple, list))
        found = tuple(out) if several else (out,)
        if not all(t is None or (isinstance(t, Tensor) and t.is_meta and t.storage_offset() == 0) for t in found):
            return None
        return cls(several, tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in found))


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation returns new tensors only: no views, nothing in place."""
    schema = func._schema
    return func is not ITEM and not any(value.alias_info for value in (*schema.arguments, *schema.returns))


def _face(value: Any) -> Any:
    """What of an argument decides about the form of the result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, dict):
        return tuple((key, _face(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_face, value))
    return type(value), value


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


def storages(device: torch.device) -> dict[int, int]:
    """The storages of every tensor on a device by now, weights of models and rewards above all, and their bytes."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == device.type]
    found = (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def saved_bytes(run: Callable[[], Tensor], there: Mapping[int, int]) -> int:
    """Bytes autograd keeps for the backward pass of `run`, without what was there before."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(seen.values())
