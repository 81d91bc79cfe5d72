"""The prompt sets that come with the package."""

from __future__ import annotations

import random

from chainrule.tiny.scenes import ANIMALS, BACKGROUNDS, FACES, THINGS, article, plural

UNSEEN = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")
"""Six animals that are not among the 45. DRaFT (arXiv:2309.17400) names no held-out animals: these six are the evaluation list
of AlignProp's published code (arXiv:2310.03739), which trains on the 45."""
PAINTING = "a painting of "


def _emoji() -> list[str]:
    """Prompts for what tiny-emoji can draw: things, counts, pairs and backgrounds. The list is always the same."""
    rng = random.Random("emoji prompts")
    names, backgrounds = list(THINGS), list(BACKGROUNDS)
    found = [f"{PAINTING}{article(name)}" for name in names]
    found += [f"{article(rng.choice(names))} on a {rng.choice(backgrounds)} background" for _ in range(60)]
    found += [f"{rng.choice(('two', 'three'))} {plural(rng.choice(names))}" for _ in range(30)]
    found += [" and ".join(article(name) for name in rng.sample(names, 2)) for _ in range(30)]
    return found


SETS = {
    "animals": lambda: [f"{PAINTING}{article(name)}" for name in ANIMALS],
    "unseen-animals": lambda: [f"{PAINTING}{article(name)}" for name in UNSEEN],
    "faces": lambda: [f"{PAINTING}{article(name)}" for name in FACES],
    "emoji": _emoji,
}
DESCRIPTIONS = {
    "animals": "the 45 common animals of DDPO (arXiv:2305.13301), as paintings",
    "unseen-animals": "the six animals AlignProp's code evaluates on (arXiv:2310.03739), as paintings",
    "faces": "twelve faces with a mood, as paintings",
    "emoji": "everything tiny-emoji can draw: things, counts, pairs, backgrounds",
}


def subjects(name: str) -> list[str]:
    """The subjects of a set's prompts, without "a painting of": "a fox" of "a painting of a fox"."""
    return [prompt.removeprefix(PAINTING) for prompt in SETS[name]()]
