"""What a model makes of pictures: whether its autoencoder and its prediction are what its configuration says.

The plain pipeline reads the same configuration, so that comparing samples with it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from chainrule.models import Model
from chainrule.tiny import scenes

SHARES = (0.2, 0.4, 0.6, 0.8)  # of the noisiest level
MOST_LOSS = 1.0  # of a prediction, where predicting nothing has 1
LEAST_PSNR = 15.0
DEVIATIONS = (0.3, 3.0)  # of latents, which are made to have 1
MOST_MEAN = 1.0
STEPS = 10  # of a sample that is looked at


@dataclass(frozen=True, slots=True)
class Latents:
    """How pictures come back from the autoencoder, in dB, and the mean and standard deviation of their latents."""

    psnr: float
    mean: float
    deviation: float

    @property
    def fine(self) -> bool:
        """Whether an autoencoder in its own units gives these."""
        return self.psnr > LEAST_PSNR and abs(self.mean) < MOST_MEAN and DEVIATIONS[0] < self.deviation < DEVIATIONS[1]

    def __str__(self) -> str:
        return (
            f"pictures come back with {self.psnr:.0f} dB (at least {LEAST_PSNR:g}); latents have mean {self.mean:.2f} "
            f"(within {MOST_MEAN:g}) and deviation {self.deviation:.2f} ({DEVIATIONS[0]:g} to {DEVIATIONS[1]:g})"
        )


def drawn(model: Model, count: int = 4) -> tuple[Tensor, list[str]]:
    """Pictures in the model's size, (n, 3, height, width) in [0, 1], with prompts for them.

    They are the bundled drawings, or its own samples for a model of pixels, which knows a few classes or one thing only.
    """
    rng = Random(0)
    if model.codec.network is None:
        labels = model.defaults.labels or ("",)
        said = [labels[i % len(labels)] for i in range(count)]
        return model.render(said, range(count), STEPS).cpu(), said
    every = [scenes.single(rng, scenes.pick_name(rng)) for _ in range(count)]
    images = torch.stack([torch.from_numpy(scenes.render(scene)).permute(2, 0, 1) / 255 for scene in every])
    images = F.interpolate(images, model.size, mode="bilinear", antialias=True).clamp(0, 1)
    return images, [scene.caption(rng) for scene in every]


@torch.no_grad()
def latents(model: Model, images: Tensor) -> Latents:
    """What becomes of pictures (n, 3, height, width) in [0, 1] on the way to latents and back."""
    there = torch.cat([model.codec.encode(image[None].to(model.device)) for image in images])
    back = torch.cat([model.codec.decode(latent[None]) for latent in there])
    error = float((back.float().cpu() - images).square().mean())
    return Latents(-10 * math.log10(max(error, 1e-10)), float(there.mean()), float(there.std()))


@torch.no_grad()
def prediction_losses(model: Model, images: Tensor, prompts: Sequence[str]) -> dict[float, float]:
    """The error of the one-step picture from noised pictures, by level, as a share of that of an answer of zero.

    For an answer m at x the picture is a x + b m, so this is the mean of |m - target|^2 over that of |target|^2, whatever the
    target is. A network that answers something else than its configuration says is above 1 at high levels.
    """
    x0 = torch.cat([model.codec.encode(image[None].to(model.device)) for image in images])
    model, noise = model.guided(1.0), model.noise(range(len(x0)))
    member, condition, process = model.cast()["base"], model.embed(prompts), model.solver.process
    found = {}
    for share in SHARES:
        level = round(share * process.schedule.top)
        alpha, sigma = process.schedule(level)
        x = alpha * x0.to(noise) + sigma * noise
        a, b = process.coefficients(level, 0)
        nothing = (a * x - x0).square().mean()
        found[float(level)] = float((a * x + b * member(x, level, condition) - x0).square().mean() / nothing)
    return found
