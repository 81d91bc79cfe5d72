"""Stages `faces` and `classifier`: a class-conditional denoiser of pixels, and a classifier to steer it by.

Both know the emoji faces and animals, one to an image, 64x64. Half of the images are faces.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from transformers import ConvNextConfig, ConvNextForImageClassification

from chainrule.tiny import scenes
from chainrule.tiny.autoencoder import pixels
from chainrule.tiny.loop import DEVICE, train

SIDE = 64
LABELS = (*scenes.FACES, *scenes.ANIMALS)
NOTHING = len(LABELS)  # the class that stands for no class, for guidance
PREVIEW = (
    "smiling face", "angry face", "crying face", "cool face", "silly face", "loving face",
    "cat", "fox", "turtle", "bee", "lion", "fish",
)  # fmt: skip


def scheduler() -> DDIMScheduler:
    """DDPM's linear betas (arXiv:2006.11239) and velocity prediction; the last step lands on the finished image."""
    return DDIMScheduler(clip_sample=False, prediction_type="v_prediction")


def build() -> UNet2DModel:
    """A new class-conditional denoiser of pixels with seeded weights, on the device."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE, block_out_channels=(32, 48, 64, 96), norm_num_groups=8, layers_per_block=1, attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        num_class_embeds=NOTHING + 1,
    ).to(DEVICE)  # fmt: skip


def draw(rng: random.Random) -> tuple[np.ndarray, int]:
    """Draw one large glyph near the center of a named background. Returns (128, 128, 3) uint8 and its class."""
    name = rng.choice(list(scenes.FACES if rng.random() < 0.5 else scenes.ANIMALS))
    return scenes.render(scenes.single(rng, name)), LABELS.index(name)


def batch_of(rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """A batch of random images, (count, 3, 64, 64) in [-1, 1], and their classes, (count,)."""
    images, labels = zip(*(draw(rng) for _ in range(count)), strict=True)
    return F.avg_pool2d(pixels(list(images)), scenes.SIZE // SIDE), torch.tensor(labels, device=DEVICE)


def fit(out: Path, steps: int, batch: int = 32) -> UNet2DModel:
    """Train the denoiser for `steps` steps with checkpoints in `out`. Returns it frozen."""
    unet = build()
    cumulative = scheduler().alphas_cumprod.to(DEVICE)

    def loss(rng: random.Random) -> Tensor:
        torch.manual_seed(rng.getrandbits(32))
        x0, labels = batch_of(rng, batch)
        labels = torch.where(torch.rand(batch, device=DEVICE) < 0.1, NOTHING, labels)
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        a2 = cumulative[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x, target = a2.sqrt() * x0 + (1 - a2).sqrt() * noise, a2.sqrt() * noise - (1 - a2).sqrt() * x0
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = unet(x, t, class_labels=labels).sample
        # Plain velocity loss where noise dominates, capped where signal does, as in generator.py.
        weight = (6 * (1 - a2)).clamp(max=1)
        return (weight * (predicted.float() - target).square()).mean()

    def check() -> dict[str, float]:
        unet.eval()
        grid = Image.new("RGB", (6 * SIDE, 2 * SIDE))
        for i, array in enumerate(sample(unet, list(PREVIEW), 0)):
            grid.paste(Image.fromarray(array), (i % 6 * SIDE, i // 6 * SIDE))
        grid.resize((12 * SIDE, 4 * SIDE)).save(out / "faces.png")
        unet.train()
        return {}

    train("faces", unet, loss, out, steps=steps, lr=0.01, every=200, check=check)
    return unet.eval().requires_grad_(False)


@torch.no_grad()
def sample(unet: UNet2DModel, names: list[str], seed: int, steps: int = 50) -> np.ndarray:
    """Sample an image of each name by DDIM, (n, 64, 64, 3) uint8; image k is of seed + k."""
    ddim = scheduler()
    ddim.set_timesteps(steps)
    noise = [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(names))]
    x, labels = torch.stack(noise).to(DEVICE), torch.tensor([LABELS.index(name) for name in names], device=DEVICE)
    for t in ddim.timesteps:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            answer = unet(x, t, class_labels=labels).sample
        x = ddim.step(answer.float(), t, x).prev_sample
    return ((x.clamp(-1, 1) / 2 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def measure(unet: UNet2DModel, network: ConvNextForImageClassification) -> dict[str, float]:
    """The share of samples that the classifier recognizes, of two per class; of faces and of animals."""
    names = [name for name in LABELS for _ in range(2)]
    images = torch.from_numpy(sample(unet, names, 1000)).permute(0, 3, 1, 2).float().to(DEVICE) / 127.5 - 1
    right = network(images).logits.argmax(1).cpu() == torch.tensor([LABELS.index(name) for name in names])
    cut = 2 * len(scenes.FACES)
    return {key: round(group.float().mean().item(), 4) for key, group in (("faces", right[:cut]), ("animals", right[cut:]))}


def pipeline(unet: UNet2DModel) -> DDIMPipeline:
    """The denoiser as a diffusers pipeline."""
    return DDIMPipeline(unet, scheduler())


def build_classifier() -> ConvNextForImageClassification:
    """A new classifier of the 57 classes with seeded weights, on the device."""
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = ConvNextConfig(
        hidden_sizes=[32, 64, 96], depths=[1, 2, 1], num_stages=3, patch_size=4, image_size=SIDE, num_labels=len(LABELS),
        id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    return ConvNextForImageClassification(config).to(DEVICE)


def fit_classifier(out: Path, steps: int, batch: int = 64) -> ConvNextForImageClassification:
    """Train a small ConvNeXt for `steps` steps on the same images with noise. Returns it frozen."""
    network = build_classifier()
    held = batch_of(random.Random("held-out classifier"), 512)

    def loss(rng: random.Random) -> Tensor:
        torch.manual_seed(rng.getrandbits(32))
        x, labels = batch_of(rng, batch)
        x = x + torch.randn_like(x) * torch.rand(batch, 1, 1, 1, device=x.device) * 0.3
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = network(x).logits
        return F.cross_entropy(logits.float(), labels)

    @torch.no_grad()
    def check() -> dict[str, float]:
        network.eval()
        right = (network(held[0]).logits.argmax(1) == held[1]).float().mean()
        network.train()
        return {"top1": round(right.item(), 4)}

    train("classifier", network, loss, out, steps=steps, lr=0.01, every=100, check=check)
    return network.eval().requires_grad_(False)
