"""Pictures: how they are read, how they are inverted to a latent, what is said of bad ones."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import make_pipeline, pixel_pipeline, score
from steer_loops import STEPS, close, network, problem

import chainrule as cr
from chainrule.plan import walk
from chainrule.steer.images import invert, read_image


def test_inversion_approaches_the_exact_inverse() -> None:
    """A plain loop over the inverted step; and as Euler's method both ways, with twice the steps it misses half."""
    model = cr.load(make_pipeline("v_prediction"))
    given, x = problem(model, steps=10)
    image = given.chain.end(x, walk(given.grid))
    squared, mine = model.pipe.scheduler.alphas_cumprod.double(), image
    call = network(model, given.chain.condition)
    for i in range(len(given.grid) - 2, -1, -1):
        t, last = given.grid[i] - 1, i == len(given.grid) - 2
        before = squared[0] if last else squared[given.grid[i + 1] - 1]  # the sampler ends at alphas_cumprod[0]
        a, s, a2, s2 = squared[t].sqrt(), (1 - squared[t]).sqrt(), before.sqrt(), (1 - before).sqrt()
        mine = (mine - (s2 * a - a2 * s) * call(mine, torch.tensor(t))) / (a2 * a + s2 * s)
    close(invert(given.chain, image, given.grid), mine)
    model, far = cr.load(make_pipeline("v_prediction")), []
    for steps in (25, 50, 100):
        grid = (*(round(951 - 950 * i / steps) for i in range(steps)), 0)
        given, x = problem(replace(model, sampler=replace(model.sampler, levels=lambda steps, grid=grid: grid)))
        image = given.chain.end(x, walk(grid))
        far.append(float((invert(given.chain, image, grid) - x).norm() / x.norm()))
    assert all(0.4 < b / a < 0.65 for a, b in itertools.pairwise(far)), far


def test_pictures_are_turned_flattened_and_cropped(tmp_path: Path) -> None:
    side = Image.new("RGBA", (30, 20), (255, 0, 0, 0))
    side.paste((0, 0, 255, 255), (0, 0, 15, 20))  # blue on the left, transparent on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned by 90 degrees clockwise
    side.save(tmp_path / "side.png", exif=exif)
    seen = read_image(tmp_path / "side.png", (10, 10))
    assert seen.shape == (3, 10, 10)
    torch.testing.assert_close(seen[:, 1, 5], torch.tensor([0.0, 0.0, 1.0]), rtol=0, atol=0.02)  # blue on top
    torch.testing.assert_close(seen[:, 8, 5], torch.ones(3), rtol=0, atol=0.02)  # transparent is white


def test_a_picture_survives_that_its_own_folder_is_overwritten(tmp_path: Path) -> None:
    model, common = cr.load(make_pipeline()), {"steps": STEPS, "guidance": 1.0, "updates": 1}
    cr.steer(model, ["a"], score, out=tmp_path / "out", **common)
    cr.steer(model, [""], score, images=tmp_path / "out" / "best.png", out=tmp_path / "out", overwrite=True, **common)
    with pytest.raises(cr.UserError, match="unknown class"):  # nothing is emptied for a word that is not known
        cr.steer(cr.load(pixel_pipeline(3)), ["0", "cta"], score, batch=1, out=tmp_path / "out", overwrite=True, steps=5)
    assert (tmp_path / "out" / "best.png").is_file()


def test_gray_pictures_of_sixteen_bits_keep_their_light(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 30000, np.uint16)).save(tmp_path / "deep.png")
    torch.testing.assert_close(read_image(tmp_path / "deep.png", (8, 8)), torch.full((3, 8, 8), 30000 / 65535), rtol=0, atol=4e-3)


def test_one_picture_however_it_comes(tmp_path: Path) -> None:
    """A file, Pillow's object turned by EXIF, arrays of bytes and of floats, float TIFFs in [0, 1] and in [0, 255]."""
    gray = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    color = np.repeat(gray[..., None], 3, -1)
    Image.fromarray(gray).save(tmp_path / "plain.png")
    expected = read_image(tmp_path / "plain.png", (8, 8))
    turned = Image.fromarray(np.rot90(gray))
    turned.getexif()[0x0112] = 6  # the camera was held a quarter turn to the side
    for scale in (1, 255):
        Image.fromarray((gray / 255 * scale).astype(np.float32)).save(tmp_path / f"float{scale}.tif")
    given = [
        Image.fromarray(gray), turned, gray, color, gray[..., None], color / 255, np.float32(gray / 255),
        torch.from_numpy(color / 255).movedim(-1, 0),
        tmp_path / "float1.tif", tmp_path / "float255.tif",
    ]  # fmt: skip
    for picture in given:
        torch.testing.assert_close(read_image(picture, (8, 8)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros((3, 8, 8), np.uint8), "must be"), (np.zeros((8, 8, 3), np.int64), "of bytes, or of floats"),
    (np.ones((8, 8)) * 200.0, "floats must be in"),
    (np.full((8, 8), np.nan), "floats must be in"), (np.zeros((0, 8), np.uint8), "must be"),
])  # fmt: skip
def test_an_array_that_is_no_picture(array: np.ndarray, said: str) -> None:
    with pytest.raises(cr.UserError, match=said):
        read_image(array, (8, 8))


def test_bad_pictures_and_rewards_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cr.load(make_pipeline())
    room = importlib.import_module("chainrule.steer.images")  # `chainrule.steer` is the function
    monkeypatch.setattr(room, "LARGEST", 10**6)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 40)).save(tmp_path / "thin.png")
    Image.new("L", (1001, 1000)).save(tmp_path / "huge.png")
    cut = (tmp_path / "huge.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    bad = {"text": "cannot read the image", "thin": "8x8 is the least", "huge": "1001x1000 pixels; make it smaller than 1 mega"}
    for name, message in bad.items():
        with pytest.raises(cr.UserError, match=message):
            cr.steer(model, [""], score, images=[tmp_path / f"{name}.png"], steps=STEPS)
    monkeypatch.setattr(room, "LARGEST", 10**8)
    with pytest.raises(cr.UserError, match="cannot read the image"):
        cr.steer(model, [""], score, images=[tmp_path / "cut.png"], steps=STEPS)
    with pytest.raises(cr.UserError, match="passes no gradient"):
        cr.steer(model, ["a"], lambda images, prompts: images.detach().mean((1, 2, 3)), steps=STEPS, updates=1)
    with pytest.raises(cr.UserError, match="returned"):
        cr.steer(model, ["a"], lambda images, prompts: images.mean((1, 2, 3)) * float("nan"), steps=STEPS, updates=1)


def test_images_that_a_model_made_may_be_steered(tmp_path: Path) -> None:
    """A tensor of them, or one of them, gives what its arrays give."""
    model = cr.load(make_pipeline(dtype=torch.float32))
    made = model.render(["a fox", "a cat"], [0, 1], 2)
    arrays = [image.movedim(0, -1).numpy() for image in made]
    small = {"updates": 1, "sample_steps": 5}
    ours, theirs = (cr.steer(model, ["a fox", "a cat"], "symmetry", images=given, **small) for given in (made, arrays))
    assert ours.rewards == theirs.rewards and ours.rewards_before == theirs.rewards_before
    assert cr.steer(model, "a fox", "symmetry", images=made[0], **small).rewards_before == pytest.approx(ours.rewards_before[:1])
