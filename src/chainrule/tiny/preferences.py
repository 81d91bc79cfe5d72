"""The preferences that the bundled reward models were trained on: documented rules, and noisy choices drawn from them.

A rule scores an image for a caption from five readings, each about 0 to 1: is the caption true, how colorful is the
picture, how well does the subject stand out from its background, how warm is the background, how large is the subject;
and from what was done to the picture (blur, noise). Two rules with different weights stand for two crowds of people.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from chainrule.tiny import scenes


@dataclass(frozen=True, slots=True)
class Rule:
    """Weights of the readings. `P(a over b) = sigmoid(sharpness * (score(a) - score(b)))`."""

    truth: float
    color: float
    contrast: float
    warmth: float
    size: float
    damage: float
    gradient: float
    sharpness: float = 3.0

    def score(self, sample: Sample, truth: float) -> float:
        """The score of a sample: the weighted sum of its readings and of `truth`, in [0, 1]."""
        readings = {"truth": truth, **sample.readings()}
        return sum(getattr(self, name) * value for name, value in readings.items())


PICK = Rule(truth=1.5, color=1.0, contrast=0.3, warmth=1.2, size=0.6, damage=-1.5, gradient=0.6)
HPS = Rule(truth=1.5, color=0.7, contrast=1.0, warmth=0.4, size=0.6, damage=-1.5, gradient=1.0)
AESTHETIC = Rule(truth=0.0, color=1.0, contrast=0.8, warmth=0.6, size=0.4, damage=-1.5, gradient=0.8)


@dataclass(frozen=True, slots=True)
class Sample:
    """A rendered scene, its pixels (128, 128, 3) uint8, and how much they were damaged by blur and noise (0: not at all)."""

    scene: scenes.Scene
    image: np.ndarray
    damage: float

    def readings(self) -> dict[str, float]:
        """The rule's measurements of the image, each about 0 to 1."""
        pixels = self.image.astype(np.float32) / 255
        edge = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
        red_green, yellow_blue = pixels[..., 0] - pixels[..., 1], pixels[..., :2].mean(-1) - pixels[..., 2]
        spread = math.hypot(red_green.std(), yellow_blue.std()) + 0.3 * math.hypot(red_green.mean(), yellow_blue.mean())
        covered = np.abs(pixels - scenes.backdrop(self.scene.background)).max(-1) > 0.15
        light = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        apart = abs(light[covered].mean() - light[~covered].mean()) if 0.01 < covered.mean() < 0.99 else 0.0
        return {
            "color": min(spread / 0.5, 1.5),
            "contrast": min(apart / 0.4, 1.2),
            "warmth": float(edge[:, 0].mean() - edge[:, 2].mean()),
            "size": sum(thing.size for thing in self.scene.things) / 100,
            "gradient": float(np.abs(pixels[:6].mean((0, 1)) - pixels[-6:].mean((0, 1))).max()),
            "damage": self.damage,
        }


def truth(asked: scenes.Scene, shown: scenes.Scene) -> float:
    """1 when the caption of `asked` is true of `shown`; half for the right things in the wrong number or place."""
    if set(asked.names) != set(shown.names):
        return 0.25 if set(asked.names) & set(shown.names) else 0.0
    right = 1.0 if sorted(asked.names) == sorted(shown.names) else 0.6
    return right - (0.4 if asked.named and asked.background != shown.background else 0.0)


def sample(rng: random.Random, scene: scenes.Scene) -> Sample:
    """Render a scene and, often, change its colors, blur it or add noise: the images that a reward will meet."""
    image, damage = Image.fromarray(scenes.render(scene)), 0.0
    if rng.random() < 0.4:
        image = ImageEnhance.Color(image).enhance(rng.uniform(0, 2))
    if rng.random() < 0.3:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.5, 1.4))
    if rng.random() < 0.25:
        radius = rng.uniform(0.5, 4)
        image, damage = image.filter(ImageFilter.GaussianBlur(radius)), damage + radius / 4
    array = np.asarray(image)
    if rng.random() < 0.25:
        amount = rng.uniform(4, 50)
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, amount, array.shape)
        array, damage = (array + noise).clip(0, 255).astype(np.uint8), damage + amount / 50
    return Sample(scene, array, damage)


def pair(rng: random.Random, rule: Rule) -> tuple[str, Sample, Sample, bool]:
    """Draw a caption, two candidate images, and whether the first was chosen by the rule."""
    asked = scenes.draw(rng)
    candidates = []
    for _ in range(2):
        roll = rng.random()
        if roll < 0.2:
            shown = scenes.draw(rng)
        elif roll < 0.6:
            shown = replace(asked, background=rng.choice(list(scenes.BACKGROUNDS)))
        else:
            shown = asked if asked.named else replace(asked, background=rng.choice(list(scenes.BACKGROUNDS)))
        candidates.append(sample(rng, shown))
    first, second = (rule.score(shown, truth(asked, shown.scene)) for shown in candidates)
    gap = first - second
    return asked.caption(rng), candidates[0], candidates[1], rng.random() < 1 / (1 + math.exp(-rule.sharpness * gap))
