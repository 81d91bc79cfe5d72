"""Networks that keep their blocks' inputs for the backward pass, and make the rest again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from chainrule.adapters import recompute
from chainrule.errors import UserError

LAYERS = (ResnetBlock2D, Upsample2D, Attention)  # of a VAE's blocks


@contextmanager
def recomputed(networks: Sequence[nn.Module], decoders: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Within the block these networks recompute their blocks, under the adapters of the first forward pass.

    Decoders recompute the layers of their blocks: at full resolution a block of three is most of what an image takes. Those that
    did so before are left as they are. Raises UserError for a network that cannot.
    """
    switched: list[Any] = []
    layers: list[nn.Module] = []
    network: Any
    try:
        for network in networks:
            if not hasattr(network, "enable_gradient_checkpointing"):
                kind = type(network).__name__
                raise UserError(f"memory is 'blocks', but a {kind} has no blocks to recompute; take 'recompute'")
            if not network.is_gradient_checkpointing:
                network.enable_gradient_checkpointing(recompute)
                switched.append(network)
        for network in decoders:
            if not getattr(network, "is_gradient_checkpointing", False):
                layers += [layer for layer in network.modules() if isinstance(layer, LAYERS) and "forward" not in vars(layer)]
        for layer in layers:
            layer.forward = partial(recompute, layer.forward)
        yield
    finally:
        for network in switched:
            network.disable_gradient_checkpointing()
        for layer in layers:
            del layer.forward
