"""Stages `clip`, `pick`, `hps`, `aesthetic`: the bundled reward models, in the real ones' own formats."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig

from chainrule.rewards.clip import MEAN, STD
from chainrule.rewards.scorers import aesthetic_head
from chainrule.tiny import preferences, scenes, text
from chainrule.tiny.autoencoder import pixels
from chainrule.tiny.loop import DEVICE, train


def build() -> CLIPModel:
    """A new CLIP with seeded weights, on the device."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        image_size=scenes.SIZE, patch_size=16, projection_dim=128,
    )  # fmt: skip
    reading = text.config(text.tokenizer())
    return CLIPModel(CLIPConfig(text_config=reading.to_dict(), vision_config=vision.to_dict(), projection_dim=128)).to(DEVICE)


def _normalized(images: list[np.ndarray]) -> Tensor:
    x = pixels(images) / 2 + 0.5
    return (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(STD).view(1, 3, 1, 1)


def _embed(model: CLIPModel, images: list[np.ndarray], captions: list[str]) -> tuple[Tensor, Tensor]:
    tokens = text.ids(text.tokenizer(), captions).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(input_ids=tokens, pixel_values=_normalized(images))
    return out.image_embeds.float(), out.text_embeds.float()


def fit_clip(out: Path, steps: int, batch: int = 160) -> CLIPModel:
    """Train the CLIP contrastively; a caption is a positive for every image it is true of. Returns the trained model."""
    model = build()

    def draw(rng: random.Random, count: int) -> tuple[list[scenes.Scene], list[np.ndarray], list[str]]:
        drawn = [scenes.draw(rng) for _ in range(count)]
        images = [preferences.sample(rng, s).image if rng.random() < 0.5 else scenes.render(s) for s in drawn]
        return drawn, images, [s.caption(rng) for s in drawn]

    def loss(rng: random.Random) -> Tensor:
        drawn, images, captions = draw(rng, batch)
        image, texts = _embed(model, images, captions)
        logits = model.logit_scale.exp().clamp(max=100) * image @ texts.T
        true = torch.tensor([[preferences.truth(asked, shown) == 1 for asked in drawn] for shown in drawn], device=DEVICE).float()
        rows, columns = true / true.sum(1, keepdim=True), true / true.sum(0, keepdim=True)
        return -(rows * logits.log_softmax(1)).sum(1).mean() / 2 - (columns * logits.log_softmax(0)).sum(0).mean() / 2

    held = random.Random("held-out clip")
    names = list(scenes.THINGS)
    asked = [f"a picture of {scenes.article(n)}" for n in names]
    shown = [scenes.single(held, name) for name in names for _ in range(3)]

    @torch.no_grad()
    def check() -> dict[str, float]:
        image, texts = _embed(model, [scenes.render(s) for s in shown], asked * 3)
        guess = (image @ texts[: len(names)].T).argmax(1).cpu()
        right = torch.tensor([names.index(s.names[0]) for s in shown])
        return {"top1": round((guess == right).float().mean().item(), 4)}

    train("clip", model, loss, out, steps=steps, lr=0.01, every=100, check=check)
    return model.eval()


def fit_preference(name: str, rule: preferences.Rule, clip: CLIPModel, out: Path, steps: int, batch: int = 64) -> CLIPModel:
    """Train a preference model by the objective of PickScore and HPSv2: a softmax over two candidates' scores.

    It starts from `clip`, and `rule` makes the choices. Returns the trained model.
    """
    model = build()
    model.load_state_dict(clip.state_dict())

    def logits_of(pairs: list[tuple[str, preferences.Sample, preferences.Sample, bool]]) -> Tensor:
        images = [p[1].image for p in pairs] + [p[2].image for p in pairs]
        image, texts = _embed(model, images, [p[0] for p in pairs])
        return model.logit_scale.exp().clamp(max=100) * (image * texts.repeat(2, 1)).sum(1).view(2, -1)

    def loss(rng: random.Random) -> Tensor:
        pairs = [preferences.pair(rng, rule) for _ in range(batch)]
        chosen = torch.tensor([0 if p[3] else 1 for p in pairs], device=DEVICE)
        return F.cross_entropy(logits_of(pairs).T, chosen)

    held_rng = random.Random(f"held-out {name}")
    held = [preferences.pair(held_rng, rule) for _ in range(400)]

    @torch.no_grad()
    def check() -> dict[str, float]:
        first, second = logits_of(held)
        return {"pair_accuracy": round(((first > second).cpu() == torch.tensor([p[3] for p in held])).float().mean().item(), 4)}

    train(name, model, loss, out, steps=steps, lr=0.004, every=100, check=check)
    return model.eval()


def _rated(clip: CLIPModel, rng: random.Random, count: int) -> tuple[Tensor, Tensor]:
    """Normalized CLIP features (count, 128) of random pictures, and noisy ratings of them from 1 to 10."""
    features, ratings = [], []
    for _ in range(count // 128):
        samples = [preferences.sample(rng, scenes.draw(rng)) for _ in range(128)]
        with torch.no_grad():
            features.append(_embed(clip, [s.image for s in samples], ["a picture"] * 128)[0])
        ratings += [4.0 + 2.0 * preferences.AESTHETIC.score(s, 0) + rng.gauss(0, 0.3) for s in samples]
    return torch.cat(features), torch.tensor(ratings, device=DEVICE).clamp(1, 10)


def fit_aesthetic(clip: CLIPModel, out: Path, steps: int, batch: int = 256) -> nn.Sequential:
    """Train the LAION head on normalized CLIP features, regressed on a rating from 1 to 10. Returns the trained head."""
    torch.manual_seed(0)
    head = aesthetic_head(clip.config.projection_dim).to(DEVICE)
    features, ratings = _rated(clip, random.Random("aesthetic"), 16384)
    held_features, held_ratings = _rated(clip, random.Random("held-out aesthetic"), 1024)
    head[-1].bias.data.fill_(float(ratings.mean()))  # type: ignore[operator]

    def loss(rng: random.Random) -> Tensor:
        picked = [rng.randrange(len(features)) for _ in range(batch)]
        return (head(features[picked])[:, 0] - ratings[picked]).square().mean()

    @torch.no_grad()
    def check() -> dict[str, float]:
        head.eval()
        guess = head(held_features)[:, 0]
        head.train()
        return {"correlation": round(torch.corrcoef(torch.stack([guess, held_ratings]))[0, 1].item(), 4)}

    train("aesthetic", head, loss, out, steps=steps, lr=0.005, every=500, check=check)
    return head.eval()


def save(model: CLIPModel, folder: Path) -> None:
    """Write a folder that `CLIPModel.from_pretrained` and `CLIPProcessor` read, with weights in half precision."""
    model.cpu().half().save_pretrained(folder)
    text.save(folder)
    side = {"height": scenes.SIZE, "width": scenes.SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": scenes.SIZE}, crop_size=side).save_pretrained(folder)


def save_head(head: nn.Sequential, folder: Path) -> None:
    """Write the aesthetic head into a folder as `head.safetensors`, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in head.cpu().state_dict().items()}, folder / "head.safetensors")
