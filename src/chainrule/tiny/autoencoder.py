"""Stage `vae`: the autoencoder, 128x128x3 to 16x16x4 and back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from chainrule.tiny import scenes
from chainrule.tiny.loop import DEVICE, train


def build() -> AutoencoderKL:
    """A new autoencoder with seeded weights, on the device."""
    # Two normalization groups: more of them wash out flat colors, as only ratios within a group survive.
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=scenes.SIZE,
        mid_block_add_attention=False,
    ).to(DEVICE, memory_format=torch.channels_last)


def pixels(images: list[np.ndarray]) -> Tensor:
    """Images, (128, 128, 3) uint8 each, as a tensor (b, 3, 128, 128) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).to(DEVICE).permute(0, 3, 1, 2)
    return (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def ink(batch: list[scenes.Scene], images: list[np.ndarray]) -> Tensor:
    """Masks (b, 1, 128, 128) of rendered scenes: 1 where a glyph covers the background."""
    masks = [
        np.abs(image / 255 - scenes.backdrop(scene.background)).max(-1) > 0.02 for scene, image in zip(batch, images, strict=True)
    ]
    return torch.from_numpy(np.stack(masks)).to(DEVICE)[:, None].float()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each pair of images, (b,) in dB, for values in [-1, 1]."""
    return -10 * ((a - b).clamp(-2, 2).square().mean((1, 2, 3)) / 4).log10()


def fit(out: Path, steps: int, batch: int = 8) -> AutoencoderKL:
    """Train the autoencoder for `steps` steps with checkpoints in `out`. Returns it frozen."""
    vae = build()
    held = random.Random("held-out renders")
    singles = pixels([scenes.render(scenes.single(held, scenes.pick_name(held))) for _ in range(96)])
    mixed = pixels([scenes.render(scenes.draw(held)) for _ in range(96)])

    def loss(rng: random.Random) -> Tensor:
        drawn = [scenes.draw(rng) for _ in range(batch)]
        images = [scenes.render(scene) for scene in drawn]
        x, weight = pixels(images), 1 + 2 * ink(drawn, images)
        torch.manual_seed(rng.getrandbits(32))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        error = y - x
        edges = sum(error.diff(dim=d).abs().mean() for d in (2, 3))
        fit_term = (weight * (2 * error.square() + 0.3 * error.abs())).mean() + 0.3 * edges
        return fit_term + 1e-3 * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()

    @torch.no_grad()
    def check() -> dict[str, float]:
        row = {}
        for name, x in (("single_db", singles), ("mixed_db", mixed)):
            with torch.autocast(DEVICE.type, torch.bfloat16):
                y = torch.cat([vae.decode(vae.encode(some).latent_dist.mode()).sample for some in x.split(16)])
            row[name] = round(psnr(y.float().clamp(-1, 1), x).mean().item(), 2)
        return row

    train("vae", vae, loss, out, steps=steps, lr=1e-2, flat=0.3, ema=0.99, check=check)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[np.ndarray], batch: int = 32) -> Tensor:
    """Encode images to the posterior's mean and standard deviation, (n, 8, 16, 16) in half precision, unscaled."""
    rows = []
    for start in range(0, len(images), batch):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            posterior = vae.encode(pixels(images[start : start + batch])).latent_dist
        rows.append(torch.cat([posterior.mean, posterior.std], 1).half().cpu())
    return torch.cat(rows)
