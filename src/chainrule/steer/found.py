"""What steering found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image

from chainrule.report import before_after


@dataclass(slots=True, repr=False)
class Steered:
    """What steering found, one entry per prompt: the image of lowest loss, and what it was before.

    `rewards` and `distances` (root mean square over pixels, to the image as it was) belong to `images`; `updates` says after
    how many updates each was found. `curve` has a row per update: means over all images. `inverted` is the distance of a
    given picture to what its inverted latent samples.
    """

    prompts: list[str]
    images: list[Image.Image] = field(default_factory=list)
    before: list[Image.Image] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    rewards_before: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    updates: list[int] = field(default_factory=list)
    inverted: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        gains = ", ".join(f"{a:.4g} -> {b:.4g}" for a, b in zip(self.rewards_before, self.rewards, strict=False))
        return f"Steered({len(self.images)} images, rewards {gains or 'none'})"

    def _repr_png_(self) -> bytes | None:
        """In a notebook: every image under what it was before."""
        if not self.images or len(self.before) != len(self.images):
            return None
        file = BytesIO()
        before_after(self.before, self.images, self.prompts).save(file, "PNG")
        return file.getvalue()

    @property
    def best(self) -> Image.Image:
        """The image of the highest reward."""
        return self.images[max(range(len(self.images)), key=self.rewards.__getitem__)]


# What there is one of for every image, and is written down.
LISTS = ("prompts", "rewards", "rewards_before", "distances", "updates", "inverted")


def joined(batches: Sequence[Steered]) -> Steered:
    """The batches as one, their curves too."""
    whole = Steered([])
    for name in (*LISTS, "images", "before"):
        setattr(whole, name, [value for batch in batches for value in getattr(batch, name)])
    whole.curve = together([batch.curve for batch in batches])
    return whole


def together(tables: Sequence[Sequence[dict[str, float]]]) -> list[dict[str, float]]:
    """One curve over all batches: means weighted by images; a batch that stopped early stays at its last row."""
    curve = []
    for number in range(max(map(len, tables), default=0)):
        rows = [table[min(number, len(table) - 1)] for table in tables]
        total = sum(row["count"] for row in rows)
        means = {key: sum(row[key] * row["count"] for row in rows) / total for key in ("reward", "loss", "distance")}
        curve.append({"step": number, **means})
    return curve
