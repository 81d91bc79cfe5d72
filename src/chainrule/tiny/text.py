"""The small vocabulary and text encoder tiny-emoji shares with its reward models."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

LENGTH = 24  # tokens, start and end included


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learned from the captions; other words fall into smaller pieces.

    The vocabulary is a file, not learned anew: training byte pairs breaks ties differently in every process.
    """
    return CLIPTokenizer.from_pretrained(str(Path(__file__).parent / "vocabulary"), model_max_length=LENGTH)


def config(vocabulary: CLIPTokenizer) -> CLIPTextConfig:
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
    """(b, 24) token ids, padded."""
    return torch.tensor(vocabulary(captions, padding="max_length", truncation=True, max_length=LENGTH).input_ids)
