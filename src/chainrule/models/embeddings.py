"""Prompts that are embedded once, ahead of a run, and kept on the CPU or in a folder: text encoders then have nothing to do."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from chainrule.denoise import Condition, PromptEmbedding
from chainrule.errors import Note
from chainrule.files import make_folder, whole
from chainrule.offload import away, streamed, weights_of
from chainrule.tensors import read_tensors, write_tensors

TOGETHER = 4  # prompts embedded at a time, always as many, so that no row depends on which others there are
HELD = 2**32  # bytes of embeddings held in memory at the most
SHOWN = 64  # prompts from which on a progress bar is shown
FORMAT = 1  # of the files; part of their names

Embed = Callable[[Sequence[str]], Condition]


@dataclass(frozen=True, slots=True)
class Known:
    """`embed` with the rows of known prompts at hand, (1, ...) each on the CPU; it is asked for others."""

    embed: Embed
    rows: Mapping[str, Condition]
    network: nn.Module

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """The embeddings of a batch, where the network is."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.rows))
        found = dict(zip(new, single(self.embed, new), strict=True))
        rows = [self.rows[prompt] if prompt in self.rows else found[prompt] for prompt in prompts]
        device = next(self.network.parameters()).device
        positive = _together([row.positive for row in rows])
        shared = all(row.negative is row.positive for row in rows)
        return Condition(positive, positive if shared else _together([row.negative for row in rows])).each(lambda t: t.to(device))


def _together(rows: Sequence[PromptEmbedding]) -> PromptEmbedding:
    def parts(of: Callable[[PromptEmbedding], Tensor | None]) -> Tensor | None:
        found = [part for row in rows if (part := of(row)) is not None]
        return torch.cat(found) if found else None

    return PromptEmbedding(torch.cat([row.states for row in rows]), parts(lambda row: row.pooled), parts(lambda row: row.mask))


def single(embed: Embed, prompts: Sequence[str]) -> Iterator[Condition]:
    """The embedding of each prompt, (1, ...) on the CPU, to the bit the same in any company."""
    empty: PromptEmbedding | None = None
    for i in range(0, len(prompts), TOGETHER):
        some = list(prompts[i : i + TOGETHER])
        batch = embed(some + some[-1:] * (TOGETHER - len(some))).each(_at_rest)
        for k in range(len(some)):
            row = batch.each(lambda part, k=k: part[k : k + 1].clone())  # type: ignore[misc]  # and not the batch with it
            if row.negative is not row.positive and empty is not None and _equal(row.negative, empty):
                row = Condition(row.positive, empty)  # one for all of them
            empty = row.negative
            yield row


def _at_rest(part: Tensor) -> Tensor:
    return part.detach() if part.is_meta else part.detach().cpu()


def _equal(one: PromptEmbedding, other: PromptEmbedding) -> bool:
    pairs = ((one.states, other.states), (one.pooled, other.pooled), (one.mask, other.mask))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def ahead(embed: Embed, prompts: Sequence[str], folder: Folder | None) -> Mapping[str, Condition]:
    """The rows of these prompts: in the folder, which is filled with those it lacks, or in memory as far as `HELD` goes."""
    new = [prompt for prompt in dict.fromkeys(prompts) if folder is None or prompt not in folder]
    held: dict[str, Condition] = {}
    size, rows = 0, zip(new, single(embed, new), strict=True)
    bar = track(rows, "embedding prompts", len(new), console=Console(stderr=True), transient=True, disable=len(new) < SHOWN)
    for prompt, row in bar:
        if folder is not None:
            folder.keep(prompt, row)
        elif (size := size + row.positive.states.nbytes) <= HELD:
            held[prompt] = row
        else:
            advice = "prompt_cache keeps them in a folder"
            warnings.warn(Note(f"the embeddings of {len(new)} prompts take too much memory; {advice}"), stacklevel=3)
            break
    return held if folder is None else folder


@dataclass(frozen=True, slots=True)
class Folder(Mapping[str, Condition]):
    """The rows of prompts as files of their own, for one set of text encoders: a run that was killed goes on where it was."""

    place: Path
    encoders: str  # what tells these text encoders from others

    @classmethod
    def of(cls, place: str | Path | None, pipe: Any, component: str) -> Folder | None:
        """The folder for a pipeline's text encoders; None for one that has none, and where none is wanted."""
        return cls(Path(place), fingerprint(pipe, component)) if place and text_encoders(pipe, component) else None

    def _file(self, prompt: str) -> Path:
        return self.place / f"{hashlib.sha256(f'{FORMAT} {self.encoders} {prompt}'.encode()).hexdigest()[:40]}.safetensors"

    def __contains__(self, prompt: object) -> bool:
        return self._file(str(prompt)).is_file()

    def __getitem__(self, prompt: str) -> Condition:
        """Raises KeyError for a prompt that is not there, UserError for a damaged file."""
        if prompt not in self:
            raise KeyError(prompt)
        found = read_tensors(self._file(prompt))
        positive = _read(found, "positive")
        return Condition(positive, _read(found, "negative") if "negative.states" in found else positive)

    def keep(self, prompt: str, row: Condition) -> None:
        """Write a row, whole or not at all. Raises UserError where it cannot be written."""
        tensors = _named(row.positive, "positive")
        if row.negative is not row.positive:
            tensors |= _named(row.negative, "negative")
        write_tensors(self._file(prompt), tensors)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the files do not say their prompts")

    def __len__(self) -> int:
        return sum(1 for _ in self.place.glob("*.safetensors"))


def check_cache(place: str | Path) -> Path:
    """The folder, made if it is not there. Raises UserError unless it can be written."""
    folder = make_folder(place)
    probe = folder / "writable"
    with whole(probe) as file:
        file.write(b"")
    probe.unlink()
    return folder


def _named(embedding: PromptEmbedding, name: str) -> dict[str, Tensor]:
    parts = {"states": embedding.states, "pooled": embedding.pooled, "mask": embedding.mask}
    found = {f"{name}.{part}": value for part, value in parts.items() if value is not None}
    # Files hold floating point only; another type, a mask's, is in the name.
    return {k if v.is_floating_point() else f"{k}.{v.dtype}": v if v.is_floating_point() else v.float() for k, v in found.items()}


def _read(found: Mapping[str, Tensor], name: str) -> PromptEmbedding:
    mask = found.get(f"{name}.mask")
    for key, value in found.items():
        if key.startswith(f"{name}.mask.torch."):
            mask = value.to(getattr(torch, key.rpartition(".")[2]))
    return PromptEmbedding(found[f"{name}.states"], found.get(f"{name}.pooled"), mask)


def fingerprint(pipe: Any, component: str) -> str:
    """What tells a pipeline's text encoders from others: their configurations, types and some of every tensor's numbers."""
    seen = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(text_encoders(pipe, component).items()):
        seen.update(json.dumps([name, str(getattr(part, "config", ""))]).encode())
        for key, value in weights_of(part).items():
            some = value.flatten()[:: max(1, value.numel() // 16)].double().cpu()
            seen.update(f"{key} {value.dtype} {tuple(value.shape)} {some.tolist()}".encode())
    return seen.hexdigest()


def text_encoders(pipe: Any, component: str) -> dict[str, nn.Module]:
    """Every part of a pipeline with weights but the network and the VAE."""
    parts = getattr(pipe, "components", {})
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name not in (component, "vae")}


def place(pipe: Any, component: str, device: str, encoders: str = "device", stay: Sequence[nn.Module] = ()) -> None:
    """Move a pipeline to the device, but for what is to `stay` of its network.

    Text encoders may stay on the "cpu": their layers go to the device one by one while they are asked.
    """
    of_text = text_encoders(pipe, component) if encoders == "cpu" and device != "cpu" else {}
    for name, part in pipe.components.items():
        if name in of_text:
            streamed(part, device)
        elif isinstance(part, nn.Module):
            away(part, device, stay if name == component else ())
