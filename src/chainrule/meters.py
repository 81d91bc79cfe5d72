"""Measures memory: the peak of a function, what autograd saves for a call, and what is on a device already."""

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
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

ITEM = torch.ops.aten._local_scalar_dense.default


class LiveBytes(TorchDispatchMode):
    """A context that counts bytes: `live` is those of all storages made within it and still held, `peak` the most there were.

    Storages from before it, such as weights, do not count, nor do views. It counts what operations return in forward, backward
    and recomputed passes, but not the scratch space inside a kernel. With a `device` only its tensors count. Tensors on the
    meta device have no numbers: one that is read is 0 or true, and the result of an operation is remembered for the same
    shapes and arguments.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.device = device
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self._known: dict[Any, _Results | None] = {}

    def start(self) -> None:
        """Count anew: what is held now was there before."""
        self.live = self.peak = 0
        self._sizes.clear()
        self._watches.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ITEM and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0.0
        repeats = self.device is not None and self.device.type == "meta" and _makes_new(func)
        key = (func, _signature(args), _signature(kwargs)) if repeats else None
        results = self._known.get(key) if repeats else None
        if results is not None:
            return self._again(results)
        for tensor in _tensors((args, *kwargs.values())):
            self._watch(tensor, new=False)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._watch(tensor, new=True)
        if repeats:
            self._known[key] = _Results.of(out)
        return out

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._watches.clear()  # a dropped weak reference calls nothing

    def _again(self, results: _Results) -> Any:
        found = [form and torch.empty_strided(form[0], form[1], dtype=form[2], device="meta") for form in results.forms]
        for tensor in found:
            if tensor is not None:
                self._watch(tensor, new=True)
        return tuple(found) if results.several else found[0]

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
class _Results:
    """The form of an operation's results: shape, strides and type of each; None for one that is None."""

    several: bool
    forms: tuple[Any, ...]

    @classmethod
    def of(cls, out: Any) -> _Results | None:
        """The form of these results; None if they cannot be remade from it."""
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


def _signature(value: Any) -> Any:
    """The part of an argument that determines the form of the result."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, dict):
        return tuple((key, _signature(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return type(value), value


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """The most bytes that `run()` held at once, beyond what was there before.

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
    """The storages of every tensor on a device, by address, with their bytes: the weights of models and rewards, above all."""
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == device.type]
    # torch.compile leaves tensors behind that have a form and no storage.
    found = (tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided and not is_fake(tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def saved_bytes(run: Callable[[], Tensor], there: Mapping[int, int]) -> int:
    """The bytes that autograd saves for the backward pass of `run()`, without the storages that were `there` (see `storages`)."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(seen.values())
