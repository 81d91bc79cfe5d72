"""Which adapters are on.

peft's own `set_adapter` flips `requires_grad` of the adapters it turns off: inside one chain their gradients are lost
without an error. Here the selection is a context: it sets which adapters the layers use, restores it on leaving,
and touches nothing else. At rest no adapter is on, so a pipeline that carries adapters is still the base model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(slots=True)
class _Known:
    """What is remembered of a network: its adapted layers, who holds which adapter, and who relies on them being there."""

    layers: dict[str, BaseTunerLayer] | None = None
    leases: WeakValueDictionary[str, Any] = field(default_factory=WeakValueDictionary)
    blocks: int = 0
    waiting: list[Callable[[], None]] = field(default_factory=list)


_NETWORKS: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_ACTIVE: ContextVar[tuple[nn.Module, Mapping[str, float]] | None] = ContextVar("_ACTIVE", default=None)
_LOCK = RLock()  # garbage is collected in whatever thread is running


def _known(network: nn.Module) -> _Known:
    with _LOCK:
        return _NETWORKS.setdefault(network, _Known())


def named_layers(network: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers of a network that have adapters, by name, in the network's order."""
    known = _known(network)
    if known.layers is None:  # looked up once: a network has thousands of modules, and every call asks
        known.layers = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    return known.layers


def layers_of(network: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a network that have adapters."""
    return list(named_layers(network).values())


@contextlib.contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Within the block `when_unused` waits, so that no adapter goes while the network or its layers are walked through."""
    known = _known(network)
    with _LOCK:
        known.blocks += 1
    try:
        yield
    finally:
        with _LOCK:
            known.blocks -= 1
            while known.waiting and not known.blocks:
                known.waiting.pop(0)()


def when_unused(network: nn.Module, action: Callable[[], None]) -> None:
    """Do this now, or when the last block that uses the network has ended: safe in a finalizer, which may run anywhere."""
    known = _known(network)
    with _LOCK:
        if known.blocks:
            known.waiting.append(action)
        else:
            action()


def remember(network: nn.Module, name: str, lease: object) -> None:
    """What holds an adapter in the network, so that a graph that will be made again can hold it too."""
    _known(network).leases[name] = lease


@contextlib.contextmanager
def selected(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Within the block the network answers with exactly these adapters on, at these scales.

    Nests; safe inside a sampling chain and inside recomputation; never touches `requires_grad`. An adapter that is taken
    out within the block stays out.
    """
    with unchanged(network):
        names, layers = [name for name, weight in weights.items() if weight], layers_of(network)
        before = [(layer._active_adapter, dict(layer.scaling)) for layer in layers]
        token = _ACTIVE.set((network, weights))
        try:
            for layer in layers:
                layer._active_adapter = [name for name in names if name in layer.scaling]
                for name in layer._active_adapter:
                    layer.scaling[name] = layer.lora_alpha[name] / layer.r[name] * weights[name]
            yield
        finally:
            _ACTIVE.reset(token)
            for layer, (active, scaling) in zip(layers, before, strict=True):
                layer._active_adapter = [name for name in active if name in layer.scaling]
                layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})


# What is made again is not part of a compiled network: its second pass has to find these adapters.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def recompute(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `function`; its second forward, in the backward pass, sees the adapters of the first.

    Hand it to `network.enable_gradient_checkpointing(recompute)`: torch's own checkpoint would run the second forward
    with whatever adapters are on by then, and raise nothing.
    """
    seen = _ACTIVE.get()
    again = _Again(*seen, _leases(*seen)) if seen else contextlib.nullcontext()
    twice = lambda: (contextlib.nullcontext(), again)
    return checkpoint(function, *args, use_reentrant=False, context_fn=twice, **kwargs)


def _leases(network: nn.Module, weights: Mapping[str, float]) -> list[object]:
    leases = _known(network).leases
    return [leases[name] for name in weights if name in leases]


@dataclass(slots=True)
class _Again:
    """`selected`, as often as it is entered (a graph may be pulled twice), holding the adapters in the network until then."""

    network: nn.Module
    weights: Mapping[str, float]
    leases: list[object]
    entered: list[contextlib.AbstractContextManager[None]] = field(default_factory=list)

    def __enter__(self) -> None:
        self.entered.append(selected(self.network, self.weights))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


def forget(network: nn.Module) -> None:
    """Look its layers up again next time: adapters were put in or taken out."""
    _known(network).layers = None
