"""The small vocabulary and text encoder tiny-emoji shares with its reward models."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

LENGTH = 24  # tokens, start and end included
VOCABULARY = Path(__file__).parent / "vocabulary"


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learned from the captions; other words fall into smaller pieces.

    The vocabulary is a file, not learned anew: training byte pairs breaks ties differently in every process.
    """
    return CLIPTokenizer.from_pretrained(str(VOCABULARY), model_max_length=LENGTH)


def config(vocabulary: CLIPTokenizer) -> CLIPTextConfig:
    """The text encoder's configuration for this vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=128,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )


def ids(vocabulary: CLIPTokenizer, captions: list[str]) -> Tensor:
    """The token ids of captions, (b, 24), cut or padded."""
    return torch.tensor(vocabulary(captions, padding="max_length", truncation=True, max_length=LENGTH).input_ids)


def save(folder: Path) -> None:
    """Write the tokenizer into a folder, together with the vocabulary files, which transformers 4 needs."""
    tokenizer().save_pretrained(folder)
    for file in VOCABULARY.iterdir():
        shutil.copy(file, folder / file.name)


def readable_by_older(pipeline: Path) -> None:
    """Make a saved pipeline's text encoder loadable by transformers 4, which wants `text_model.` before every name.

    transformers 5 leaves it out and reads both; without it 4 would fill in random weights.
    """
    save(pipeline / "tokenizer")
    weights = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}, weights, {"format": "pt"})
