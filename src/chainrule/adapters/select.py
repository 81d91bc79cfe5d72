"""Putting LoRA layers into a network, and saying which of them are on.

peft's own `set_adapter` flips `requires_grad` of the adapters it turns off: inside one chain their gradients are lost
without an error. Here the selection is a context: it sets which adapters the layers use, restores it on leaving,
and touches nothing else. At rest no adapter is on, so a pipeline that carries adapters is still the base model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chainrule.errors import UserError

# Cross- and self-attention and the feed-forward layers, as DRaFT (arXiv:2309.17400, A.1) trains them.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

_LAYERS: WeakKeyDictionary[nn.Module, list[BaseTunerLayer]] = WeakKeyDictionary()
_ACTIVE: ContextVar[tuple[nn.Module, Mapping[str, float]] | None] = ContextVar("_ACTIVE", default=None)


def _layers(network: nn.Module) -> list[BaseTunerLayer]:
    if network not in _LAYERS:
        _LAYERS[network] = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    return _LAYERS[network]


@contextlib.contextmanager
def selected(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Within the block the network answers with exactly these adapters on, at these scales.

    Nests; safe inside a sampling chain and inside recomputation; never touches `requires_grad`.
    """
    names, layers = [name for name, weight in weights.items() if weight], _layers(network)
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
            layer._active_adapter = active
            layer.scaling.update(scaling)


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint `function`; its second forward, in the backward pass, sees the adapters of the first.

    Hand it to `network.enable_gradient_checkpointing(recompute)`: torch's own checkpoint would run the second forward
    with whatever adapters are on by then, and raise nothing.
    """
    seen = _ACTIVE.get()
    again = selected(*seen) if seen else contextlib.nullcontext()
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again))


@dataclass(frozen=True, slots=True)
class Adapter:
    """One named LoRA inside one network."""

    name: str
    network: nn.Module

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            key.replace(f".{self.name}.", "."): value
            for key, value in self.network.named_parameters()
            if f".{self.name}." in key and "lora_" in key
        }

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())

    @property
    def config(self) -> LoraConfig:
        return self.network.peft_config[self.name]  # type: ignore[no-any-return, index, union-attr]

    def save(self, folder: Any) -> Any:
        from chainrule.adapters.files import save

        return save(self, folder)

    def remove(self) -> None:
        remove(self)


def inject(network: nn.Module, name: str, *, rank: int = 8, alpha: float | None = None, seed: int = 0,
           targets: tuple[str, ...] = TARGETS) -> Adapter:  # fmt: skip
    """Add a LoRA of this rank, an identity until trained, in float32 (float64 in a float64 network).

    `alpha` defaults to the rank, so the scale is 1. Raises UserError for a rank below 1, a name in use, or a network
    without a layer to adapt.
    """
    if rank < 1:
        raise UserError(f"rank is {rank}, but must be at least 1")
    if name in getattr(network, "peft_config", {}):
        raise UserError(f"an adapter named {name!r} is already there; remove it first or choose another name")
    kept = {id(weight): weight.requires_grad for weight in network.parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=list(targets), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network, name)
        except ValueError as error:
            raise UserError(f"no layer of {type(network).__name__} takes a LoRA on {', '.join(targets)}") from error
    _LAYERS.pop(network, None)
    adapter = Adapter(name, network)
    for layer in _layers(network):
        layer._active_adapter = []
    for weight in network.parameters():  # peft freezes whatever else is there
        weight.requires_grad_(kept.get(id(weight), False))
    for weight in adapter.parameters():
        weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
        weight.requires_grad_(True)
    return adapter


def remove(adapter: Adapter) -> None:
    """Take the adapter out. After the last one the network holds its original modules, bit for bit."""
    network = adapter.network
    config: dict[str, LoraConfig] = network.peft_config  # type: ignore[assignment]  # peft adds the attribute
    for layer in _layers(network):
        layer.delete_adapter(adapter.name)
        layer._active_adapter = []
    del config[adapter.name]
    if config:
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    del network.peft_config
    _LAYERS.pop(network, None)


def gradients(parameters: list[nn.Parameter]) -> Tensor:
    """All gradients as one flat vector, zeros where a plan left an adapter unused."""
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in parameters])
