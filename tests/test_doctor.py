"""The doctor: nothing wrong with what is right, and what is wrong is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import CASES, shaken

import chainrule as cr
from chainrule.doctor import Check, environment, examine
from chainrule.meters import saved_bytes, storages
from chainrule.models.codec import KLAutoencoder
from chainrule.rewards import reward_of


def found(model: cr.Model, **options: object) -> dict[str, Check]:
    return {check.name: check for check in examine(model, steps=3, **options)}


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_well(name: str) -> None:
    case = CASES[name]
    seen = found(cr.load(case.pipe(), size=case.size), prompts=["a fox", "two bees"])
    assert seen.pop("prediction").fine is False  # random weights predict worse than nothing
    seen.pop("autoencoder", None)  # or bring no picture back
    assert [check.fine for check in seen.values()] == [None, True, True, True, True, None], [str(check) for check in seen.values()]
    assert set(seen) == {"model", "samples", "reward", "gradient", "reward's slope", "memory"}


BROKEN = {
    "epsilon": lambda pipe: pipe.scheduler.register_to_config(prediction_type="epsilon"),
    "sample": lambda pipe: pipe.scheduler.register_to_config(prediction_type="sample"),
    "a scale of 4": lambda pipe: pipe.vae.register_to_config(scaling_factor=4 * pipe.vae.config.scaling_factor),
    "a scale of 2": lambda pipe: pipe.vae.register_to_config(scaling_factor=2 * pipe.vae.config.scaling_factor),
    "no scale": lambda pipe: pipe.vae.register_to_config(scaling_factor=0.2 * pipe.vae.config.scaling_factor),
    "damaged autoencoder": lambda pipe: [weight.data.mul_(0.5) for weight in pipe.vae.decoder.parameters()],
}


HEAVY = ("a scale of 4", "damaged autoencoder")


@pytest.mark.parametrize("broken", [None, *(pytest.param(k, marks=pytest.mark.heavy) if k in HEAVY else k for k in BROKEN)])
def test_a_model_is_what_its_configuration_says(broken: str | None) -> None:
    """The bundled model predicts the velocity. Its samples equal the plain pipeline's however wrong the configuration is."""
    pipe = cr.load("tiny-emoji").pipe
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    if broken:
        BROKEN[broken](pipe)
    model = cr.load(pipe)
    seen = found(model)
    looked = [seen[name].fine for name in ("autoencoder", "prediction")]
    assert seen["samples"].fine and all(looked) == (broken is None), [str(check) for check in seen.values()]


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_model_of_pixels_is_looked_at_by_its_own_samples(prediction: str) -> None:
    pipe = cr.load("tiny-faces").pipe
    assert found(cr.load(pipe))["prediction"].fine
    own = pipe.scheduler.config.prediction_type
    pipe.scheduler.register_to_config(prediction_type=prediction if prediction != own else "v_prediction")
    assert found(cr.load(pipe))["prediction"].fine is False


@pytest.mark.parametrize("solver", ["ddpm", "euler", "euler-a", "dpm++", "dpm++3m", "lcm", "tcd"])
def test_another_solver_is_compared_with_its_own_scheduler(solver: str) -> None:
    pipe = CASES["sd"].pipe()
    before = pipe.scheduler
    assert found(cr.load(pipe, solver=solver))["samples"].fine and pipe.scheduler is before


class HalfDeaf(KLAutoencoder):
    """An autoencoder whose gradient is half of what it is."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = super().decode(latents)
        return (images + images.detach()) / 2


def test_a_wrong_sampler_a_wrong_gradient_and_classes_are_told() -> None:
    model = cr.load(CASES["sd"].pipe())
    loud = replace(model, sampler=replace(model.sampler, start=1.1))
    assert found(loud)["samples"].fine is False
    deaf = replace(model, codec=HalfDeaf(model.codec.network, model.codec.latent_shape, model.codec.factor))
    assert found(deaf)["gradient"].fine is False
    faces = found(cr.load("tiny-faces"))
    assert faces["samples"].fine is None and "knows no classes" in faces["samples"].found and faces["gradient"].fine


@pytest.mark.parametrize(("reward", "share"), [("half", 2.0), ("opposite", -1.0), ("compressible", None), ("symmetry", 1.0)])
def test_a_reward_whose_gradient_is_not_that_of_its_values_is_told_from_a_chain_that_is_wrong(
    reward: str, share: float | None
) -> None:
    made = {
        "half": lambda images, prompts: (images + images.detach()).mean((1, 2, 3)),
        "opposite": lambda images, prompts: (2 * images.detach() - images).mean((1, 2, 3)),
    }
    seen = found(cr.load(CASES["sd"].pipe()), reward=reward_of(made[reward], reward) if reward in made else reward)
    assert seen["gradient"].fine and seen["reward's slope"].fine is (True if share == 1 else None)
    if share is not None:
        assert float(seen["reward's slope"].found.split()[0]) == pytest.approx(share, abs=0.06)
    assert ("a reward that rounds" in seen["reward's slope"].found) == (share != 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.heavy)])
def test_half_precision_is_held_to_a_wider_bound_and_adapters_are_left_out(dtype: torch.dtype) -> None:
    model = cr.load(CASES["sd"].pipe(dtype=dtype))
    assert found(model)["gradient"].fine
    shaken(cr.load(CASES["sd"].pipe()))
    tuned = cr.load(CASES["sd"].pipe())
    shaken(tuned)
    assert found(tuned)["samples"].fine
    ddpm = cr.load(CASES["ddpm"].pipe(dtype=torch.bfloat16))
    assert "cannot answer in bfloat16" in found(ddpm)["samples"].found


def test_weights_are_not_what_an_image_adds() -> None:
    """A linear layer keeps its weight's transpose for the backward pass: a view of what is there anyway."""
    layer, x = torch.nn.Linear(500, 500), torch.rand(2, 500)
    layer.requires_grad_(False)
    assert saved_bytes(lambda: layer(x.clone().requires_grad_()).square().sum(), storages(torch.device("cpu"))) == 2 * 500 * 4


def test_nothing_is_left_in_the_model() -> None:
    model = cr.load(CASES["sd"].pipe())
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    found(model)
    after = model.network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before) and not model.active


def test_a_torchvision_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("chainrule.doctor.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("chainrule.doctor.importlib.import_module", broken)
    (check,) = [check for check in environment() if check.name == "torchvision"]
    assert check.fine is False and "uninstall it" in check.found


def test_the_command_says_each_thing_in_a_line_and_exits_with_one_when_something_is_wrong(chainrule) -> None:
    fine = chainrule("doctor", "--model", "tiny-faces", "--reward", "classifier:dog", "--steps", "3")
    assert fine.code == 0 and "ok  gradient: slope" in fine.out and "--  packages: torch" in fine.out
    bad = chainrule("doctor", "--model", "tiny-emojy")
    assert bad.code == 2 and "did you mean 'tiny-emoji'" in bad.err
