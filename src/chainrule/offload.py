"""Networks whose weights stay on the CPU and are moved to the device as they are asked, by accelerate's hooks."""

from __future__ import annotations

import torch
from accelerate import cpu_offload
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn


def streamed(network: nn.Module, device: torch.device | str) -> None:
    """Keep the weights on the CPU; each layer's are on the device while it answers. For networks that run without a graph."""
    cpu_offload(network, torch.device(device))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict, wherever its weights are."""
    return dict(get_state_dict_offloaded_model(network))
