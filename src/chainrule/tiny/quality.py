"""Stage `check`: measures the finished generator by the judges, and against the renders themselves.

A judge tells whether an image shows the right thing, but not whether it is drawn well. `likeness` does: it is the PSNR over
the glyph's ink against the best-matching render of that glyph, over every size and place of a search window.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from chainrule.tiny import scenes
from chainrule.tiny.autoencoder import pixels, psnr
from chainrule.tiny.judges import BACKGROUND, COUNT, GROUNDS, NAMES, PRESENCE, Judge, read, share, together, top1

Judges = tuple[Judge, Judge]
Row = dict[str, float]
SIZES = range(84, 105, 2)  # the longer sides `likeness` tries
REACH = 8  # and how many pixels it moves a render, in x and in y
BATCH = 45
ANIMALS = tuple(scenes.ANIMALS)
GROUND_ANIMALS = ("fox", "cat", "frog", "pig", "whale", "zebra", "lion", "bee")
COUNTED = ("cat", "fox", "bee", "duck", "frog", "turtle", "apple", "car", "star", "ghost", "balloon", "angry face")


@dataclass(frozen=True, slots=True)
class Sampler:
    """Samples a pipeline with fixed settings, with one `torch.Generator` per image."""

    pipe: StableDiffusionPipeline
    steps: int
    guidance: float

    @torch.inference_mode()
    def __call__(self, prompts: list[str], seed: int = 0) -> list[np.ndarray]:
        self.pipe.set_progress_bar_config(disable=True)
        images: list[np.ndarray] = []
        for start in range(0, len(prompts), BATCH):
            some = prompts[start : start + BATCH]
            noise = [torch.Generator().manual_seed(100_000 * seed + start + i) for i in range(len(some))]
            sampled = self.pipe(
                some, num_inference_steps=self.steps, guidance_scale=self.guidance, generator=noise, output_type="np"
            ).images
            images += [(image * 255).round().astype(np.uint8) for image in np.asarray(sampled)]
        return images


def border(image: np.ndarray, columns: int = 3) -> np.ndarray:
    """The background an image seems to have: a straight line, from top to bottom, through its outer columns."""
    edges = np.concatenate([image[:, :columns], image[:, -columns:]], 1).astype(np.float32) / 255
    rows, middle = np.arange(scenes.SIZE), np.median(edges, 1)
    slope, start = np.polyfit(rows, middle, 1)
    line = (rows[:, None] * slope + start).clip(0, 1).astype(np.float32)
    return np.repeat(line[:, None], scenes.SIZE, 1)


def _ink_error(image: Tensor, ground: Tensor, name: str, size: int) -> tuple[float, int]:
    """Least squared error per ink value of one size over all places, and where: row * (2 REACH + 1) + column.

    With d = image - ground, the error over the ink m of a stamp of color c and opacity a (c premultiplied) is
    sum m d^2 + 2 a d ground - 2 c d + a^2 ground^2 - 2 a c ground + c^2: correlations, so all places cost one
    convolution.
    """
    stamp = torch.from_numpy(scenes.glyph(name, size)).permute(2, 0, 1)
    mask = (stamp[3:] > 0.02).float()
    color, opacity = stamp[:3] * mask, stamp[3:] * mask
    d = image - ground
    maps = torch.cat([d.square().sum(0, True), (d * ground).sum(0, True), d, ground.square().sum(0, True), ground])
    kernel = torch.cat([mask, 2 * opacity, -2 * color, opacity.square(), -2 * opacity * color])
    h, w = stamp.shape[1:]
    top, left = round(scenes.SIZE / 2 - h / 2) - REACH, round(scenes.SIZE / 2 - w / 2) - REACH
    window = maps[:, top : top + h + 2 * REACH, left : left + w + 2 * REACH]
    error = (F.conv2d(window[None], kernel[None]) + color.square().sum()) / (3 * mask.sum())
    place = int(error.argmin())
    return max(float(error.flatten()[place]), 1e-8), place


@torch.inference_mode()
def likeness(image: np.ndarray, name: str, background: str | None = None) -> float:
    """Foreground PSNR in dB against the best render of `name`, on the named background or else on `border`'s."""
    ground = scenes.backdrop(background) if background else border(image)
    planes = [torch.from_numpy(np.array(x, np.float32)).permute(2, 0, 1) for x in (image / 255, ground)]
    return float(-10 * np.log10(min(_ink_error(planes[0], planes[1], name, size)[0] for size in SIZES)))


def spread(values: list[float]) -> Row:
    """The 10th, 50th and 90th percentile."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return {"p10": round(float(p10), 2), "median": round(float(p50), 2), "p90": round(float(p90), 2)}


def animals(sample: Sampler, judges: Judges, seeds: int) -> tuple[Row, list[np.ndarray]]:
    """Measure 45 animals x `seeds`, 'a painting of a X': top-1 of both judges and likeness; also the first seed's images."""
    prompts = [f"a painting of {scenes.article(name)}" for name in ANIMALS]
    images = [image for seed in range(seeds) for image in sample(prompts, seed)]
    names = list(ANIMALS) * seeds
    row = {"color": top1(read(judges[0], images), names), "shape": top1(read(judges[1], images), names)}
    found = [likeness(image, name) for image, name in zip(images, names, strict=True)]
    return row | {f"likeness_{k}": v for k, v in spread(found).items()}, images[: len(ANIMALS)]


def things(sample: Sampler, judges: Judges) -> Row:
    """Measure all 111 names once, 'a painting of a X': top-1 of the color judge."""
    images = sample([f"a painting of {scenes.article(name)}" for name in NAMES], 10)
    return {"color": top1(read(judges[0], images), list(NAMES))}


def grounds(sample: Sampler, judges: Judges) -> Row:
    """Measure 12 backgrounds x 8 animals, 'a X on a B background': background and animal right, likeness on that background."""
    asked = [(name, ground) for ground in GROUNDS for name in GROUND_ANIMALS]
    images = sample([f"{scenes.article(name)} on a {ground} background" for name, ground in asked], 11)
    logits = read(judges[0], images)
    right = torch.tensor([GROUNDS.index(ground) for _, ground in asked])
    found = [likeness(image, *pair) for image, pair in zip(images, asked, strict=True)]
    row = {"background": share(logits[:, BACKGROUND].argmax(1) == right), "color": top1(logits, [n for n, _ in asked])}
    return row | {f"likeness_{k}": v for k, v in spread(found).items()}


def _count_right(logits: Tensor, names: list[str], numbers: list[int]) -> Row:
    """Number right, the thing the most present one, and both."""
    number = logits[:, COUNT].argmax(1) + 1 == torch.tensor(numbers)
    present = torch.tensor(together(logits, [{name} for name in names]))
    return {"number": share(number), "present": share(present), "both": share(number & present)}


def counts(sample: Sampler, judges: Judges) -> Row:
    """Measure 12 things in twos and threes with 2 seeds, 'two X': number right, thing right, both."""
    asked = [(name, number) for number in scenes.NUMBERS for name in COUNTED]
    prompts = [f"{scenes.NUMBERS[number]} {scenes.plural(name)}" for name, number in asked]
    images = sample(prompts, 12) + sample(prompts, 13)
    return _count_right(read(judges[0], images), [n for n, _ in asked] * 2, [n for _, n in asked] * 2)


def pair_names() -> list[tuple[str, str]]:
    """24 pairs of different things, animals half of them."""
    rng = random.Random("pairs")
    return [(rng.choice(ANIMALS), rng.choice([n for n in NAMES if n not in ANIMALS])) for _ in range(12)] + [
        (a, b) for a, b in (rng.sample(ANIMALS, 2) for _ in range(12))
    ]


def _pairs_right(logits: Tensor, asked: list[tuple[str, str]]) -> Row:
    """Both things the two most present ones; at least one of them the most present."""
    first = logits[:, PRESENCE].argmax(1).tolist()
    either = [NAMES[top] in pair for top, pair in zip(first, asked, strict=True)]
    return {"both": share(together(logits, [set(pair) for pair in asked])), "either": share(either)}


def pairs(sample: Sampler, judges: Judges) -> Row:
    """Measure 24 pairs, 'a X and a Y'."""
    asked = pair_names()
    images = sample([f"{scenes.article(a)} and {scenes.article(b)}" for a, b in asked], 14)
    return _pairs_right(read(judges[0], images), asked)


def trio_names() -> list[tuple[str, str, str]]:
    """24 trios of different things, two of them animals."""
    rng = random.Random("trios")
    return [(*rng.sample(ANIMALS, 2), rng.choice([n for n in NAMES if n not in ANIMALS])) for _ in range(24)]  # type: ignore[misc]


def trio(names: tuple[str, str, str], rng: random.Random) -> scenes.Scene:
    """Three different things where three of a kind would be. The generator's data have no such scene."""
    spots = [(34.0, 38.0), (94.0, 38.0), (64.0, 92.0)]
    things = (scenes.Thing(name, 2 * rng.randint(26, 29), x, y) for name, (x, y) in zip(names, spots, strict=True))
    return scenes.Scene(tuple(things), rng.choice(GROUNDS), named=False)


def _trios_right(logits: Tensor, asked: list[tuple[str, str, str]]) -> Row:
    """All three the three most present ones; and two of them the two most present."""
    order = logits[:, PRESENCE].argsort(1, descending=True).tolist()
    two = [{NAMES[i] for i in row[:2]} <= set(names) for row, names in zip(order, asked, strict=True)]
    return {"all": share(together(logits, [set(names) for names in asked])), "two": share(two)}


def trios(sample: Sampler, judges: Judges) -> Row:
    """Measure 24 trios with 2 seeds, 'a X, a Y and a Z': asked of a model that has seen pairs at most."""
    asked = trio_names()
    prompts = ["{}, {} and {}".format(*map(scenes.article, names)) for names in asked]
    return _trios_right(read(judges[0], sample(prompts, 15) + sample(prompts, 16)), asked * 2)


@torch.inference_mode()
def roundtrip(vae: AutoencoderKL, images: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Images after encoding to the posterior mean and decoding, and the mean PSNR in dB."""
    back, found = [], []
    for start in range(0, len(images), 32):
        x = pixels(images[start : start + 32]).to(vae.device)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        found.append(psnr(y, x).cpu())
        back += list(((y / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return back, round(torch.cat(found).mean().item(), 2)


def _meter(judges: Judges, singles: list[scenes.Scene], images: list[np.ndarray]) -> Row:
    """The judges and likeness on single images whose scenes are known."""
    names = [s.names[0] for s in singles]
    logits = read(judges[0], images)
    ground = torch.tensor([GROUNDS.index(s.background) for s in singles])
    found = [likeness(image, name) for image, name in zip(images, names, strict=True)]
    row = {"color": top1(logits, names), "shape": top1(read(judges[1], images), names)}
    row["background"] = share(logits[:, BACKGROUND].argmax(1) == ground)
    return row | {f"likeness_{k}": v for k, v in spread(found).items()}


def _meter_many(judges: Judges, drawn: list[scenes.Scene], images: list[np.ndarray]) -> Row:
    """The color judge on scenes of several of a kind, and of pairs."""
    logits = read(judges[0], images)
    alike = [i for i, s in enumerate(drawn) if len(s.names) > 1 and len(set(s.names)) == 1]
    mixed = [i for i, s in enumerate(drawn) if len(set(s.names)) == 2]
    row = _count_right(logits[alike], [drawn[i].names[0] for i in alike], [len(drawn[i].names) for i in alike])
    both = _pairs_right(logits[mixed], [(drawn[i].names[0], drawn[i].names[1]) for i in mixed])
    return {f"counts_{k}": v for k, v in row.items()} | {f"pairs_{k}": v for k, v in both.items()}


def sanity(vae: AutoencoderKL, judges: Judges) -> dict[str, Row]:
    """The autoencoder's PSNR, and every meter on real renders before and after it: what a perfect generator would get.

    200 held-out singles and 200 mixed scenes.
    """
    rng = random.Random("held-out quality")
    singles = [scenes.single(rng, scenes.pick_name(rng)) for _ in range(200)]
    mixed = [scenes.draw(rng) for _ in range(200)]
    several: list[scenes.Scene] = []
    while len(several) < 100:
        several += [s for s in (scenes.draw(rng),) if len(s.names) > 1]
    report: dict[str, Row] = {}
    three = [trio(names, rng) for names in trio_names()]
    shown = {key: [scenes.render(s) for s in group] for key, group in (("one", singles), ("many", several))}
    back = {key: roundtrip(vae, images) for key, images in shown.items()}
    report["vae_db"] = {"singles": back["one"][1], "mixed": roundtrip(vae, [scenes.render(s) for s in mixed])[1]}
    report["renders"] = _meter(judges, singles, shown["one"]) | _meter_many(judges, several, shown["many"])
    seen = read(judges[0], [scenes.render(s) for s in three])
    report["renders"] |= {f"trios_{k}": v for k, v in _trios_right(seen, trio_names()).items()}
    report["renders_vae"] = _meter(judges, singles, back["one"][0]) | _meter_many(judges, several, back["many"][0])
    return report


def sheet(images: list[np.ndarray], columns: int = 9) -> Image.Image:
    """Put images into one picture, row by row."""
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * scenes.SIZE, rows * scenes.SIZE))
    for i, image in enumerate(images):
        grid.paste(Image.fromarray(image), (i % columns * scenes.SIZE, i // columns * scenes.SIZE))
    return grid


def show(report: dict[str, Row]) -> None:
    """Print one line per measurement."""
    for name, row in report.items():
        print(f"{name:12s}", "  ".join(f"{key} {value:g}" for key, value in row.items()), flush=True)


def measure(
    pipe: StableDiffusionPipeline, judges: Judges, out: Path, *, steps: int = 20, guidance: float = 2.0, seeds: int = 4
) -> dict[str, Row]:
    """Make every measurement of this module. Writes `out/quality.json` and the 45 animals as `out/quality.png`."""
    sample = Sampler(pipe, steps, guidance)
    report: dict[str, Row] = {"settings": {"steps": steps, "guidance": guidance, "seeds": seeds}}
    report |= sanity(pipe.vae, judges)
    report["animals"], first = animals(sample, judges, seeds)
    sheet(first).save(out / "quality.png")
    report["things"] = things(sample, judges)
    report["grounds"] = grounds(sample, judges)
    report["counts"] = counts(sample, judges)
    report["pairs"] = pairs(sample, judges)
    report["trios"] = trios(sample, judges)
    (out / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    return report
