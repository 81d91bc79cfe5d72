"""The small vocabulary and text encoder tiny-emoji shares with its reward models."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from chainrule.tiny import scenes

LENGTH = 24  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus() -> list[str]:
    """Every phrase of the caption grammar once; enough for each of its words to become one token."""
    subjects = [
        phrase
        for name in scenes.THINGS
        for phrase in (scenes.article(name), f"a small {name}", f"two {scenes.plural(name)}", f"three {scenes.plural(name)}")
    ]
    places = [place.format(background) for place in scenes.PLACES for background in scenes.BACKGROUNDS]
    return [template.format(s) for template in scenes.TEMPLATES for s in subjects] + ["and" + p for p in places]


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges come from the captions; other words fall into smaller pieces."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    bytes_of = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), bytes_of])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [word.replace(",", " ,") for word in corpus()]
    bpe.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=1600, end_of_word_suffix="</w>", initial_alphabet=sorted(alphabet), show_progress=False),
    )
    learned = json.loads(bpe.to_str())["model"]
    pieces = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)]
    merged = [a + b for a, b in learned["merges"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(itertools.chain(pieces, merged, [START, END])))}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in learned["merges"]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


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
