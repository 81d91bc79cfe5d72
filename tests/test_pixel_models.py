"""Models in pixel space and of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import pixel_pipeline, score

import chainrule as cr


def test_a_pixel_model_samples_as_diffusers_does() -> None:
    pipe = pixel_pipeline(None, torch.float32)
    model, seeds = cr.load(pipe), [3, 4]
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        batch_size=2, generator=[torch.Generator().manual_seed(s) for s in seeds], num_inference_steps=10, output_type="np"
    )
    ours = model.render(["", ""], seeds, 10, 1.0).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs.images, atol=1e-5)


def test_classes_are_named_numbered_or_empty(tmp_path: Path) -> None:
    pixel_pipeline(3, torch.float32).save_pretrained(tmp_path)
    (tmp_path / "chainrule.json").write_text('{"steps": 10, "guidance": 1.0, "labels": ["cat", "dog"]}')
    model = cr.load(tmp_path)
    said = model.embed(["dog", "0", ""])
    assert said.positive.states.tolist() == [1, 0, 2] and said.negative.states.tolist() == [2, 2, 2]
    assert model.grid()[0] == 901
    with pytest.raises(cr.UserError, match=r"dgo.*dog"):
        model.embed(["dgo"])
    with pytest.raises(cr.UserError, match="classes instead of embeddings"):
        cr.steer(model, ["cat"], score, over="prompt", updates=1)
