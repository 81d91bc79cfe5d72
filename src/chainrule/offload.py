"""Networks whose weights stay on the CPU and are moved to the device as they are asked.

Without a graph that is accelerate's affair (`streamed`). Where a gradient passes, copies have to be part of the graph (`lend`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from torch.func import functional_call

from chainrule.errors import UserError

AT_REST = torch.device("cpu")


def streamed(network: nn.Module, device: torch.device | str) -> None:
    """Keep the weights on the CPU; each layer's are on the device while it answers. For networks that run without a graph."""
    cpu_offload(network, torch.device(device))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict, wherever its weights are."""
    return dict(get_state_dict_offloaded_model(network))


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers network, the smallest that it names. Raises UserError for one that names none."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    named = [module for module in network.modules() if type(module).__name__ in names and module is not network]
    inner = [module for module in named if not any(type(part).__name__ in names for part in list(module.modules())[1:])]
    if not inner:
        raise UserError(f"a {type(network).__name__} names no blocks, which alone could be elsewhere; leave network on the device")
    return inner


def lend(blocks: Iterable[nn.Module], device: torch.device | str) -> None:
    """Keep the weights of blocks on the CPU. While a block answers it computes with copies of them on the device.

    The copies are in the graph: they go when the graph goes, so with blocks that are made again in the backward pass (`memory` is
    "blocks") those of one block are held at a time. Nothing is ever copied back; weights that are trained get their gradients
    where they are.
    """
    for block in blocks:
        if "forward" not in vars(block):
            block.to(AT_REST if torch.device(device).type != "meta" else device)
            block.forward = partial(_lent, block, torch.device(device))


def _lent(block: nn.Module, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    copies = {f"block.{name}": copied(weight, device) for name, weight in block.named_parameters()}
    copies |= {f"block.{name}": copied(value, device) for name, value in block.named_buffers()}
    return functional_call(_Own(block), copies, args, kwargs)


class _Own(nn.Module):
    """A block that answers by the forward pass of its class."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def copied(weight: Tensor, device: torch.device) -> Tensor:
    """A weight on the device; on the meta device, where everything is already, as many bytes more."""
    return torch.empty_like(weight) if device.type == "meta" and not weight.requires_grad else weight.to(device)


def is_lent(block: nn.Module) -> bool:
    """Whether a block's weights stay on the CPU."""
    return isinstance(vars(block).get("forward"), partial) and vars(block)["forward"].func is _lent


def away(network: nn.Module, device: torch.device | str, stay: Iterable[nn.Module] = ()) -> None:
    """Move a network to the device, but for these modules."""
    if not (stay := list(stay)):
        network.to(device)
        return
    kept = {id(tensor) for module in stay for tensor in (*module.parameters(), *module.buffers())}
    network._apply(lambda tensor: tensor if id(tensor) in kept else tensor.to(device))
