"""The desk: the one model that is in memory, and the pictures that are made with it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from chainrule.adapters import mix
from chainrule.analyze import scale_grid
from chainrule.asked import numbers
from chainrule.errors import UserError
from chainrule.models import Model
from chainrule.studio.shelf import Shelf, chosen

MOST_CELLS = 8
OnCall = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Opened:
    """A model or a run as it was opened: the model without the run's own adapter, and how it is sampled unless asked otherwise."""

    model: Model
    steps: int
    reward_source: str | None = None  # where rewards that name no source come from

    @property
    def about(self) -> str:
        """The model in one line."""
        model, (height, width) = self.model, self.model.size
        guidance = model.defaults.guidance if model.guidance_spec is None else model.guidance_spec
        kind = f"{height} × {width} pixels, {model.sampler.name}, {self.steps} steps, guidance {guidance}, on {model.device}"
        classes = f"; classes: {', '.join(model.defaults.labels)}" if model.defaults.labels else ""
        return f"{model.name}: {kind}{classes}"


@dataclass(frozen=True, slots=True)
class Asked:
    """One image: its prompt, its seed, and how it is sampled. `guidance` None is the model's or the run's own."""

    prompt: str
    seed: int
    steps: int
    guidance: float | None = None

    def __post_init__(self) -> None:
        numbers([self.seed])
        if self.guidance is not None and not 0 <= self.guidance <= 100:
            raise UserError(f"guidance is {self.guidance:g}, but must be between 0 and 100")

    @classmethod
    def of(cls, prompt: str | None, seed: float | None, steps: float | None, guidance: str | None) -> Asked:
        """From the fields of a form, which may be empty. Raises UserError for a number that is not whole, or out of range."""
        return cls((prompt or "").strip(), whole("seed", seed), whole("steps", steps), number("guidance", guidance))


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter by its name, at a scale, on from sampling step `first` until before step `last` (None: to the end)."""

    adapter: str
    scale: float = 1.0
    first: int = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"the scale of {self.adapter} is {self.scale}, but must be a finite number")

    @property
    def partial(self) -> bool:
        """Whether it is off at some step."""
        return self.first > 0 or self.last is not None

    @classmethod
    def of(cls, adapter: str | None, scale: float | None, first: float | None, last: float | None, steps: int) -> Part | None:
        """From the fields of a form; None where no adapter is chosen, or its scale is 0."""
        if not adapter or not scale:
            return None
        end = whole("the last step", last)
        return cls(adapter, float(scale), whole("the first step", first), None if end >= steps else end)


def whole(name: str, value: float | None) -> int:
    """A whole number of a form. Raises UserError for an empty field, and for any other number."""
    if value is None or isinstance(value, str | bool) or not math.isfinite(value) or int(value) != value:
        raise UserError(f"{name} is {'empty' if value is None else repr(value)}, but must be a whole number")
    return int(value)


def number(name: str, text: str | None) -> float | None:
    """The number that a field says; None for an empty one. Raises UserError for any other text."""
    try:
        value = float(text) if text and text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{name} is {text!r}, but must be a number, or empty")
    return value


@dataclass(slots=True)
class Desk:
    """`open` turns a model's name into an `Opened`. One model is held, and one thing is done with it at a time."""

    shelf: Shelf
    open: Callable[[str], Opened]
    busy: threading.Lock = field(default_factory=threading.Lock)
    _held: tuple[str, Opened] | None = None
    _base: tuple[object, Image.Image] | None = None  # what the last picture without adapters was made from, and it

    def opened(self, name: str | None) -> Opened:
        """The model or run of this name, loaded if it is not the one in memory. Raises UserError for a name that is not there."""
        source = chosen("model", name, self.shelf.models())
        if self._held is None or self._held[0] != source:
            self._held = self._base = None  # two models may be more than fits
            self._held = source, self.open(source)
        return self._held[1]

    def own(self, name: str | None) -> str | None:
        """The name of the adapter of the run of this name; None for a model."""
        place = Path(chosen("model", name, self.shelf.models()))
        return next((adapter for adapter, there in self.shelf.adapters().items() if there == place), None)

    def used(self, opened: Opened, parts: Sequence[Part], steps: int) -> Model:
        """The model with adapters on. Raises UserError for one that is not there, does not fit, or has no step."""
        model, known = opened.model, self.shelf.adapters()
        for part in parts:
            place = chosen("adapter", part.adapter, known)
            span = (part.first, steps if part.last is None else part.last) if part.partial else None
            if span and not 0 <= span[0] < span[1] <= steps:
                raise UserError(f"{part.adapter} is on from step {span[0]} until {span[1]}: of {steps} steps, none or too many")
            model = model.using(place, scale=part.scale, adapter_steps=span, steps=steps)
        return model

    def pictures(
        self, name: str | None, asked: Asked, parts: Sequence[Part], on_call: OnCall = lambda: None
    ) -> tuple[Image.Image, Image.Image]:  # fmt: skip
        """One image without adapters and with them, from the same noise. The first is kept until something else is asked for."""
        with self.busy:
            opened = self.opened(name)
            used = self.used(opened, parts, asked.steps)
            if self._base is None or self._base[0] != (name, asked):
                self._base = (name, asked), self._one(self.used(opened, (), asked.steps), asked, on_call)
            base = self._base[1]
            return base, self._one(used, asked, on_call) if parts else base

    def grid(
        self, name: str | None, asked: Asked, parts: Sequence[Part], cells: int, on_call: OnCall = lambda: None
    ) -> Image.Image:  # fmt: skip
        """One or two adapters from scale 0 to their own in `cells` steps (arXiv:2309.17400, Fig. 7).

        Raises UserError for other numbers of adapters, and for one that is off at some step.
        """
        whole_range(parts, "a grid")
        if not 1 <= len(parts) <= 2:
            raise UserError(f"a grid shows one adapter or two, not {len(parts)}; choose them, with scales that are not 0")
        if not 1 <= cells <= MOST_CELLS:
            raise UserError(f"cells is {cells}, but must be between 1 and {MOST_CELLS}")
        known = self.shelf.adapters()
        scales = {str(chosen("adapter", part.adapter, known)): part.scale for part in parts}
        if len(scales) < len(parts):
            raise UserError(f"{parts[0].adapter} is chosen twice; choose another one beside it")
        with self.busy:
            return scale_grid(
                self.opened(name).model, scales, [asked.prompt], cells=cells, seed=asked.seed, steps=asked.steps,
                guidance=asked.guidance, on_call=on_call,
            )  # fmt: skip

    def save(self, parts: Sequence[Part], name: str | None) -> Path:
        """Write the mix of adapters as one adapter into the folder, and return its place.

        Raises UserError for no adapter, one that is off at some step, and a name that is taken.
        """
        if not parts:
            raise UserError("nothing to save: choose an adapter, with a scale that is not 0")
        whole_range(parts, "a mix")
        place, known = self.shelf.free(name), self.shelf.adapters()
        weights: dict[Path, float] = {}
        for part in parts:
            adapter = chosen("adapter", part.adapter, known)
            weights[adapter] = weights.get(adapter, 0.0) + part.scale
        return mix(weights).save(place)

    def _one(self, model: Model, asked: Asked, on_call: OnCall) -> Image.Image:
        return model.sample([asked.prompt], [asked.seed], asked.steps, asked.guidance, on_call=on_call)[0]


def whole_range(parts: Sequence[Part], what: str) -> None:
    """Raises UserError for an adapter that is off at some step."""
    for part in parts:
        if part.partial:
            raise UserError(f"{what} has its adapters on at every step; let {part.adapter} be on from the first to the last")
