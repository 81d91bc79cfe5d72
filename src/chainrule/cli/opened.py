"""What a command is given as a model: a model, or a run with the adapters it was trained on top of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainrule.models import Model


def run_of(source: str | Path) -> Path | None:
    """The run folder this is, or None when it names a model."""
    return Path(source) if (Path(source) / "config.yaml").is_file() else None


def base_of(source: str | Path) -> tuple[str, list[str]]:
    """The name of a model, or of the model of a run with the adapters it was trained on top of; all checked."""
    from chainrule.adapters.files import parts
    from chainrule.models.loading import check
    from chainrule.runs import Run

    folder = run_of(source)
    config = Run(folder).config if folder else {"model": str(source)}
    name, under = str(config.get("model")), [str(place) for place in config.get("under") or ()]
    check(name)
    for place in under:
        parts(place)
    return name, under


def load_with(name: str, under: list[str]) -> Model:
    from chainrule.models.loading import load

    model = load(name)
    for place in under:
        model = model.using(place)
    return model
