"""Images that are not square, higher than wide and wider than high: what every learned reward's network is shown, against the
official preprocessing by Pillow and transformers' processors; and every family trained, sampled, steered, scored and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from families import CASES, PROMPTS, SEEDS, TALL, images_of, pixels
from PIL import Image
from reward_models import ALL, SIZE, pictures, pil, random_images
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import chainrule as cr
from chainrule.report.pictures import cells
from chainrule.rewards.clip import MEAN, STD
from chainrule.rewards.siglip import HALF

SHAPES = [(86, 64), (64, 86), (72, 50), (30, 77)]  # an odd margin that is rounded up by some, and one that is not; a strip

Look = Callable[[Image.Image, Path], Any]


def normalized(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def shortest(picture: Image.Image) -> Image.Image:
    """torchvision's Resize of a number: the shortest side is it, the other int(number * longest / shortest)."""
    longer = int(SIZE * max(picture.size) / min(picture.size))
    size = (SIZE, longer) if picture.width <= picture.height else (longer, SIZE)
    return picture.resize(size, Image.Resampling.BICUBIC)


def torchvision(picture: Image.Image, root: Path) -> Tensor:
    """OpenAI's clip and ImageReward: Resize and CenterCrop, whose margin is half, rounded to the even number."""
    small = shortest(picture)
    left, top = round((small.width - SIZE) / 2.0), round((small.height - SIZE) / 2.0)
    return normalized(small.crop((left, top, left + SIZE, top + SIZE)))


def open_clip(picture: Image.Image, root: Path) -> Tensor:
    """open_clip's ResizeMaxSize, as HPSv2 has it: the longest side, each side rounded, centered on black."""
    scale = SIZE / float(max(picture.size))
    size = round(picture.width * scale), round(picture.height * scale)
    square = Image.new("RGB", (SIZE, SIZE))
    square.paste(picture.resize(size, Image.Resampling.BICUBIC), ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return normalized(square)


def processor(name: str, **settings: Any) -> Look:
    return lambda picture, root: pil(name)(**settings)(images=picture, return_tensors="pt")["pixel_values"][0]


def own(folder: str, name: str) -> Look:
    """By the settings beside the model."""
    return lambda picture, root: pil(name).from_pretrained(root / folder)(images=picture, return_tensors="pt")["pixel_values"][0]


SQUARE = {"height": SIZE, "width": SIZE}
CLIP = processor("CLIPImageProcessor", size={"shortest_edge": SIZE}, crop_size=SQUARE)
OFFICIAL: dict[str, Look] = {
    "clip": CLIP, "pickscore": CLIP, "target": CLIP, "on": CLIP, "concepts": CLIP, "style": CLIP, "perceptual": CLIP,
    "directional": CLIP, "aesthetic": torchvision, "dropout": torchvision, "imagereward": torchvision,
    "hpsv2": open_clip, "hpsv2.1": open_clip,
    "siglip": processor("SiglipImageProcessor", size=SQUARE, image_mean=HALF, image_std=HALF),
    "detect": processor("OwlViTImageProcessor", size=SQUARE), "area": processor("Owlv2ImageProcessor", size=SQUARE),
    "safe": own("nsfw", "ViTImageProcessor"), "classifier": own("classifier", "ConvNextImageProcessor"),
    "identity": own("dino", "BitImageProcessor"),
}  # fmt: skip


@contextmanager
def first_pixels() -> Iterator[list[Tensor]]:
    """What the first convolution of every network is shown."""
    seen: list[Tensor] = []

    def look(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Conv2d) and given[0].shape[1] == 3:
            seen.append(given[0].detach())

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def test_every_learned_reward_is_in_the_list() -> None:
    """But for HPSv3, whose first layer reads patches: test_hpsv3.py has its pixels."""
    assert set(ALL) - set(OFFICIAL) - {"hpsv3"} == {"symmetry", "rotation", "compressible", "incompressible", "function", "sum"}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OFFICIAL)
def test_a_network_is_shown_what_its_official_preprocessing_shows(
    name: str, shape: tuple[int, int], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if int(transformers.__version__.split(".")[0]) > 4:  # its OWLv2 pads with black, the model's authors with gray
        pad = pil("Owlv2ImageProcessor").pad
        monkeypatch.setattr(pil("Owlv2ImageProcessor"), "pad", lambda self, image: pad(self, image, constant_value=0.5))
    images = random_images(*shape, noise=0.1)
    reward = ALL[name](models).with_reference(random_images(*shape, seed=1))
    with first_pixels() as seen, torch.no_grad():
        reward(images, ["a fox"])
    official = torch.as_tensor(np.asarray(OFFICIAL[name](pictures(images)[0], models)))
    apart = [float((each[0] - official).abs().mean()) for each in seen if each.shape[1:] == official.shape]
    assert apart and min(apart) < 0.02, apart


WIDE = {name: replace(case, size=(16, 24)) for name, case in CASES.items() if case.texts} | {
    "ddim": replace(CASES["ddim"], make=lambda: pixels(diffusers.DDIMPipeline, (16, 24)))
}
QUICK = ("sd-wide", "sdxl-tall", "flux-wide", "pixart-alpha-tall", "ddim-wide")
BOTH = {f"{name}-{shape}": case for shape, cases in (("tall", TALL), ("wide", WIDE)) for name, case in cases.items()}


def bright(images: Tensor, prompts: object) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.heavy) for n in BOTH])
def test_a_family_is_trained_sampled_scored_steered_and_shown(name: str, tmp_path: Path) -> None:
    """What was trained gives in the plain pipeline, told this height and width, the images it gives here."""
    case = BOTH[name]
    case.pipe().save_pretrained(tmp_path / "model")
    size, guidance = (24, 16) if name.endswith("tall") else (16, 24), case.guidances[-1]
    model = cr.load(tmp_path / "model", size=size if case.texts else None)
    small: dict[str, Any] = {"updates": 2, "batch": 2, "sample_steps": 4, "rank": 2, "guidance": guidance, "lr": 0.05}
    run = cr.finetune(model, "draft-lv", bright, PROMPTS, out=tmp_path / "run", **small)
    said = PROMPTS if case.texts else ["", ""]
    tuned = model.using(run.folder)
    ours = tuned.render(said, SEEDS, 4, guidance)
    assert ours.shape == (2, 3, *size) and not torch.allclose(ours, model.render(said, SEEDS, 4, guidance), atol=1e-3)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    if hasattr(plain, "load_lora_weights"):
        plain.load_lora_weights(run.adapter, weight_name="pytorch_lora_weights.safetensors")
    else:
        cr.attach(plain, run.folder)
    theirs = images_of(case.run(plain, PROMPTS, SEEDS, guidance, 4, output_type="np"))
    np.testing.assert_allclose(theirs, ours.permute(0, 2, 3, 1).numpy(), atol=2e-5)

    table = cr.evaluate(
        {"base": model, "tuned": tuned}, PROMPTS, [bright, "incompressible"], seeds=[0, 1], steps=4, guidance=guidance
    )
    assert table.rows["base"] != table.rows["tuned"] and len(table.images) == 8
    found = cr.steer(model, said, bright, updates=2, steps=4, guidance=guidance, lr=0.05, out=tmp_path / "steered")
    assert [image.size for image in (*found.images, *found.before)] == [size[::-1]] * 4
    for folder in (run.folder, tmp_path / "steered"):
        assert "data:image" in cr.report(folder).read_text()
    with Image.open(run.samples / "after.png") as sheet:
        shown = cells(sheet, [Image.new("RGB", size[::-1])] * 2, 4, captioned=True)
    factor = shown[0].width // size[1]
    assert [cell.size for cell in shown] == [(size[1] * factor, size[0] * factor)] * 2
    for cell, image in zip(shown, tuned.sample(PROMPTS if case.texts else said, range(2), 4, guidance), strict=True):
        small_again = np.asarray(cell.resize(size[::-1], Image.Resampling.NEAREST)).astype(int)
        assert np.abs(small_again - np.asarray(image)).max() <= 1
