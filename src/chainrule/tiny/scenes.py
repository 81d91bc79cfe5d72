"""The world tiny-emoji was trained on: captioned scenes of Noto Color Emoji glyphs on named backgrounds.

Everything here is numpy and Pillow. `draw` makes a random `Scene`, which has a caption, and
`render` draws it from the font's drawings in glyphs.npz (OFL-1.1, see `glyphs`).
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128  # pixels of one side of an image
GLYPHS = Path(__file__).with_name("glyphs.npz")

# The 45 common animals of DDPO (Black et al., arXiv:2305.13301), in the font's drawings.
ANIMALS = {
    "cat": "🐈", "dog": "🐕", "horse": "🐎", "monkey": "🐒", "rabbit": "🐇", "zebra": "🦓", "spider": "🕷", "bird": "🐦",
    "sheep": "🐑", "deer": "🦌", "cow": "🐄", "goat": "🐐", "lion": "🦁", "tiger": "🐅", "bear": "🐻", "raccoon": "🦝",
    "fox": "🦊", "wolf": "🐺", "lizard": "🦎", "beetle": "🪲", "ant": "🐜", "butterfly": "🦋", "fish": "🐟", "shark": "🦈",
    "whale": "🐋", "dolphin": "🐬", "squirrel": "🐿", "mouse": "🐁", "rat": "🐀", "snake": "🐍", "turtle": "🐢",
    "frog": "🐸", "chicken": "🐔", "duck": "🦆", "goose": "🪿", "bee": "🐝", "pig": "🐖", "turkey": "🦃", "fly": "🪰",
    "llama": "🦙", "camel": "🐪", "bat": "🦇", "gorilla": "🦍", "hedgehog": "🦔", "kangaroo": "🦘",
}  # fmt: skip
FACES = {
    "smiling face": "🙂", "laughing face": "😂", "winking face": "😉", "crying face": "😭", "angry face": "😡",
    "sad face": "🙁", "sleeping face": "😴", "surprised face": "😮", "loving face": "😍", "cool face": "😎",
    "sick face": "🤢", "silly face": "🤪",
}  # fmt: skip
FRUIT = {
    "apple": "🍎", "pear": "🍐", "orange": "🍊", "lemon": "🍋", "banana": "🍌", "watermelon": "🍉", "grape": "🍇",
    "strawberry": "🍓", "cherry": "🍒", "peach": "🍑", "pineapple": "🍍", "carrot": "🥕",
}  # fmt: skip
VEHICLES = {
    "car": "🚗", "bus": "🚌", "taxi": "🚕", "truck": "🚚", "tractor": "🚜", "bicycle": "🚲", "train": "🚂", "plane": "✈",
    "rocket": "🚀", "helicopter": "🚁", "boat": "⛵", "ship": "🚢",
}  # fmt: skip
OBJECTS = {
    "ball": "⚽", "book": "📕", "clock": "⏰", "key": "🔑", "house": "🏠", "castle": "🏰", "tree": "🌳", "flower": "🌸",
    "rose": "🌹", "sunflower": "🌻", "cactus": "🌵", "mushroom": "🍄", "star": "⭐", "heart": "❤", "moon": "🌙",
    "snowman": "⛄", "umbrella": "☂", "crown": "👑", "guitar": "🎸", "camera": "📷", "gift": "🎁", "balloon": "🎈",
    "bell": "🔔", "cake": "🎂", "pizza": "🍕", "burger": "🍔", "donut": "🍩", "robot": "🤖", "ghost": "👻", "pumpkin": "🎃",
}  # fmt: skip
KINDS = {"animals": ANIMALS, "faces": FACES, "fruit": FRUIT, "vehicles": VEHICLES, "objects": OBJECTS}
THINGS: dict[str, str] = {name: glyph for kind in KINDS.values() for name, glyph in kind.items()}
# Animals are half of what people will ask for; the rest shares the other half.
KIND_WEIGHTS = {"animals": 0.5, "faces": 0.12, "fruit": 0.09, "vehicles": 0.1, "objects": 0.19}

# Named backgrounds: color at the top edge, color at the bottom edge.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "black": ((16, 16, 18), (16, 16, 18)),
    "gray": ((128, 128, 132), (128, 128, 132)),
    "red": ((206, 52, 48), (206, 52, 48)),
    "yellow": ((248, 214, 84), (248, 214, 84)),
    "green": ((72, 152, 80), (72, 152, 80)),
    "blue": ((58, 98, 196), (58, 98, 196)),
    "purple": ((128, 72, 168), (128, 72, 168)),
    "pink": ((246, 172, 196), (246, 172, 196)),
    "sky": ((96, 172, 240), (226, 242, 252)),
    "sunset": ((92, 44, 120), (252, 150, 72)),
    "sea": ((104, 212, 208), (12, 60, 120)),
}
TEMPLATES = ("a painting of {}", "a picture of {}", "a drawing of {}", "an emoji of {}", "{}")
PLACES = (" on a {} background", " with a {} background", ", {} background")
NUMBERS = {2: "two", 3: "three"}
_IRREGULAR = {"sheep": "sheep", "deer": "deer", "fish": "fish", "mouse": "mice", "goose": "geese", "wolf": "wolves"}


def article(noun: str) -> str:
    """A noun with its article: "an apple"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """The plural of a noun: "mice"."""
    *front, last = noun.split()
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join([*front, last])


@dataclass(frozen=True, slots=True)
class Thing:
    """One glyph: its name, the longer side in pixels, and the center in pixels."""

    name: str
    size: int
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One image to be drawn: its things and its background. `named` is whether the caption names the background."""

    things: tuple[Thing, ...]
    background: str
    named: bool
    small: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the things."""
        return tuple(thing.name for thing in self.things)

    @property
    def subject(self) -> str:
        """The things in words, without the background: "a cat and a dog"."""
        first, *rest = self.names
        if not rest:
            return f"a small {first}" if self.small else article(first)
        if all(name == first for name in rest):
            return f"{NUMBERS[len(self.names)]} {plural(first)}"
        return " and ".join(map(article, self.names))

    def caption(self, rng: random.Random) -> str:
        """A caption of the scene in one of the templates."""
        text = rng.choice(TEMPLATES).format(self.subject)
        return text + rng.choice(PLACES).format(self.background) if self.named else text


def pick_name(rng: random.Random) -> str:
    """A random name; kinds are weighted by KIND_WEIGHTS."""
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    return rng.choice(list(KINDS[kind]))


def single(rng: random.Random, name: str, background: str | None = None) -> Scene:
    """A scene of one thing, large and near the center, on a given or random background."""
    spot = Thing(name, 2 * rng.randint(43, 51), 64 + rng.gauss(0, 2.5), 64 + rng.gauss(0, 2.5))
    return Scene((spot,), background or rng.choice(list(BACKGROUNDS)), named=rng.random() < 0.6)


def draw(rng: random.Random) -> Scene:
    """A random scene: mostly one thing, some small ones, two or three of a kind, and pairs."""
    roll, name = rng.random(), pick_name(rng)
    if roll < 0.68:
        return single(rng, name)
    background, named = rng.choice(list(BACKGROUNDS)), rng.random() < 0.6
    if roll < 0.74:
        size = 2 * rng.randint(22, 28)
        spot = Thing(name, size, rng.uniform(34, 94), rng.uniform(34, 94))
        return Scene((spot,), background, named, small=True)
    if roll < 0.88:
        names = (name,) * rng.choice((2, 3))
    else:
        other = pick_name(rng)
        while other == name:
            other = pick_name(rng)
        names = (name, other)
    jitter = functools.partial(rng.gauss, 0, 1.5)
    spots = [(34, 64), (94, 64)] if len(names) == 2 else [(34, 38), (94, 38), (64, 92)]
    size = 2 * rng.randint(26, 29)
    things = (Thing(n, size, x + jitter(), y + jitter()) for n, (x, y) in zip(names, spots, strict=True))
    return Scene(tuple(things), background, named)


@functools.cache
def _inks() -> dict[str, np.ndarray]:
    """The font's own drawing of every thing: (h, w, 4) uint8, premultiplied, cropped to its ink."""
    with np.load(GLYPHS) as found:
        return dict(found)


@functools.cache
def glyph(name: str, size: int) -> np.ndarray:
    """A thing's drawing, `size` pixels on its longer side: premultiplied RGBA, (h, w, 4) float32 in [0, 1]."""
    ink = Image.fromarray(_inks()[name])
    scale = size / max(ink.size)
    shape = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    # The drawings are premultiplied already; resizing the bands one by one keeps it from doing so again.
    bands = [np.asarray(band.resize(shape, Image.Resampling.LANCZOS), np.float32) for band in ink.split()]
    array = np.stack(bands, -1) / 255
    return np.concatenate([np.minimum(array[..., :3], array[..., 3:]), array[..., 3:]], -1)


@functools.cache
def backdrop(background: str) -> np.ndarray:
    """The named background, (128, 128, 3) float32 in [0, 1]: a gradient from its top to its bottom color."""
    top, bottom = (np.array(color, np.float32) / 255 for color in BACKGROUNDS[background])
    mix = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top * (1 - mix) + bottom * mix, (SIZE, SIZE, 3)).astype(np.float32)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: (128, 128, 3) uint8."""
    canvas = backdrop(scene.background).copy()
    for thing in scene.things:
        stamp = glyph(thing.name, thing.size)
        h, w = stamp.shape[:2]
        top, left = round(thing.y - h / 2), round(thing.x - w / 2)
        y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, SIZE), min(left + w, SIZE)
        inside = stamp[y0 - top : y1 - top, x0 - left : x1 - left]
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - inside[..., 3:]) + inside[..., :3]
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)
