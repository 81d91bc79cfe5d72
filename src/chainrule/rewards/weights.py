"""Weights published as one file, here or on the hub, and the sizes of a network read off its tensors' shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILE = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)/(?P<file>[\w./-]+\.(?:safetensors|pth?))")
WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, ViT-g and ViT-bigG in open_clip's configurations; others have 64


def fetch(source: str) -> Path:
    """The path of a weight file: a path, a folder's safetensors file, owner/name/file on the hub, or a hub id's model.safetensors.

    A file on the hub is downloaded. Raises UserError if there is no such file.
    """
    here = Path(source).expanduser()
    if here.is_dir() and any(here.glob("*.safetensors")):
        return min(here.glob("*.safetensors"))
    if here.is_file():
        return here
    found = HUB_FILE.fullmatch(source) or HUB_FILE.fullmatch(f"{source}/model.safetensors")
    if found is None:
        raise UserError(f"no file {source!r}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(found["repo"], found["file"]))
    except (OSError, ValueError) as error:
        why = first_line(error)
        raise UserError(f"no file {source!r} here, and the hub does not give {found['file']} of {found['repo']}: {why}") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of an official .pt or .pth, under its "state_dict" if it has one.

    A .pt is a pickle. It is opened with torch's `weights_only`, which builds tensors and plain containers and refuses
    everything else, so it runs no code from the file. Raises UserError for a file that is neither.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is something else fails in as many ways as there are things
        raise UserError(f"cannot read the weights in {str(path)!r}: {first_line(error)}") from error
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"cannot read the weights in {str(path)!r}: it is not a dictionary of tensors")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def read_config(path: Path) -> dict[str, Any]:
    """The values of the config.json in a weight file's folder; empty if there is none."""
    place = path.parent / "config.json"
    return dict(json.loads(place.read_text())) if place.is_file() else {}


def tokenizer_of(path: Path, otherwise: str) -> Any:
    """The tokenizer in a weight file's folder, or else that of the hub id `otherwise`. Raises UserError if there is none."""
    from transformers import AutoTokenizer

    local = any((path.parent / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"))
    source = str(path.parent) if local else otherwise
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load a tokenizer from {source!r}, or beside {str(path)!r}: {first_line(error)}") from error


def heads(width: int, facts: dict[str, Any]) -> int:
    """The number of attention heads of a transformer: from its configuration, or else as published for its width.

    No tensor's shape tells it. Raises UserError for a width that is no multiple of a head's.
    """
    each = WIDE_HEADS.get(width, 64)
    if not facts.get("num_attention_heads") and width % each:
        advice = 'say it in a config.json beside the file: {"vision_config": {"num_attention_heads": ...}, "text_config": ...}'
        raise UserError(f"cannot tell how many heads a tower {width} wide has; {advice}")
    return int(facts.get("num_attention_heads") or width // each)


def depth(state: dict[str, Tensor], stem: str) -> int:
    """The number of blocks `stem`.0, `stem`.1, ... in a state dict."""
    numbers = [int(key.removeprefix(f"{stem}.").split(".")[0]) for key in state if key.startswith(f"{stem}.")]
    return max(numbers, default=-1) + 1


def pretrained(kind: Any, source: str, what: str) -> Any:
    """A transformers model of a folder or hub id, in float32, frozen: from safetensors, with every tensor it needs.

    transformers fills what a file lacks with random numbers and a warning, as when `source` holds another kind of model.
    Raises UserError, naming `what` was wanted, if the model cannot be loaded or lacks a tensor.
    """
    try:
        model, found = kind.from_pretrained(source, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot load {what} from {source!r}: {first_line(error)}") from error
    if found["missing_keys"]:
        raise UserError(f"{source!r} does not hold {what}: it has no {min(found['missing_keys'])!r}")
    return model.requires_grad_(False).eval()


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> Any:
    """Put weights into a model, in float32, and freeze it. Raises UserError naming the file if they do not fit exactly."""
    try:
        model.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} does not fit: {' '.join(str(error).split())[:300]}") from error
    return model.requires_grad_(False).eval()


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; the error's class if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
