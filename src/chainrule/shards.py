"""A frozen network whose blocks are in shards: every process holds a part of each, and a whole one only while it answers.

torch's fully_shard (FSDP2) gathers a block before its forward and its backward pass and frees it after both. Adapters are put in
afterwards, so that it knows nothing of them: they are whole on every process, as without shards.
A call of such a network is a meeting of all processes that hold it. So these have to make the same calls in the same order: what
shares out images by `Processes.rounds` lets a process without one of its own go along.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chainrule.errors import UserError
from chainrule.processes import Processes, answered

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED: WeakSet[nn.Module] = WeakSet()


def holders(device: torch.device, shards: int | None = None) -> Processes:
    """The processes that hold a network together, `shards` of them one copy of its blocks (default: all of them).

    Raises UserError for one process, for a number of shards that does not divide theirs, and for a torch or device without FSDP2.
    """
    processes = Processes.here(device)
    if processes.count == 1:
        raise UserError("network is 'shard', but this is one process; launch several (docs/many-gpus.md), or take network cpu")
    if shards and processes.count % shards:
        raise UserError(f"shards is {shards}, but must divide the number of processes, which is {processes.count}")
    if device.type not in ("cuda", "cpu", "xpu"):
        raise UserError(f"network is 'shard', which is for GPUs and CPUs, and the device is {device}; take network device")
    if not dist.is_available() or not hasattr(_fsdp_module(), "set_custom_all_gather"):
        raise UserError(f"network is 'shard', which torch {torch.__version__} does not have; install torch 2.9 or newer")
    return processes


def _fsdp_module() -> Any:
    from torch.distributed import fsdp

    return getattr(fsdp, "FSDPModule", None)


def shard(
    network: nn.Module, blocks: Sequence[nn.Module], device: torch.device, processes: Processes, shards: int | None = None
) -> None:  # fmt: skip
    """Freeze a network and share its blocks out: each goes to the device, and all but this process's part of it is let go.

    The rest of the network stays whole, where it is. Every process has to call this, for the same network.
    """
    from torch.distributed.fsdp import fully_shard

    network.requires_grad_(False)
    mesh = _mesh(device, processes, shards or processes.count)
    # Of a block that returns a view, which nobody writes into here: diffusers adds out of place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    rest = {weight for weight in network.parameters() if id(weight) not in inside}
    for block in blocks:
        for weight in block.parameters():
            weight.data = weight.data.contiguous()  # what passes through a convolution keeps its layout, channels last or not
        fully_shard(block, mesh=mesh, reshard_after_forward=True).set_custom_all_gather(_Gathering())  # type: ignore[arg-type]
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
    for module in (*blocks, network):  # their classes are made by torch, and are known by their names here and in diffusers
        type(module).__name__ = type(module).__mro__[2].__name__
    network.register_forward_hook(_forget)
    _SHARDED.add(network)


def is_sharded(network: nn.Module) -> bool:
    """Whether a network's calls are meetings of processes."""
    return network in _SHARDED


def _mesh(device: torch.device, processes: Processes, shards: int) -> DeviceMesh:
    """The processes that hold one copy together: those launched side by side, which are on one machine where it has enough."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if shards == processes.count:
        return init_device_mesh(device.type, (shards,))
    mine: Any = None
    for first in range(0, processes.count, shards):  # every process has to make every group
        group = dist.new_group(list(range(first, first + shards)))
        mine = group if first <= processes.index < first + shards else mine
    return DeviceMesh.from_group(mine, device.type)


class _Gathering:
    """torch's own way of putting a block together, and one line instead of torch's where another process is gone."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for the whole block."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Any:
        gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name of the same
        with answered():
            return gather(output_tensor, input_tensor, group=group, async_op=async_op)


def _forget(network: Any, given: object, answer: object) -> None:
    """After a call without a graph: torch would remember the order of its blocks until a backward pass comes."""
    if not torch.is_grad_enabled() and hasattr(network, "reset_iter_state"):
        network.reset_iter_state()
