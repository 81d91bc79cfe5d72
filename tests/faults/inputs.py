"""Malformed input from a seeded generator: options, configs, prompts, pictures, rewards, adapters. Each is one line, and no run."""
# ruff: noqa: E501  lists of wrong values, of which none is read for itself

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import torch
from PIL import Image
from pipelines import make_pipeline
from safetensors.torch import save

from chainrule.cli import main
from faults.trial import TRACEBACK, run

TRIES = 300
Made = tuple[list[str], dict[str, bytes | str]]
"""A command line, and the files that it names."""
TRAIN = ["train", "--model", "MODEL", "--reward", "symmetry", "--prompts", "animals:test", "--out", "run"]
STEER = ["steer", "a fox", "--model", "MODEL", "--reward", "symmetry", "--out", "run"]
SAMPLE = ["sample", "MODEL", "--prompts", "a fox", "--out", "run"]


def numbers(rng: Random) -> Made:
    """A number out of its range, or no number."""
    key = rng.choice(["updates", "batch", "accumulate", "lr", "rank", "clip", "sample-steps", "seed", "ema", "micro-batch", "kl"])
    value = rng.choice(["-1", "nan", "inf", "-inf", "1e999", str(10**20), "0x10", "1,5", "one", "", "1/2", "٣x", "--", "true"])
    return [*TRAIN, f"--{key}={value}"], {}


def words(rng: Random) -> Made:
    """A word that is none of those there are."""
    key = rng.choice(
        ["method", "schedule", "memory", "tracker", "dtype", "quantize", "solver", "device", "size", "guidance", "model"]
    )
    value = rng.choice(["", " ", "no such", "draft-x", "../..", "{name: }", "[", "{a: b}", "null x", "\x00", "é" * 300, "-", "0x0"])
    return [*TRAIN, f"--{key}={value}"] if "\x00" not in value else [*TRAIN, f"--{key}=\\0"], {}


def yaml(rng: Random) -> Made:
    """A config with a value of another kind, twice, nested, or no YAML."""
    base = "model: MODEL\nreward: symmetry\nprompts: animals:test\nout: run\n"
    key = rng.choice(["lr", "updates", "batch", "reward", "model", "method", "prompts", "schedule", "seed", "rank", "held_out"])
    value = rng.choice(
        ["true", "'1x'", "[1, [2]]", "{a: {b: c}}", "2024-01-01", "2024-13-45", "~x: {", "!!python/object:os.system x", "&a [*a]", ".nan",
         ".inf", "1e999", "0o9", "'\\0'", "? x", "- x", "{name: 3}", "[ ]", "'  '", "!!binary x", "*no", "12:99:99x", "-"]
    )  # fmt: skip
    kept = "".join(line + "\n" for line in base.splitlines() if not line.startswith(f"{key}:"))
    text = rng.choice([
        f"{kept}{key}: {value}\n", f"{base}{key}: 1\n{key}: 2\n", base + "x: " + "[" * 5000, f"{base}unknown_{key}: 1\n", base + "\t- x\n",
        f"{kept}{key}:\n  {key}: {value}\n",
    ])  # fmt: skip
    return ["train", "c.yaml"], {"c.yaml": text}


def garbage(rng: Random) -> Made:
    """A config of noise."""
    return ["train", "c.yaml"], {
        "c.yaml": rng.choice([rng.randbytes(200), b"\xff\xfe" + rng.randbytes(20), b"\x00" * 50, b"[1, 2]", b"x"])
    }


def prompts(rng: Random) -> Made:
    """A prompt file that cannot be read, or holds none."""
    name, data = rng.choice([
        ("p.txt", b""), ("p.txt", b"\n \n"), ("p.txt", rng.randbytes(50) + b"\xff"), ("p.json", b"{}"), ("p.json", b"[1]"), ("p.json", b"[" * 9999),
        ("p.json", b'[{"a": 1}]'), ("p.jsonl", b'"a fox"\n{'), ("p.csv", b'prompt\n"open'), ("p.csv", b"a,b\n1,2\n"), ("p.csv", b"prompt,x\na\n"),
        ("p.tsv", b"prompt\tx\na\n"), ("p.parquet", b"PAR1" + rng.randbytes(30)), ("p.parquet", b"no"), ("p.json", b"[null]"), ("p.json", b"[NaN]"),
        ("p.txt", b"\x00"), ("p.jsonl", b"[]"), ("p.json", b'[["a"]]'),
    ])  # fmt: skip
    source = rng.choice([name, name, f"{name}:train", f"{name} as a photo of {{}}", f"{name}:no"])
    return [*TRAIN[:5], "--prompts", source, "--out", "run"], {name: data}


def sources(rng: Random) -> Made:
    """A source of prompts that there is not."""
    value = rng.choice(
        ["nosuch.txt", "animals:dev", "animals:train@x", "animals as a photo", "hub:", "hub:a/b/c/d", "hub:x:y:z:w", "./", "emojy"]
    )
    return [*TRAIN[:5], "--prompts", value, "--out", "run"], {}


def pictures(rng: Random) -> Made:
    """A picture that is none."""
    Image.new("RGB", (9, 9)).save("/dev/null", "PNG")
    data = rng.choice(
        [
            b"",
            rng.randbytes(100),
            b"\x89PNG\r\n\x1a\n" + rng.randbytes(40),
            b"GIF89a",
            b"<svg/>",
            b"BM" + b"\0" * 20,
            b"II*\0" + rng.randbytes(20),
        ]
    )
    return [*STEER[:1], "", *STEER[2:], "--image", rng.choice(["p.png", "p.jpg", "p.tif", "none.png", "."])], {
        "p.png": data,
        "p.jpg": data,
        "p.tif": data,
    }


def rewards(rng: Random) -> Made:
    """A reward that means nothing, or is nothing."""
    value = rng.choice([
        "", " ", "symmetri", "2*", "*symmetry", "symmetry +", "symmetry - symmetry", "0*symmetry", "1e999*symmetry", "nan*symmetry", "symmetry->",
        "symmetry->1e999", "symmetry symmetry", "clip:", "compressible:x", "compressible:1.5", "none.py:f", "c.py:", "c.py", "c.py:g", "c.py:f2",
        "symmetry@cuda:99", "symmetry@tpu", "detect:", "style:none.png", "classifier:", "dropout:2:tiny:x", "+-symmetry", "((symmetry))", "diversity",
        "symmetry@cpu/float8", "10**symmetry", "symmetry;rotation", "9" * 400 + "*symmetry",
    ])  # fmt: skip
    return [*TRAIN[:4], value, *TRAIN[5:], *(["--batch", "1"] if value == "diversity" else [])], {
        "c.py": "def f(images): return 1/0\nx = 1/0\n"
    }


def adapters(rng: Random) -> Made:
    """An adapter file from a stranger."""
    tensors = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 8)
        * rng.choice([1.0, float("nan")])
    }
    name = "pytorch_lora_weights.safetensors"
    data = rng.choice(
        [b"", rng.randbytes(99), save(tensors), save({}), save(tensors)[:-5], b"\xff" * 16, b"PK\x03\x04" + rng.randbytes(40)]
    )
    if rng.random() < 0.3:
        return [*SAMPLE, "--adapter", "a"], {
            "a/bands.json": rng.choice(["", "[]", '{"x": 1}', '{"..": {"levels": null}}', "[" * 9999])
        }
    return [*SAMPLE, "--adapter", "a"], {f"a/{name}": data}


def sampling(rng: Random) -> Made:
    """Wrong numbers for sampling, mixing and evaluating."""
    return rng.choice([
        [*SAMPLE, "--scale", "nan"], [*SAMPLE, "--scale", "x"], [*SAMPLE, "--seeds", "0"], [*SAMPLE, "--seeds", str(10**20)], [*SAMPLE, "--first-seed", "-1"],
        [*SAMPLE, "--first-seed", str(2**64)], [*SAMPLE, "--steps", str(10**19)], [*SAMPLE, "--size", "7x7"], [*SAMPLE, "--guidance", "-1"],
        ["sample", "", "--prompts", "x"], ["sample", "MODEL", "--prompts", " "], ["mix", "a=0", "--out", "b"], ["mix", "a=nan", "--out", "b"],
        ["mix", "a", "--out", "b"], ["mix", "=1", "--out", "b"], ["eval", "nothing"], ["report", "nothing"], ["eval", "MODEL"],
        [*STEER, "--over", "latent@9999"], [*STEER, "--over", "nothing"], [*STEER, "--seeds", "-1"], [*STEER, "--bound", "0"], [*STEER, "--batch", "0"],
        ["plan", "draft", "--method-option", "k"], ["plan", "draft", "--method-option", "k=2024-13-45"], ["plan", "no"], ["experiment", "no"], ["doctor", "--model", ""],
    ]), {}  # fmt: skip


def tables(rng: Random) -> Made:
    """A table of experiments that is none."""
    text = rng.choice(
        [
            "",
            "[]",
            "title: 1",
            "title: x\nrows: 3\n",
            "title: x\nrows: {a: 3}\ncolumns: []\n",
            "title: x\ntitle: y\n",
            "x: " + "[" * 5000,
            "a: 2024-99-99",
        ]
    )
    return ["experiment", "t.yaml"], {"t.yaml": text}


KINDS: tuple[Callable[[Random], Made], ...] = (
    numbers, words, yaml, yaml, garbage, prompts, sources, pictures, rewards, rewards, adapters, sampling, tables,
)  # fmt: skip


def malformed(number: int, root: Path, folder: Path) -> None:
    """Raises AssertionError unless the program refuses with exit code 2, says why in one line and leaves nothing."""
    rng = Random(number)
    command, files = KINDS[number % len(KINDS)](rng)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = data.encode() if isinstance(data, str) else data
        (folder / name).write_bytes(text.replace(b"MODEL", str(root / "model").encode()))
    line = [word.replace("MODEL", str(root / "model")) for word in command]
    (folder / "command.json").write_text(json.dumps(line, ensure_ascii=False))
    before = sorted(folder.rglob("*"))

    def work() -> None:
        os.chdir(folder)
        sys.argv = ["chainrule", *line]
        main()

    ended = run(work, folder.with_name(f"{folder.name}.said"))
    assert TRACEBACK not in ended.said, f"{command}: {ended.said[-400:]}"
    assert ended.code == 2, f"{command}: exit code {ended.code}: {ended.said[-400:]}"
    lines = [text for text in ended.said.splitlines() if text.lower().startswith("error: ")]
    assert len(lines) == 1 and ended.said.rstrip().endswith(lines[0]), f"{command}: {ended.said[-400:]}"
    assert sorted(folder.rglob("*")) == before, f"{command}: left files"


def trials(root: Path) -> Iterator[tuple[str, str, partial[None]]]:
    """(kind, name, what is tried in a folder)."""
    if not (root / "model").exists():
        make_pipeline(dtype=torch.float32).save_pretrained(root / "model")
    for number in range(TRIES):
        yield "malformed input", f"{KINDS[number % len(KINDS)].__name__} {number}", partial(malformed, number, root)
