"""Rewards that have no gradient: the size of a file, and the answers of another program. Train on them by ddpo or grpo."""

from __future__ import annotations

import atexit
import base64
import io
import json
import math
import queue
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Thread

import torch
from PIL import Image
from torch import Tensor

from chainrule.errors import UserError
from chainrule.pictures import pictures
from chainrule.rewards.base import Reward
from chainrule.rewards.loaded import load_once

ANSWER = 600.0  # seconds a program may take for one image


@dataclass(frozen=True)
class FileSize(Reward):
    """The size of the image as a JPEG file, in kilobytes of 1000 bytes: `-filesize` is DDPO's compressibility.

    As arXiv:2305.13301, section 5.1, with Pillow's encoder at quality 95. It has no gradient; `compressible` is like it and has
    one. Range above 0.
    """

    quality: int = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"the quality of a JPEG is from 1 to 100, got {self.quality!r}")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return "filesize" if self.quality == 95 else f"filesize:{self.quality}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sizes = [len(_file(picture, "JPEG", quality=self.quality)) / 1000 for picture in pictures(images.detach())]
        return torch.tensor(sizes, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32))


@dataclass(frozen=True)
class Program(Reward):
    """What another program says of each image: `process:python scorer.py`. It has no gradient.

    The program is started once, without a shell. For every image it reads a line of JSON from its standard input, {"prompt": the
    prompt, "image": a PNG file in base64}, and writes a line with one number to its standard output, which it must flush.
    """

    command: str

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"cannot read the command {self.command!r}: {error}") from error
        if not words:
            raise UserError("say which program scores the images, as in 'process:python scorer.py'")

    @property
    def name(self) -> str:
        """The name that `rewards.parse` reads back."""
        return f"process:{self.command}"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        worker = _started(self.command)
        found = [worker.score(picture, prompt) for picture, prompt in zip(pictures(images.detach()), prompts, strict=True)]
        return torch.tensor(found, device=images.device, dtype=torch.promote_types(images.dtype, torch.float32))


@dataclass(slots=True)
class _Worker:
    """A program that scores, and what it has said."""

    command: str
    process: subprocess.Popen[str]
    said: queue.Queue[str] = field(default_factory=queue.Queue)

    def score(self, picture: Image.Image, prompt: str) -> float:
        """The number for one image. Raises UserError if the program ends, says something else, or takes too long."""
        assert self.process.stdin
        asked = {"prompt": prompt, "image": base64.b64encode(_file(picture, "PNG")).decode()}
        try:
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            line = self.said.get(timeout=ANSWER)
        except (OSError, queue.Empty):
            line = ""
        try:
            value = float(line)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return value
        code = self.process.poll()
        what = (
            f"said {line.strip()[:80]!r}" if line.strip() else f"ended with code {code}" if code is not None else "did not answer"
        )
        raise UserError(f"the program of the reward, {self.command!r}, {what}; it must write one number per line that it reads")

    def listen(self) -> None:
        """Take down its lines, and an empty one when it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.put(line)
        self.process.wait()
        self.said.put("")


@load_once
def _started(command: str) -> _Worker:
    try:
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", bufsize=1
        )
    except OSError as error:
        raise UserError(f"the program of the reward, {command!r}, cannot be started: {error.strerror}") from error
    atexit.register(process.kill)
    worker = _Worker(command, process)
    Thread(target=worker.listen, daemon=True).start()
    return worker


def _file(picture: Image.Image, kind: str, **options: int) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()
