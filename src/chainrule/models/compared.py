"""The images of the diffusers pipeline itself, to compare a model's own with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.models.model import Model
from chainrule.models.pipeline import weight_type


def pipeline_images(model: Model, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> Tensor:
    """What `model.render` should give: the pipeline's answer, with its own code, under the scheduler the sampler equals.

    Images as (n, 3, h, w) in [0, 1] on the CPU. Adapters are off. Raises UserError where there is nothing to compare with:
    pipelines in pixel space know no classes.
    """
    known = inspect.signature(type(model.pipe).__call__).parameters
    if "prompt" not in known and weight_type(model.network) == torch.bfloat16:
        raise UserError(f"the plain {model.family} cannot answer in bfloat16, so there is nothing to compare with")
    if "prompt" not in known and model.network.config.num_class_embeds:  # type: ignore[union-attr]
        raise UserError(f"the plain {model.family} knows no classes, so there is nothing to compare with")
    pipe, solver = model.pipe, model.sampler.solver
    options: dict[str, Any] = {
        "prompt": list(prompts), "batch_size": len(prompts), "guidance_scale": guidance, "height": model.codec.height,
        "width": model.codec.width, "eta": getattr(solver, "gamma", 0.0), "clean_caption": False, "use_resolution_binning": False,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if key in known}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    before, pipe.scheduler = pipe.scheduler, type(model.sampler.scheduler).from_config(model.sampler.scheduler.config)
    try:
        found = pipe(num_inference_steps=steps, generator=generators, output_type="np", **given)
    finally:
        pipe.scheduler = before
    return torch.from_numpy(np.asarray(found.images)).permute(0, 3, 1, 2)
