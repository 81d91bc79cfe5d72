"""What of the sampler a run is to learn besides its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from chainrule.errors import UserError
from chainrule.guidance import Embedded, Scaled, reads_negative, specification
from chainrule.learned import GUIDANCE, NEGATIVE, GuidanceWeights, Learned, NegativeEmbedding
from chainrule.models import Model
from chainrule.settings import Finetuning


def sampler_parts(model: Model, settings: Finetuning) -> dict[str, Learned]:
    """Fresh parts of the sampler that are to be learned, by name (arXiv:2309.17400, B.12). At first they change no image.

    Raises UserError for a model or guidance that has no such part.
    """
    learn, guidance = settings.learned, model.guidance
    if learn == ("adapter",):
        return {}
    if isinstance(guidance, Embedded):
        raise UserError("the network reads its guidance and no negative prompt; leave guidance and negative out of learn")
    if not isinstance(getattr(guidance, "scale", None), float | int) or not reads_negative(guidance):
        raise UserError(f"the guidance is {specification(guidance)}; learning it, or a negative, takes one scale above 1")
    found: dict[str, Learned] = {}
    if GUIDANCE in learn:
        scaled = cast(Scaled, guidance)
        found[GUIDANCE] = GuidanceWeights.start(model.grid(settings.sample_steps), float(scaled.scale), inner=scaled)
    if NEGATIVE in learn:
        empty = model.embed([""]).negative.states
        if empty.ndim != 3:
            raise UserError("this model reads classes and not text, so it has no negative embedding; leave negative out of learn")
        part = NegativeEmbedding.start(empty[0], settings.seed)
        part.fit(empty[0])
        found[NEGATIVE] = part
    return found


def trainable(parts: Mapping[str, Learned]) -> dict[str, Learned]:
    """Those that have something to train: parts that were loaded have not."""
    return {name: part for name, part in parts.items() if any(w.requires_grad for w in part.named_parameters().values())}
