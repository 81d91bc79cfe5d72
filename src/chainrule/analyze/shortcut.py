"""Measurements the papers rest on. So far: how far a student's shortcut leads from where the base model ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.guidance import AnyGuidance
from chainrule.models import BUNDLED, Model
from chainrule.models.pictures import pictures
from chainrule.plan import Path as Jumps
from chainrule.plan import student_path, walk
from chainrule.prompts import prompts as read_prompts
from chainrule.report import grid as sheet
from chainrule.report.tables import markdown
from chainrule.rewards import HPSv2, PickScore, Reward, RewardFunction, checked, reward_of
from chainrule.rewards.clip import Clip, load_clip, normalize, resize_and_crop


@dataclass(frozen=True, slots=True)
class Shortcut:
    """How far from the base model's own end each way down leads, from each level: rows of a table, and pictures.

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
    rewards: Sequence[Reward | RewardFunction] = (),
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
    """ShortFT's Fig. 3 (arXiv:2507.22604) for this model and its student: from `points` levels of the sampling grid.

    `clip` names the CLIP of the perceptual distance, 1 - cosine of two images' embeddings; a bundled model has its own.
    Without `rewards` a bundled model is measured by the preference scorers that come with it. Raises UserError for a model
    without a student (`model.with_student`).
    """
    if "student" not in model.members:
        raise UserError(f"{model.name} has no student to analyze; use model.with_student(...)")
    said = [prompt for prompt in read_prompts(prompts) for _ in range(seeds)]
    numbers = list(range(seeds)) * (len(said) // seeds)
    model = model.guided(guidance)
    levels, top = model.grid(steps), model.solver.process.schedule.top
    starts = [levels[i * steps // points] for i in range(points)]
    ways: dict[float, dict[str, Jumps]] = {}
    for level in starts:
        jumps = student_path(level, top, student_steps)
        stops = [jump.stop for jump in jumps]
        ways[level] = {
            "shortcut": jumps, "ddim": walk([level, *stops]), "ddim, half the calls": walk([level, *stops[::-1][::2][::-1]]),
            "one step": walk([level, 0]),
        }  # fmt: skip
    own = model.name in BUNDLED
    chosen = list(rewards) or ([PickScore("tiny"), HPSv2("tiny")] if own else [])
    scorers = [reward_of(reward).to(model.device) for reward in chosen]
    eye = load_clip(clip or "tiny", device=model.device) if clip or own else None
    found: dict[float, dict[str, list[dict[str, Tensor]]]] = {level: {way: [] for way in each} for level, each in ways.items()}
    drawn = range(0, len(said), max(1, len(said) // shown))[:shown]
    columns: dict[str, list[Tensor]] = {}

    def keep(name: str, images: Tensor, first: int) -> None:
        columns.setdefault(name, []).extend(images[i - first].cpu() for i in drawn if first <= i < first + len(images))

    for start in range(0, len(said), batch):
        part, seeded = said[start : start + batch], numbers[start : start + batch]
        chain = model.chain(part, seeded, on_call=on_call)
        states = [model.noise(seeded), *chain.states(model.noise(seeded), walk(levels))]
        end = _seen(model, states[-1], part, scorers, eye)
        keep(f"{steps} steps", end["pixels"], start)
        for level, each in ways.items():
            for way, jumps in each.items():
                *_, latent = chain.states(states[list(levels).index(level)], jumps)
                there = _seen(model, latent, part, scorers, eye)
                found[level][way].append({name: _apart(name, there[name], end[name]) for name in there})
                if not way.startswith("ddim"):
                    keep(f"{way} from {level}", there["pixels"], start)
    rows = {level: {way: _estimates(parts, seeds) for way, parts in each.items()} for level, each in found.items()}
    calls = {level: {way: len(jumps) for way, jumps in each.items()} for level, each in ways.items()}
    cells = [(name, images[i]) for i in range(len(drawn)) for name, images in columns.items()]
    picture = sheet(pictures(torch.stack([image for _, image in cells])), len(columns), [name for name, _ in cells])
    return Shortcut(read_prompts(prompts), rows, calls, picture)


def _seen(model: Model, latent: Tensor, prompts: Sequence[str], scorers: Sequence[Reward], eye: Clip | None) -> dict[str, Tensor]:
    """Everything that is compared: latents, pixels, CLIP's embeddings, rewards."""
    images = model.codec.decode(latent)
    found = {"latent": latent, "pixels": images}
    if eye:
        found["perceptual"] = eye.embed(normalize(resize_and_crop(images, eye.size)), prompts)[0]
    return found | {scorer.name: checked(scorer, images, prompts) for scorer in scorers}


def _apart(name: str, there: Tensor, end: Tensor) -> Tensor:
    """(b,): root mean square distance of latents and pixels, 1 - cosine of embeddings, absolute difference of rewards."""
    if name == "perceptual":
        return 1 - torch.cosine_similarity(there, end).float().cpu()
    difference = (there - end).flatten(1) if there.ndim > 1 else (there - end)[:, None]
    return difference.square().mean(1).sqrt().float().cpu()


def _estimates(parts: list[dict[str, Tensor]], seeds: int) -> dict[str, Estimate]:
    """Over prompts; the seeds of one are averaged first."""
    return {name: Estimate.of(torch.cat([p[name] for p in parts]).view(-1, seeds).mean(1).tolist()) for name in parts[0]}


def save(found: Shortcut, folder: str | Path) -> Path:
    """Write `shortcut.md` and `shortcut.png` into a folder."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / "shortcut.md").write_text(f"{found}\n")
    found.picture.save(place / "shortcut.png")
    return place
