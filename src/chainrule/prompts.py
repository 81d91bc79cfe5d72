"""Prompt sets: named ones, text files, JSON and JSONL; and a split by seed."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

from chainrule.errors import UserError, unknown
from chainrule.tiny.scenes import ANIMALS, BACKGROUNDS, FACES, THINGS, article, plural


def _emoji() -> list[str]:
    """What tiny-emoji can draw: things, counts, pairs and backgrounds; a fixed list."""
    rng = random.Random("emoji prompts")
    names, backgrounds = list(THINGS), list(BACKGROUNDS)
    said = [f"a painting of {article(name)}" for name in names]
    said += [f"{article(rng.choice(names))} on a {rng.choice(backgrounds)} background" for _ in range(60)]
    said += [f"{rng.choice(('two', 'three'))} {plural(rng.choice(names))}" for _ in range(30)]
    said += [" and ".join(article(name) for name in rng.sample(names, 2)) for _ in range(30)]
    return said


SETS = {
    "animals": lambda: [f"a painting of {article(name)}" for name in ANIMALS],
    "faces": lambda: [f"a painting of {article(name)}" for name in FACES],
    "emoji": _emoji,
}
DESCRIPTIONS = {
    "animals": "the 45 common animals of DDPO (arXiv:2305.13301), as paintings",
    "faces": "twelve faces with a mood, as paintings",
    "emoji": "everything tiny-emoji can draw: things, counts, pairs, backgrounds",
}


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not text (UTF-8)") from error
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error
    if "\x00" in text:
        raise UserError(f"the prompt file {path} is not text")
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = text.splitlines()
    except ValueError as error:
        raise UserError(f"the prompt file {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"the prompt file {path} must hold a list of prompts")
    said = [row.get("prompt") if isinstance(row, dict) else row for row in rows]
    texts = [row.strip() for row in said if isinstance(row, str)]
    if len(texts) < len(said):
        raise UserError(f"the prompt file {path} has a row that is neither text nor an object with a 'prompt'")
    return [text for text in texts if text]


def prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts from a named set (`animals`, `faces`, `emoji`), a .txt, .json or .jsonl file, or a list.

    A name or file may end in `:train` or `:test`: the same split of four fifths against one fifth everywhere.
    Raises UserError for an unknown name and a file that is missing, empty or not text.
    """
    if not isinstance(source, (str, Path)):
        said = [str(prompt) for prompt in source]
    else:
        name, _, half = str(source).rpartition(":") if str(source).endswith((":train", ":test")) else (str(source), "", "")
        if name in SETS:
            said = SETS[name]()
        elif os.path.isfile(name):
            said = _read(Path(name))
        elif os.path.isdir(name) or "/" in name or "." in name:
            raise UserError(f"the prompt file {name} {'is a folder' if os.path.isdir(name) else 'does not exist'}")
        else:
            raise unknown("prompt set", name, SETS)
        if half:
            train, test = split(said)
            said = train if half == "train" else test
    if not said:
        raise UserError(f"{source if isinstance(source, (str, Path)) else 'the list'} holds no prompts")
    return said


def split(said: Sequence[str], share: float = 0.8, seed: int = 0) -> tuple[list[str], list[str]]:
    """Train and held-out prompts; each keeps the original order."""
    chosen = set(random.Random(seed).sample(range(len(said)), round(share * len(said))))
    return [p for i, p in enumerate(said) if i in chosen], [p for i, p in enumerate(said) if i not in chosen]
