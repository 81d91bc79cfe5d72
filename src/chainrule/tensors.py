"""Tensors on disk, as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from chainrule.errors import UserError
from chainrule.files import whole


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    """Write a safetensors file from tensors on any device, and return its bytes. Raises UserError as `files.whole` does."""
    found = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, dict(header) if header else None)
    with whole(path) as file:
        file.write(found)
    return found


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises UserError for a damaged one, and for a number that is not finite."""
    try:
        found = load(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({error})") from error
    for name, value in found.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{path} is damaged: {name} is no tensor of finite numbers")
    return found
