"""How an adapter is used, as its card says it: the code of the card, with the run's own folder in the place of a repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = "OWNER/NAME"  # stands for the repository until the adapter is pushed to one
FETCH = "from huggingface_hub import snapshot_download"
SECTION = "## How to use it"


def fetched(name: str) -> str:
    """The line of a snippet that gets the adapter from a hub."""
    return f'adapter = snapshot_download("{name}")  # or the folder of this file'


def snippets(card: Path, address: str) -> list[tuple[str, str]]:
    """(what is said above it, code) of the card's snippets, for the adapter at `address`; nothing where there is no such card."""
    try:
        told = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return []
    section = told.partition(f"{SECTION}\n")[2].partition("\n## ")[0]
    found = re.findall(r"([^\n]*)\n+```python\n(.*?)```", section, re.S)
    return [(said.strip().rstrip(":"), _local(code, address)) for said, code in found]


def _local(code: str, address: str) -> str:
    lines = [line for line in code.strip().splitlines() if line != FETCH]
    own, theirs = f"adapter = {json.dumps(address)}", fetched("").partition('"')[0]
    return "\n".join(own if line.startswith(theirs) else line for line in lines)
