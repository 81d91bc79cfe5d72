"""Pictures of an adapter at several scales, of two mixed, and of one that is on for a part of the sampling steps only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from chainrule.errors import UserError
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.report import grid


def scale_grid(
    model: Model, adapters: Mapping[str, float], prompts: Sequence[str], *, cells: int = 4, seed: int = 0, steps: int | None = None,
    guidance: AnyGuidance = None, on_call: Callable[[], None] = lambda: None,
) -> Image.Image:  # fmt: skip
    """The same prompts and noise with adapters from scale 0 to their own, in `cells` steps (arXiv:2309.17400, Fig. 7 and 19-21).

    One adapter's scales go across, a row for each prompt. Of two, the first's go across and the second's go down, for one prompt.
    Raises UserError for other numbers of adapters, and for two adapters with several prompts.
    """
    if len(adapters) not in (1, 2):
        raise UserError(f"a grid shows one adapter or two, not {len(adapters)}")
    if len(adapters) == 2 and len(prompts) != 1:
        raise UserError(f"a grid of two adapters shows one prompt, not {len(prompts)}")
    (across, most), *rest = adapters.items()
    rows: list[tuple[str, dict[str, float]]] = [(prompt, {}) for prompt in prompts]
    if rest:
        ((down, highest),) = rest
        rows = [(prompts[0], {down: highest * i / cells}) for i in range(cells + 1)]
    images, captions = [], []
    for prompt, held in rows:
        for i in range(cells + 1):
            scales = {across: most * i / cells, **held}
            used = model
            for source, scale in scales.items():
                used = used.using(source, scale=scale)
            images += used.sample([prompt], [seed], steps, guidance, on_call=on_call)
            named = [f"{_name(source, adapters)} {scale:.3g}" for source, scale in scales.items()]
            captions.append(" · ".join(named) if rest else f"{named[0]}: {prompt}")
    return grid(images, cells + 1, captions)


def step_grid(
    model: Model, adapter: str | Path, prompts: Sequence[str], *, cells: int = 5, seed: int = 0, steps: int | None = None,
    guidance: AnyGuidance = None, on_call: Callable[[], None] = lambda: None,
) -> Image.Image:  # fmt: skip
    """The same prompts and noise with an adapter on until step M, and from step M on (arXiv:2309.17400, Fig. 26-27).

    Two rows for each prompt; M goes across, from 0 to the number of steps, in `cells` parts. Raises UserError for a chain of
    fewer steps.
    """
    count = len(model.grid(steps)) - 1
    if cells > count:
        raise UserError(f"cells is {cells}, but must be at most the number of sampling steps, {count}")
    turns = [round(count * i / cells) for i in range(cells + 1)]
    images, captions = [], []
    for prompt in prompts:
        for word in ("until", "from"):
            for turn in turns:
                span = (0, turn) if word == "until" else (turn, count)
                used = model if span[0] == span[1] else model.using(adapter, adapter_steps=span, steps=steps)
                images += used.sample([prompt], [seed], steps, guidance, on_call=on_call)
                captions.append(f"{word} step {turn}: {prompt}")
    return grid(images, cells + 1, captions)


def _name(source: str, among: Mapping[str, float]) -> str:
    """The last part of an adapter's path, or the whole where two are alike."""
    names = [Path(other).name for other in among]
    return Path(source).name if len(set(names)) == len(names) else source
