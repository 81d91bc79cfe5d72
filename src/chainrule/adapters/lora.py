"""LoRA layers in a network: put in, loaded, taken out. The layers are peft's."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import finalize

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from chainrule import display
from chainrule.adapters.files import Weights, read
from chainrule.adapters.layers import LAYERS
from chainrule.adapters.select import forget, layers_of, named_layers, remember, unchanged, when_unused
from chainrule.errors import UserError

T = TypeVar("T")
# Cross- and self-attention and the feed-forward layers, as DRaFT (arXiv:2309.17400, A.1) trains them, by the names they have in
# UNets and in transformers, where text has layers of its own. What a network does not have is not looked for.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp",
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Adapter:
    """One named LoRA inside one network, which its pipeline calls `component`.

    `rate` and `decay` are factors on the run's learning rate and weight decay.
    """

    name: str
    network: nn.Module
    component: str = "unet"
    rate: float = 1.0
    decay: float = 1.0

    def __repr__(self) -> str:
        return display.line("Adapter", self._facts())

    def _repr_html_(self) -> str:
        """In a notebook."""
        return display.listed(self._facts())

    def _facts(self) -> dict[str, str]:
        if self.name not in getattr(self.network, "peft_config", {}):
            return {"adapter": self.name, "where": "not in its network any more"}
        weights = self.named_parameters()
        count = sum(weight.numel() for weight in weights.values())
        return {
            "adapter": self.name,
            "rank": f"rank {self.config.r}"
            + ("" if self.config.lora_alpha == self.config.r else f", alpha {self.config.lora_alpha:g}"),
            "layers": f"{len(weights) // 2} layers of the {self.component}",
            "parameters": f"{display.amount(count)} parameters"
            + ("" if any(w.requires_grad for w in weights.values()) else ", frozen"),
        }

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Its matrices, `...to_q.lora_A.weight` (rank, in) and `...to_q.lora_B.weight` (out, rank), in the network's order."""
        return {
            f"{layer}.{matrix}.weight": getattr(module, matrix)[self.name].weight
            for layer, module in named_layers(self.network).items()
            for matrix in ("lora_A", "lora_B")
            if self.name in getattr(module, matrix)
        }

    def parameters(self) -> list[nn.Parameter]:
        """Its matrices, in the order of `named_parameters`."""
        return list(self.named_parameters().values())

    @property
    def config(self) -> LoraConfig:
        """peft's own: rank, alpha, target layers."""
        return self.network.peft_config[self.name]  # type: ignore[index]

    def weights(self) -> Weights:
        """A copy of its matrices."""
        tensors = {key: value.detach().clone() for key, value in self.named_parameters().items()}
        return Weights(tensors, float(self.config.lora_alpha), self.component)

    def into(self, chain: T) -> T:
        """The chain as it is: an adapter answers inside the network it is in."""
        return chain

    def save(self, folder: str | Path) -> Path:
        """Write the adapter so that the pipeline's `load_lora_weights(folder)` reads it."""
        return self.weights().save(folder)

    def remove(self) -> None:
        """Take it out of the network. After the last one the network holds its original modules, bit for bit."""
        remove(self.network, self.name)


def every_layer(network: nn.Module) -> tuple[str, ...]:
    """Every linear layer and convolution of a network, by name."""
    found: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):  # a layer with a LoRA already: it, and not what is in it
            inside = (*inside, f"{name}.")
            found.append(name)
        elif isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(inside):
            found.append(name)
    return tuple(found)


def unused_name(network: nn.Module, stem: str) -> str:
    """`stem` with the first number that makes it the name of no adapter in the network."""
    taken = getattr(network, "peft_config", {})
    return next(f"{stem}{i}" for i in range(len(taken) + 1) if f"{stem}{i}" not in taken)


def inject(network: nn.Module, name: str, *, rank: int = 8, alpha: float | None = None, seed: int = 0,
           targets: tuple[str, ...] = TARGETS, component: str = "unet") -> Adapter:  # fmt: skip
    """Add a LoRA of this rank, an identity until trained, in float32 (float64 in a float64 network).

    `alpha` defaults to the rank, so the scale is 1. Raises UserError for a rank below 1, a name in use, or a network
    without a layer to adapt.
    """
    if rank < 1:
        raise UserError(f"rank is {rank}, but must be at least 1")
    if name in getattr(network, "peft_config", {}):
        raise UserError(f"an adapter named {name!r} is already there; remove it first or choose another name")
    with unchanged(network):
        return _inject(network, name, rank, alpha or rank, seed, targets, component)


def _inject(network: nn.Module, name: str, rank: int, alpha: float, seed: int, targets: tuple[str, ...], component: str) -> Adapter:
    kept = {id(weight): weight.requires_grad for weight in network.parameters()}
    on = {id(layer): layer._active_adapter for layer in layers_of(network)}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    config._register_custom_module(LAYERS)
    there = next(network.parameters()).device
    # peft makes the matrices on the CPU and moves them; where there are no numbers, nothing can be moved.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), there if there.type == "meta" else nullcontext():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are wanted
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network, name)
        except ValueError as error:
            raise UserError(f"no layer of {type(network).__name__} takes a LoRA on {', '.join(targets)}") from error
    forget(network)
    adapter = Adapter(name, network, component)
    for layer in layers_of(network):
        layer._active_adapter = on.get(id(layer), [])
    for weight in network.parameters():  # peft freezes whatever else is there
        weight.requires_grad_(kept.get(id(weight), False))
    for weight in adapter.parameters():
        weight.data = weight.data.to(there, torch.promote_types(weight.dtype, torch.float32))  # its layer may be elsewhere
        weight.requires_grad_(True)
    return adapter


def remove(network: nn.Module, name: str) -> None:
    """Take an adapter out. After the last one the network holds its original modules, bit for bit."""
    config: dict[str, LoraConfig] = network.peft_config  # type: ignore[assignment]  # peft adds the attribute
    with unchanged(network):
        for layer in layers_of(network):
            layer._active_adapter = [other for other in layer._active_adapter if other != name]  # else peft turns another one on
            layer.delete_adapter(name)
        del config[name]
        if config:
            return
        for parent in list(network.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(parent, child_name, child.get_base_layer())
        del network.peft_config
        forget(network)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Lease:
    """A loaded adapter that goes out of its network when nothing holds this object any more."""

    adapter: Adapter


def lease(network: nn.Module, name: str, source: str | Path | Weights) -> Lease:
    """`load`, for as long as something holds what this returns: the `Band` that switches the adapter on, say."""
    held = Lease(load(network, name, source))
    remember(network, name, held)
    finalize(held, when_unused, network, partial(remove, network, name)).atexit = False
    return held


def load(network: nn.Module, name: str, source: str | Path | Weights) -> Adapter:
    """Add a saved adapter to a network, frozen. Raises UserError when it was made for another architecture."""
    stored = source if isinstance(source, Weights) else read(source)
    modules = dict(network.named_modules())
    for target in stored.targets:
        if target not in modules:
            raise UserError(f"the adapter was made for another model: {type(network).__name__} has no layer {target}")
    adapter = inject(network, name, rank=stored.rank, alpha=stored.alpha, targets=stored.targets, component=stored.component)
    here = adapter.named_parameters()
    for key, value in stored.tensors.items():
        if key not in here or here[key].shape != value.shape:
            adapter.remove()
            raise UserError(f"the adapter was made for another model: {key} has shape {tuple(value.shape)}")
        here[key].data.copy_(value)
        here[key].requires_grad_(False)
    return adapter
