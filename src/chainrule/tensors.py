"""Tensors on disk, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from chainrule.files import whole


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    """Write a safetensors file from tensors on any device, and return its bytes. Raises UserError as `files.whole` does."""
    found = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, dict(header) if header else None)
    with whole(path) as file:
        file.write(found)
    return found
