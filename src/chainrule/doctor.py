"""Checks the installation, and a loaded model: its samples against its pipeline's, its gradient, the memory it needs.

The tests show the same on small random weights. Here it is checked on the real ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chainrule.errors import UserError
from chainrule.meters import saved_bytes, storages

if TYPE_CHECKING:  # `environment` has to run where these cannot be imported
    from chainrule.models import Model
    from chainrule.rewards import AnyReward, Reward

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
CARDS = (24, 48, 80)  # GB


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, what was found, and whether that is right (None: there is nothing to be right about)."""

    name: str
    found: str
    fine: bool | None = None

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'NO', None: '--'}[self.fine] }  {self.name}: {self.found}"


def environment() -> Iterator[Check]:
    """Check the packages, the device and the cache of downloads. Imports torch, and nothing else that could fail."""
    yield Check("packages", ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield Check("device", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {half}", True)
    else:
        yield Check("device", "mps" if torch.backends.mps.is_available() else f"cpu, {torch.get_num_threads()} threads")
    if importlib.util.find_spec("torchvision"):
        try:
            importlib.import_module("torchvision")
            yield Check("torchvision", f"{metadata.version('torchvision')}, not needed", True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            fix = "it stops transformers and peft; uninstall it, or install the one made for this torch"
            yield Check("torchvision", f"does not fit torch ({reason}): {fix}", False)
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, offline = shutil.disk_usage(place).free / 2**30, os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    yield Check("downloads", f"{'switched off by HF_HUB_OFFLINE' if offline else f'go to {cache}'}, {free:.0f} GiB free there")


def examine(
    model: Model, reward: AnyReward | None = None, prompts: Sequence[str] = (), steps: int = 4, pictures: Sequence[Tensor] = (),
) -> Iterator[Check]:  # fmt: skip
    """Check a loaded model: its samples against the plain pipeline's, what it makes of pictures, its gradient, its memory.

    `reward` is probed and differentiated; the default is the images' mean brightness. The chain has `steps` calls. `pictures`,
    (3, height, width) in [0, 1] each, are what its autoencoder and its prediction are tried on; the default are drawings.
    Active adapters are switched off. Yields each `Check` as soon as it is known. Raises UserError for a reward without a gradient.
    """
    from chainrule.rewards import as_reward, probe, reward_of

    model, prompts = replace(model, active={}), prompts or model.defaults.labels[:1] or ("a photo of a cat",)
    exact = next(model.network.parameters()).dtype in (torch.float32, torch.float64)
    yield Check("model", f"{model.family}, {model.size[0]}x{model.size[1]} pixels, {model.sampler.name}, {_sizes(model)}")
    yield _samples(model, prompts, steps, 2e-4 if exact else 0.1)
    yield from _seen(model, pictures)
    chosen = (as_reward(reward) if reward else reward_of(_brightness, "brightness")).to(model.device)
    values = ", ".join(f"{value:.4g}" for value in probe(chosen, model.size, model.device).tolist())
    yield Check("reward", f"{chosen.name}: {values} on two images of noise, its gradient reaches the pixels", True)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    yield from _gradient(model, chosen, prompts, steps, exact)
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device) / 2**30
        yield Check("peak", f"{peak:.2f} GiB allocated while {len(prompts)} image(s) were differentiated through {steps} calls")
    yield _memory(model, chosen, prompts)


def _brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def _sizes(model: Model) -> str:
    sizes = {
        name: sum(w.numel() * w.element_size() for w in component.parameters()) / 2**30
        for name, component in model.pipe.components.items()
        if isinstance(component, torch.nn.Module)
    }
    return ", ".join(f"{name} {size:.2g} GiB" for name, size in sizes.items())


def _samples(model: Model, prompts: Sequence[str], steps: int, allowed: float) -> Check:
    from chainrule.models.compared import pipeline_images

    seeds, guidance = list(range(len(prompts))), model.defaults.guidance
    try:
        theirs = pipeline_images(model, prompts, seeds, steps, guidance)
    except UserError as error:
        return Check("samples", str(error))
    apart = float((model.render(prompts, seeds, steps, guidance) - theirs).abs().max())
    found = f"{apart:.2g} apart at most from the plain {model.family}'s, of 1 (allowed: {allowed:g})"
    return Check("samples", found, apart <= allowed)


def _seen(model: Model, pictures: Sequence[Tensor]) -> Iterator[Check]:
    """What the model makes of pictures."""
    from chainrule.looked import MOST_LOSS, drawn, latents, prediction_losses

    prompts = [(*model.defaults.labels, "")[0]] * len(pictures)
    images, prompts = (torch.stack(list(pictures)), prompts) if pictures else drawn(model)
    if model.codec.network is not None:
        seen = latents(model, images)
        yield Check("autoencoder", str(seen), seen.fine)
    losses = prediction_losses(model, images, prompts)
    said = ", ".join(f"{loss:.2f} at {level:g}" for level, loss in losses.items())
    wrong = "; is it trained, and is its prediction type what the scheduler's configuration says?"
    fine = max(losses.values()) < MOST_LOSS
    yield Check("prediction", f"loss {said}, where predicting nothing has 1{'' if fine else wrong}", fine)


def _gradient(model: Model, reward: Reward, prompts: Sequence[str], steps: int, exact: bool) -> Iterator[Check]:
    """Slopes along the reward's own gradient at a fresh adapter, against central differences: the chain's, and the reward's.

    The chain's is that of the images along what the reward's gradient is at them, so that it says the same of every reward.
    """
    from chainrule.adapters import unused_name
    from chainrule.gradient import backpropagate
    from chainrule.methods import DRaFT

    seeds = list(range(len(prompts)))
    adapter = model.adapt(unused_name(model.network, "doctor"), rank=2)
    try:
        plan = DRaFT().plan(model.grid(steps), Random(0))
        chain = model.chain(prompts, seeds)
        made = lambda: model.codec.decode(chain.end(model.noise(seeds), plan.branches[0]))
        pixels = backpropagate(chain, plan, model.noise(seeds), model.codec.decode, reward, prompts).images.requires_grad_()
        (upstream,) = torch.autograd.grad(reward(pixels, prompts).mean(), pixels)
        reached = [(weight, weight.grad) for weight in adapter.parameters() if weight.grad is not None]
        weights, slopes = [weight for weight, _ in reached], [-grad.clone() for _, grad in reached]  # of the reward, not the loss
        size = float(sum((s**2).sum() for s in slopes)) ** 0.5
        if not size:
            yield Check("gradient", "zero at the adapter's weights", False)
            return
        step = 1e-2 if exact else 3e-2  # wider for rounded images, but a large network's reward bends soon
        up, down = (_moved(weights, slopes, sign * step / size, made) for sign in (1, -1))
    finally:
        model.drop(adapter)
    # In half precision the gradient is noisy: its norm counts the noise, the difference along it does not.
    allowed = 0.05 if exact else 0.5
    measured = float((upstream.float() * (up.float() - down.float())).sum()) / (2 * step)
    found = f"slope {size:.4g}, by finite differences {measured:.4g} over {steps} calls (allowed: {allowed:.0%} apart)"
    yield Check("gradient", found, abs(measured - size) / size < allowed)
    with torch.no_grad():
        low, high = (float(reward(images, prompts).mean()) for images in (down, up))
    share = (high - low) / (2 * step * size)
    own = abs(share - 1) < allowed
    why = "" if own else ": a reward that rounds (JPEG, pictures made smaller) climbs in steps; any other's gradient is wrong"
    yield Check("reward's slope", f"{share:.2f} of what its gradient says{why}", own or None)


@torch.no_grad()
def _moved(weights: Sequence[Tensor], slopes: Sequence[Tensor], by: float, made: Callable[[], Tensor]) -> Tensor:
    """What is made with `by` times the slopes added to the weights, which are put back."""
    for weight, slope in zip(weights, slopes, strict=True):
        weight += by * slope
    found = made()
    for weight, slope in zip(weights, slopes, strict=True):
        weight -= by * slope
    return found


def _memory(model: Model, reward: Reward, prompts: Sequence[str]) -> Check:
    """The memory one image adds to what is there: the graph of a call with its guidance, and of decoding and scoring."""
    from chainrule.adapters import unused_name
    from chainrule.shards import is_sharded

    if is_sharded(model.network):  # a call's graph seems to hold blocks that are let go
        return Check("memory", "not measured of a network in shards; chainrule plan --network shard --shards N counts it")
    adapter = model.adapt(unused_name(model.network, "doctor"), rank=8)
    try:
        member, condition = model.cast()["base"], model.embed([prompts[0]])
        x, level = model.noise([0]), model.grid(2)[0]
        there = storages(model.device)
        call = saved_bytes(lambda: member(x.clone().requires_grad_(), level, condition), there)
        image = saved_bytes(lambda: reward(model.codec.decode(x.clone().requires_grad_()), [prompts[0]]), there)
        fixed = sum(there.values()) + sum(weight.numel() for weight in adapter.parameters()) * 12  # gradient, two moments
    finally:
        model.drop(adapter)
    fits = {size: int((0.9 * size * 1e9 - fixed - image) // max(call, 1)) for size in CARDS}
    room = ", ".join(f"{max(count, 0)} in {size} GB" for size, count in fits.items())
    found = f"weights and adapter {fixed / 2**30:.2f} GiB, a call's graph {call / 2**20:.0f} MiB an image, decoding and scoring"
    return Check("memory", f"{found} {image / 2**20:.0f} MiB a micro-batch of one; images at a time by that: {room} (a forecast)")
