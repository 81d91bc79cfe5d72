"""Stage `judges`: trains two classifiers of what is in an image. They measure the generator.

They are trained on renders wider than the generator's data (sizes, places, backgrounds, mirroring, colors, blur and
noise), so that a picture a little off is still read, and share no weights with any model that is measured or shipped.
The color judge reads what is there, how many, and on which background. The shape judge reads gray images of random
contrast and sign, so that only the drawing's form can tell it what is there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.tiny import scenes
from chainrule.tiny.autoencoder import pixels
from chainrule.tiny.loop import DEVICE, restore, train

NAMES, GROUNDS = tuple(scenes.THINGS), tuple(scenes.BACKGROUNDS)
SIDE = 64  # side of the images that the networks read, after average pooling
PRESENCE = slice(0, len(NAMES))
COUNT = slice(PRESENCE.stop, PRESENCE.stop + 3)
BACKGROUND = slice(COUNT.stop, COUNT.stop + len(GROUNDS))
UNKNOWN = -100  # the background label of an unnamed background; cross entropy skips it


class Judge(nn.Module):
    """A classifier of 0.4M weights. The slices PRESENCE, COUNT and BACKGROUND of its logits are the three questions."""

    def __init__(self, gray: bool) -> None:
        super().__init__()
        torch.manual_seed(1 if gray else 0)
        self.gray = gray
        self.stem = nn.Conv2d(1 if gray else 3, 32, 4, 2, 1)
        shapes = ((32, 64, 2), (64, 96, 2), (96, 128, 1), (128, 160, 2))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in shapes)
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for _, b, _ in shapes)
        self.head = nn.Linear(2 * 160, PRESENCE.stop if gray else BACKGROUND.stop)
        nn.init.constant_(self.head.bias[PRESENCE], -4.0)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of images (b, 3, 128, 128) in [-1, 1]."""
        x = F.adaptive_avg_pool2d(x, SIDE)
        if self.gray:
            x = luma(x)
            x = (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-2)
        x = F.silu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        logits: Tensor = self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
        return logits


def luma(x: Tensor) -> Tensor:
    """The luma (b, 1, h, w) of RGB images (b, 3, h, w)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One training image, (128, 128, 3) uint8, with the names of its things and the number of its background."""

    image: np.ndarray
    names: tuple[str, ...]
    background: int


def _canvas(rng: random.Random) -> tuple[np.ndarray, int]:
    """Three in four backgrounds have a name; the others run between two random colors."""
    if rng.random() < 0.75:
        index = rng.randrange(len(GROUNDS))
        return scenes.backdrop(GROUNDS[index]).copy(), index
    top, bottom = (np.array([rng.random() for _ in range(3)], np.float32) for _ in range(2))
    bottom = top if rng.random() < 0.5 else bottom
    mix = np.linspace(0, 1, scenes.SIZE, dtype=np.float32)[:, None, None]
    return np.repeat(top * (1 - mix) + bottom * mix, scenes.SIZE, 1), UNKNOWN


def _layout(rng: random.Random) -> tuple[list[str], int, list[tuple[float, float]]]:
    """Names, size and centers: half the images show one large thing; every name is as frequent as any other."""
    roll, name = rng.random(), rng.choice(NAMES)
    if roll < 0.52:
        return [name], 4 * rng.randint(19, 27), [(64 + rng.gauss(0, 5), 64 + rng.gauss(0, 5))]
    if roll < 0.60:
        return [name], 4 * rng.randint(10, 15), [(rng.uniform(32, 96), rng.uniform(32, 96))]
    names = [name] * rng.choice((2, 3)) if roll < 0.76 else [name, rng.choice(NAMES)]
    spots = [(34.0, 64.0), (94.0, 64.0)] if len(names) == 2 else [(34.0, 38.0), (94.0, 38.0), (64.0, 92.0)]
    return names, 4 * rng.randint(12, 15), [(x + rng.gauss(0, 3), y + rng.gauss(0, 3)) for x, y in spots]


def draw(rng: random.Random) -> Labelled:
    """Draw a varied image; a third of those of a single thing are mirrored."""
    canvas, background = _canvas(rng)
    names, size, spots = _layout(rng)
    for name, (x, y) in zip(names, spots, strict=True):
        stamp = scenes.glyph(name, size)
        h, w = stamp.shape[:2]
        top, left = round(y - h / 2), round(x - w / 2)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, scenes.SIZE), min(left + w, scenes.SIZE)
        inside = stamp[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - inside[..., 3:]) + inside[..., :3]
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    mirrored = len(names) == 1 and rng.random() < 0.33
    return Labelled(image[:, ::-1] if mirrored else image, tuple(names), background)


def _weather(x: Tensor, gray: bool) -> Tensor:
    """(b, 3, 64, 64) with, per image, a mild change of color and light, blur for a third of them, and noise.

    For the shape judge the change is one of contrast, down to a third, and of sign for one in three.
    """

    def spread(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(len(x), channels, 1, 1, device=x.device).uniform_(low, high)

    if gray:
        sign = torch.where(spread(0, 1) < 0.33, -1.0, 1.0)
        x = x * spread(0.33, 1.2) * sign
    else:
        saturation = spread(0.75, 1.25)
        x = luma(x) * (1 - saturation) + x * saturation
        x = x * spread(0.88, 1.1) * spread(0.95, 1.05, 3) + spread(-0.08, 0.08)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, spread(-1, 0.5).clamp(min=0) * 2)
    return x + torch.randn_like(x) * spread(0, 0.08)


def _targets(answers: list[Labelled]) -> tuple[Tensor, Tensor, Tensor]:
    """Presence (b, 111), number minus one (b), background index (b)."""
    presence = torch.zeros(len(answers), len(NAMES))
    for row, answer in enumerate(answers):
        for name in answer.names:
            presence[row, NAMES.index(name)] = 1
    count = torch.tensor([len(a.names) - 1 for a in answers])
    return presence.to(DEVICE), count.to(DEVICE), torch.tensor([a.background for a in answers]).to(DEVICE)


def _held_out() -> tuple[list[Labelled], list[Labelled]]:
    """Singles of every name, and scenes of several things, as the generator's data has them, from their own seed."""
    rng = random.Random("held-out judges")
    alone = [scenes.single(rng, name) for name in NAMES for _ in range(8)]
    many = [scene for scene in (scenes.draw(rng) for _ in range(1600)) if len(scene.names) > 1]
    singles, several = (
        [Labelled(scenes.render(s), s.names, GROUNDS.index(s.background)) for s in group] for group in (alone, many)
    )
    return singles, several


@torch.no_grad()
def read(judge: Judge, images: list[np.ndarray], batch: int = 128) -> Tensor:
    """The logits (n, classes), on the CPU, of images (128, 128, 3) uint8."""
    rows = [judge(pixels(images[i : i + batch])).float().cpu() for i in range(0, len(images), batch)]
    return torch.cat(rows)


def top1(logits: Tensor, names: list[str]) -> float:
    """The share of images whose most likely thing is the one named."""
    return share(together(logits, [{name} for name in names]))


def together(logits: Tensor, wanted: list[set[str]]) -> list[bool]:
    """For each image, whether the k most likely things are the k wanted ones."""
    order = logits[:, PRESENCE].argsort(1, descending=True).tolist()
    return [{NAMES[i] for i in row[: len(names)]} == names for row, names in zip(order, wanted, strict=True)]


def share(right: list[bool] | Tensor) -> float:
    """The share of true values, rounded to four decimals."""
    return round(torch.as_tensor(right).float().mean().item(), 4)


def _fit_one(judge: Judge, out: Path, steps: int, batch: int) -> Judge:
    """Held-out accuracy: `single` top-1 on singles; for the color judge, on scenes of several, also the number,
    the background, and `all`, whether the most present things are those there are."""
    singles, several = _held_out()
    _, count, ground = (t.cpu() for t in _targets(several))

    def loss(rng: random.Random) -> Tensor:
        answers = [draw(rng) for _ in range(batch)]
        presence, number, background = _targets(answers)
        torch.manual_seed(rng.getrandbits(32))
        x = _weather(F.avg_pool2d(pixels([a.image for a in answers]), scenes.SIZE // SIDE), judge.gray)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = judge(x).float()
        value = F.binary_cross_entropy_with_logits(logits[:, PRESENCE], presence, reduction="sum") / batch
        if judge.gray:
            return value
        return value + F.cross_entropy(logits[:, COUNT], number) + F.cross_entropy(logits[:, BACKGROUND], background)

    def check() -> dict[str, float]:
        row = {"single": top1(read(judge, [a.image for a in singles]), [a.names[0] for a in singles])}
        if not judge.gray:
            logits = read(judge, [a.image for a in several])
            row["count"] = share(logits[:, COUNT].argmax(1) == count)
            row["background"] = share(logits[:, BACKGROUND].argmax(1) == ground)
            row["all"] = share(together(logits, [set(a.names) for a in several]))
        return row

    stage = "judge-shape" if judge.gray else "judge-color"
    train(stage, judge, loss, out, steps=steps, lr=0.02, flat=0.3, ema=0.99, every=150, check=check)
    return judge.eval().requires_grad_(False)


def fit(out: Path, steps: int, batch: int = 64) -> tuple[Judge, Judge]:
    """Train the color judge and the shape judge for `steps` steps each. Returns both, frozen."""
    return _fit_one(Judge(gray=False), out, steps, batch), _fit_one(Judge(gray=True), out, steps, batch)


def load(out: Path) -> tuple[Judge, Judge]:
    """Load the color judge and the shape judge that `fit` trained. Raises UserError if they are missing."""
    color, shape = Judge(gray=False), Judge(gray=True)
    restore("judge-color", color, out)
    restore("judge-shape", shape, out)
    return color.eval().requires_grad_(False), shape.eval().requires_grad_(False)
