"""How far a student's shortcut ends from where the base model ends: ShortFT's Fig. 3 (arXiv:2507.22604)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.files import make_folder, write_picture, write_text
from chainrule.guidance import AnyGuidance
from chainrule.models import BUNDLED, Model
from chainrule.pictures import pictures
from chainrule.plan import Path as Jumps
from chainrule.plan import student_path, walk
from chainrule.prompts import prompts as read_prompts
from chainrule.report import grid
from chainrule.report.tables import markdown
from chainrule.rewards import AnyReward, HPSv2, PickScore, Reward, as_reward, checked
from chainrule.rewards.clip import Clip, load_clip, normalize, resize_and_crop

Distances: TypeAlias = dict[float, dict[str, list[dict[str, Tensor]]]]  # level -> way -> a batch each: measure -> (b,)


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How far each way from a level to an image ends from the base model's own image: a table and a picture.

    `rows[level][way][measure]`; measures are `latent` and `pixels`, root mean squares, `perceptual`, 1 - cosine of CLIP's
    embeddings, and the absolute change of every reward. The ways are `shortcut` (the student's jumps), `ddim` (the base
    model by the same jumps, so with as many calls), `ddim, half the calls` (what the student's passes buy when guidance
    makes every call of the base two of them) and `one step` (the base's clean prediction).
    """

    prompts: list[str]
    rows: dict[float, dict[str, dict[str, Estimate]]]
    calls: dict[float, dict[str, int]]
    picture: Image.Image

    def __str__(self) -> str:
        measures = list(next(iter(next(iter(self.rows.values())).values())))
        rows = [
            (level, self.calls[level][way], way, *(found[measure] for measure in measures))
            for level, ways in self.rows.items()
            for way, found in ways.items()
        ]
        return markdown(("from level", "calls", "way", *measures), rows)


@torch.no_grad()
def shortcut(
    model: Model,
    prompts: str | Sequence[str],
    rewards: Sequence[AnyReward] = (),
    *,
    clip: str | None = None,
    seeds: int = 2,
    steps: int = 50,
    student_steps: int = 4,
    guidance: AnyGuidance = None,
    points: int = 5,
    batch: int = 16,
    shown: int = 4,
    on_call: Callable[[], None] = lambda: None,
) -> Shortcut:
    """Measure ShortFT's Fig. 3 (arXiv:2507.22604) for a model and its student, from `points` levels of the sampling grid.

    `clip` names the CLIP of the perceptual distance, 1 - cosine of two images' embeddings; a bundled model has its own.
    Without `rewards` a bundled model is measured by the preference rewards that come with it. Raises UserError for a model
    without a student (`model.with_student`).
    """
    if "student" not in model.members:
        raise UserError(f"{model.name} has no student to analyze; use model.with_student(...)")
    texts = read_prompts(prompts)
    repeated, numbers = [prompt for prompt in texts for _ in range(seeds)], list(range(seeds)) * len(texts)
    model = model.guided(guidance)
    levels = model.grid(steps)
    ways = {level: _ways(model, level, student_steps) for level in (levels[i * steps // points] for i in range(points))}
    metrics = Metrics.of(model, rewards, clip)
    sheet = _Sheet(range(0, len(repeated), max(1, len(repeated) // shown))[:shown])
    distances: Distances = {level: {way: [] for way in each} for level, each in ways.items()}
    for first in range(0, len(repeated), batch):
        some, seeded = repeated[first : first + batch], numbers[first : first + batch]
        chain = model.chain(some, seeded, on_call=on_call)
        states = [model.noise(seeded), *chain.states(model.noise(seeded), walk(levels))]
        end = metrics.measured(model, states[-1], some)
        sheet.add(f"{steps} steps", end["pixels"], first)
        for level, each in ways.items():
            for way, jumps in each.items():
                *_, latent = chain.states(states[list(levels).index(level)], jumps)
                there = metrics.measured(model, latent, some)
                distances[level][way].append({name: _apart(name, there[name], end[name]) for name in there})
                if not way.startswith("ddim"):
                    sheet.add(f"{way} from {level}", there["pixels"], first)
    rows = {level: {way: _estimates(batches, seeds) for way, batches in each.items()} for level, each in distances.items()}
    calls = {level: {way: len(jumps) for way, jumps in each.items()} for level, each in ways.items()}
    return Shortcut(texts, rows, calls, sheet.picture())


def _ways(model: Model, level: float, student_steps: int) -> dict[str, Jumps]:
    """The ways from a level to the finished image, by their names in the table."""
    student = student_path(level, model.solver.process.schedule.top, student_steps)
    stops = [jump.stop for jump in student]
    half = stops[::-1][::2][::-1]  # every second stop, the last one among them
    return {
        "shortcut": student,
        "ddim": walk([level, *stops]),
        "ddim, half the calls": walk([level, *half]),
        "one step": walk([level, 0]),
    }


@dataclass(frozen=True, slots=True)
class Metrics:
    """What is compared of two latents: themselves, their images, CLIP's embeddings where there is a CLIP, and rewards."""

    rewards: list[Reward]
    clip: Clip | None

    @classmethod
    def of(cls, model: Model, rewards: Sequence[AnyReward], clip: str | None) -> Metrics:
        """These rewards and this CLIP on the model's device; for a bundled model, its own where none are given."""
        bundled = model.name in BUNDLED
        chosen = list(rewards) or ([PickScore("tiny"), HPSv2("tiny")] if bundled else [])
        network = load_clip(clip or "tiny", device=model.device) if clip or bundled else None
        return cls([as_reward(reward).to(model.device) for reward in chosen], network)

    def measured(self, model: Model, latent: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of latents (b, c, h, w): each thing that is compared, with b rows."""
        images = model.codec.decode(latent)
        found = {"latent": latent, "pixels": images}
        if self.clip:
            found["perceptual"] = self.clip.image(normalize(resize_and_crop(images, self.clip.size)))
        return found | {reward.name: checked(reward, images, prompts) for reward in self.rewards}


class _Sheet:
    """The pictures of a few rows of the batch: a line each, with a column for every way."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = rows
        self.columns: dict[str, list[Tensor]] = {}

    def add(self, name: str, images: Tensor, first: int) -> None:
        """Keep those of `images` (b, 3, h, w) whose rows are shown; the first of them is row `first` of all."""
        kept = [images[row - first].cpu() for row in self.rows if first <= row < first + len(images)]
        self.columns.setdefault(name, []).extend(kept)

    def picture(self) -> Image.Image:
        """All of them as one picture."""
        cells = [(name, images[i]) for i in range(len(self.rows)) for name, images in self.columns.items()]
        return grid(pictures(torch.stack([image for _, image in cells])), len(self.columns), [name for name, _ in cells])


def _apart(name: str, there: Tensor, end: Tensor) -> Tensor:
    """(b,): root mean square distance of latents and pixels, 1 - cosine of embeddings, absolute difference of rewards."""
    if name == "perceptual":
        return 1 - torch.cosine_similarity(there, end).float().cpu()
    difference = (there - end).flatten(1) if there.ndim > 1 else (there - end)[:, None]
    return difference.square().mean(1).sqrt().float().cpu()


def _estimates(batches: list[dict[str, Tensor]], seeds: int) -> dict[str, Estimate]:
    """A mean over prompts for each measure. The seeds of one prompt are averaged first."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return {name: Estimate.of(values.view(-1, seeds).mean(1).tolist()) for name, values in whole.items()}


def save(found: Shortcut, folder: str | Path) -> Path:
    """Write `shortcut.md` and `shortcut.png` into a folder, which is made if need be. Returns the folder."""
    place = make_folder(folder)
    write_text(place / "shortcut.md", f"{found}\n")
    write_picture(place / "shortcut.png", found.picture)
    return place
