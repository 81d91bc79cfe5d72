"""Steering as a whole: what it keeps, what it holds, what it writes, what it refuses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, score
from steer_loops import GUIDANCE, PROMPTS, SEEDS, STEPS, problem

import chainrule as cr
from chainrule.adapters.lora import every_layer
from chainrule.objective import distance
from chainrule.rewards import reward_of
from chainrule.settings import Steering
from chainrule.steer.kinds import Over
from chainrule.steer.search import Batch, Search


def test_steering_keeps_the_image_of_lowest_loss_and_says_what_it_is() -> None:
    model = cr.load(make_pipeline())
    found = cr.steer(model, PROMPTS, score, seeds=SEEDS, steps=STEPS, guidance=GUIDANCE, updates=6, lr=0.05, keep=0.02)
    plain = model.render(PROMPTS, SEEDS, STEPS, GUIDANCE).double()
    assert np.array_equal(np.asarray(found.before[0]), np.asarray(model.sample(PROMPTS, SEEDS, STEPS, GUIDANCE)[0]))
    for k in range(2):
        image = torch.from_numpy(np.asarray(found.images[k], np.float64) / 255).permute(2, 0, 1)[None]
        assert found.rewards[k] == pytest.approx(float(score(image, "")), abs=2e-3)  # 8 bits
        assert found.distances[k] == pytest.approx(float(distance(image, plain[k : k + 1])), abs=4e-3)
    losses = [0.02 * d - 0.98 * r for d, r in zip(found.distances, found.rewards, strict=True)]
    first = [-0.98 * r for r in found.rewards_before]
    assert all(a < b for a, b in zip(losses, first, strict=True))
    assert [row["step"] for row in found.curve] == list(range(7))
    assert found.best is found.images[int(np.argmax(found.rewards))]


@pytest.mark.parametrize("options", [
    {}, {"gradient": "full", "over": "negative"}, {"gradient": "invertible"}, {"gradient": "flowgrad"}, {"gradient": "universal"},
    *(pytest.param(more, marks=pytest.mark.heavy) for more in (
        {"over": "prompt"}, {"gradient": "adjoint"}, {"gradient": "freedom"}, {"over": "latent@601", "renormalize": True},
    )),
], ids=str)  # fmt: skip
def test_an_image_does_not_depend_on_those_it_is_steered_with(options: dict[str, Any]) -> None:
    model = cr.load(make_pipeline())
    common: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "updates": 2, "lr": 0.05, **options}
    both = cr.steer(model, PROMPTS, score, seeds=SEEDS, batch=2, **common)
    alone = cr.steer(model, PROMPTS, score, seeds=SEEDS, batch=1, **common)
    assert both.rewards == pytest.approx(alone.rewards, rel=1e-9)
    assert both.updates == alone.updates
    assert both.rewards != both.rewards_before


def test_a_bound_holds_every_number_of_the_latent() -> None:
    """With a bound near zero the image stays what it was; with a wide one the same rate moves it."""
    model = cr.load(make_pipeline())
    common: dict[str, Any] = {"steps": STEPS, "guidance": GUIDANCE, "updates": 3, "lr": 0.3, "seeds": SEEDS}
    tight, wide = (max(cr.steer(model, PROMPTS, score, bound=bound, **common).distances) for bound in (1e-6, 0.3))
    assert tight < 1e-5 < 1e-3 < wide


def test_every_gradient_raises_a_reward_it_can_reach(tmp_path: Path) -> None:
    model = cr.load(make_pipeline("v_prediction"))
    common: dict[str, Any] = {"steps": STEPS, "guidance": 1.0, "updates": 6, "lr": 0.05, "seeds": SEEDS}
    for name in ("sdo", "full", "adjoint", "invertible", "flowgrad"):
        found = cr.steer(model, PROMPTS, score, gradient=name, **common)
        assert all(b > a for a, b in zip(found.rewards_before, found.rewards, strict=True)), name


@pytest.mark.parametrize("gradient", ["sdo", "full"])
def test_weights_are_steered_together_and_saved_as_an_adapter(gradient: str, tmp_path: Path) -> None:
    """DiffusionCLIP's way: the first image is that of the model, the folder's adapter makes the last one, the model stays."""
    model = cr.load(make_pipeline())
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    common: dict[str, Any] = {"seeds": SEEDS, "steps": STEPS, "guidance": GUIDANCE}
    found = cr.steer(model, PROMPTS, score, over="weights", gradient=gradient, updates=5, lr=0.01, out=tmp_path / "out", **common)
    assert all(b > a for a, b in zip(found.rewards_before, found.rewards, strict=True))
    assert model.network.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in model.network.state_dict().items())
    again = model.using(tmp_path / "out" / "adapter")
    assert [float(r) for r in score(again.render(PROMPTS, **common).double(), "")] == pytest.approx(
        found.rewards if max(found.updates) == 5 == min(found.updates) else [found.curve[-1]["reward"]] * 2, rel=1e-2
    )
    with pytest.raises(cr.UserError, match="batch is 1"):
        cr.steer(model, PROMPTS, score, over="weights", batch=1, **common)


def test_a_folder_gets_pictures_curve_and_report(tmp_path: Path) -> None:
    model, out = cr.load(make_pipeline()), tmp_path / "found"
    Image.new("RGB", (40, 30), "orange").save(tmp_path / "photo.png")
    found = cr.steer(
        model, [""], score, images=[tmp_path / "photo.png"], steps=STEPS, guidance=1.0, updates=2, keep=0.5, out=out
    )  # fmt: skip
    assert found.inverted[0] > 0
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "steered.json",
        "best.png",
        "images/0000.png",
        "samples/before_after.png",
        "report.html",
    ):
        assert (out / name).is_file(), name
    assert len(cr.Run(out).metrics()) == 3
    assert "steered for" in (out / "report.html").read_text()


def test_a_bound_holds_for_the_coupled_chain_too() -> None:
    model = cr.load(make_pipeline())
    _, x = problem(model)
    settings = Steering(gradient="invertible", bound=0.05, lr=0.2, sample_steps=STEPS, guidance=GUIDANCE, updates=3)
    with torch.no_grad():
        search = Search(model, settings, Over(), reward_of(score), Batch(PROMPTS, SEEDS), None)
        while not search.done:
            search.update()
    assert 0.04 < float((search.x.detach() - x).abs().max()) <= 0.05 + 1e-12


def test_weights_are_steered_on_every_layer_of_a_model_with_an_adapter() -> None:
    model = cr.load(make_pipeline())
    plain = every_layer(model.network)
    adapter = model.adapt("mine", rank=2)
    assert every_layer(model.network) == plain
    before = cr.steer(model, PROMPTS, score, over="weights", updates=1, steps=STEPS)
    assert before.rewards and list(model.network.peft_config) == ["mine"]
    adapter.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "latnet"}, "over is 'latnet'"),
        ({"over": "prompt@600"}, "over is 'prompt@600'"),
        ({"over": "latent@333"}, "t = 333 is not on the 5-step grid; its neighbors there are 201 and 401"),
        ({"gradient": "sod"}, "unknown gradient 'sod'.*sdo"),
        ({"gradient": "adjoint", "over": "controls"}, "over is 'controls', but the gradient 'adjoint'"),
        ({"gradient": "freedom", "over": "prompt"}, "over is 'prompt'"),
        ({"bound": 0}, "bound is 0"),
        ({"bound": 0.1, "over": "prompt"}, "bound and renormalize are for a latent"),
        ({"keep": 1.0}, "keep is 1.0"),
        ({"lr": -1}, "lr is -1"),
        ({"seeds": [1, 2, 3]}, "2 prompts but 3 seeds"),
        ({"images": ["a.png"] * 3}, "2 prompts but 3 images"),
        ({"images": ["gone.png", "gone.png"]}, "no image 'gone.png'"),
        ({"images": []}, "nothing to steer"),
        ({"bound": 0.1, "renormalize": True}, "cannot both be held"),
        ({"bound": 0.1, "gradient": "freedom"}, "holds no latent"),
        ({"over": "negative", "guidance": 1.0}, "the negative embedding is not used"),
        ({"updatse": 3}, "unknown option 'updatse'.*updates"),
        ({"steps": 2000}, "steps is 2000"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = cr.load(make_pipeline())
    with pytest.raises(cr.UserError, match=message) as caught:
        cr.steer(model, PROMPTS, score, out=tmp_path / "out", **{"steps": STEPS, "updates": 1, **options})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_gradient_for_ddim_refuses_another_solver(tmp_path: Path) -> None:
    model = cr.load(make_pipeline()).solving("lcm")
    for name in ("adjoint", "invertible", "freedom", "universal"):
        with pytest.raises(cr.UserError, match=f"{name}' is for DDIM"):
            cr.steer(model, PROMPTS, score, gradient=name, steps=4)
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    with pytest.raises(cr.UserError, match="pictures enter by DDIM"):
        cr.steer(model, [""], score, images=[tmp_path / "photo.png"], steps=4)
    found = cr.steer(model, PROMPTS, score, steps=4, updates=3, lr=0.05, seeds=SEEDS)
    assert all(b >= a for a, b in zip(found.rewards_before, found.rewards, strict=True))


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"over": "latent"}, {"over": "prompt", "gradient": "full"}, {"gradient": "freedom"}], ids=str)
def test_steering_that_was_interrupted_goes_on_to_the_same_end(options: dict[str, Any], tmp_path: Path) -> None:
    """Two batches; it is interrupted in the second one."""
    model, prompts = cr.load(make_pipeline(dtype=torch.float32)), [*PROMPTS, "a cat"]
    common = {"updates": 3, "batch": 2, "lr": 0.05, "steps": STEPS, "guidance": GUIDANCE, "keep": 0.1, **options}
    last = 1 if options.get("gradient") == "freedom" else 4

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == last:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = cr.steer(model, prompts, score, out=tmp_path / "whole", **common)
    part = cr.steer(model, prompts, score, out=tmp_path / "cut", on_update=interrupt, **common)
    assert len(part.images) in (2, 3) and (tmp_path / "cut" / "stopped.txt").read_text().startswith("interrupted")
    rest = cr.steer(model, prompts, score, out=tmp_path / "cut", resume=True, **common)
    assert (rest.rewards, rest.distances, rest.updates, rest.curve) == (whole.rewards, whole.distances, whole.updates, whole.curve)
    for file in ("images/0000.png", "images/0002.png", "steered.json", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_steering_that_was_killed_goes_on_from_its_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    model, prompts = cr.load(make_pipeline(dtype=torch.float32)), [*PROMPTS, "a cat"]
    common: dict[str, Any] = {"updates": 3, "batch": 2, "lr": 0.05, "steps": STEPS, "guidance": GUIDANCE, "save_every": 2}

    def kill(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    whole = cr.steer(model, prompts, score, out=tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        cr.steer(model, prompts, score, out=tmp_path / "cut", on_update=kill, **common)
    assert [path.name for path in cr.Run(tmp_path / "cut").checkpoints()] == ["step-000002", "step-000004"]
    steps: list[int] = []
    rest = cr.steer(
        model, prompts, score, out=tmp_path / "cut", resume=True, on_update=lambda row: steps.append(row["step"]), **common
    )
    assert steps == [5, 6] and rest.curve == whole.curve
    for file in ("images/0000.png", "images/0002.png", "steered.json", "metrics.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
