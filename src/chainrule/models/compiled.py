"""How a network is laid out and compiled to be faster."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from chainrule.errors import UserError
from chainrule.models.model import Model
from chainrule.offload import blocks_of

# A block's class has a graph for every shape, with and without a gradient, and for every set of adapters that is on.
GRAPHS = 128
COMPILERS = ("c++", "g++", "clang++", "cl")


def check_compiler(device: str) -> None:
    """Raises UserError where torch.compile would find no compiler for this device."""
    if device.startswith("cuda"):
        if find_spec("triton") is None:
            raise UserError("compile needs triton on a GPU, which is not installed; pip install triton, or leave compile out")
    elif not any(map(shutil.which, (*filter(None, [os.environ.get("CXX")]), *COMPILERS))):
        raise UserError("compile needs a C++ compiler on the CPU (g++ or clang), and none is found; install one, or leave it out")


def compiled(model: Model, backend: str = "inductor") -> Model:
    """The model, whose network is compiled in place when it first answers: a transformer by its repeated blocks, a UNet whole.

    A UNet's blocks are of as many shapes as there are, so that compiling them one by one saves nothing and leaves more between
    them. What was compiled is found again by the next process, in torch's own cache on disk. Raises UserError for a network that
    names no blocks.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 8 * GRAPHS)
    blocks = blocks_of(model.network)
    for part in [model.network] if model.component == "unet" else blocks:
        part.compile(backend=backend)
    return model


def channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out with the channels last, and so everything that passes through them."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
