"""Networks that keep their blocks' inputs for the backward pass, and make the rest again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from chainrule.adapters import recompute
from chainrule.errors import UserError


@contextmanager
def recomputed(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block these networks recompute their blocks, under the adapters of the first forward pass.

    Those that did so before are left as they are. Raises UserError for one that cannot.
    """
    switched: list[Any] = []
    network: Any
    try:
        for network in networks:
            if not hasattr(network, "enable_gradient_checkpointing"):
                kind = type(network).__name__
                raise UserError(f"memory is 'blocks', but a {kind} has no blocks to recompute; take 'recompute'")
            if not network.is_gradient_checkpointing:
                network.enable_gradient_checkpointing(recompute)
                switched.append(network)
        yield
    finally:
        for network in switched:
            network.disable_gradient_checkpointing()
