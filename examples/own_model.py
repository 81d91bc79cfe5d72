"""A model of your own under the same methods: a rectified flow of a few lines, and all that `cr.Model` asks of it.

    python examples/own_model.py

The network first learns pictures of 8 x 8 pixels in two colors, by flow matching. Then DRaFT-LV trains a LoRA on it that makes
the pictures brighter. This takes a few seconds on a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import chainrule as cr
from chainrule import methods
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.models.codec import Pixels
from chainrule.models.defaults import Defaults
from chainrule.models.solvers import sampler_of


class Network(nn.Module):
    """The velocity of 3 x 8 x 8 pixels. LoRA adapts layers by their names, and `to_q` and `to_v` are names that it looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v, self.out = nn.Linear(192 + 1, 96), nn.Linear(96, 96), nn.Linear(96, 192)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inputs = torch.cat([x.flatten(1), time[:, None]], 1)
        return self.out(self.to_v(self.to_q(inputs).tanh()).tanh()).view_as(x)


@dataclass(frozen=True)
class Denoiser:
    """The network's answer for a state x (b, 3, 8, 8) at a level, which is 1000 sigma here. It does not read the prompts."""

    network: Network

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        return self.network(x, torch.full((len(x),), level / 1000))


def trained() -> Network:
    """A network trained by flow matching: from noise at sigma 1 to pictures that are dark red or dark blue all over."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    colors = torch.tensor([[0.2, -0.8, -0.8], [-0.8, -0.8, 0.2]])
    for _ in range(600):
        clean = colors[torch.randint(2, (128,))][:, :, None, None].expand(-1, 3, 8, 8)
        noise, sigma = torch.randn(128, 3, 8, 8), torch.rand(128)
        mixed = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
        loss = (network(mixed, sigma) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


def model() -> cr.Model:
    """The model that the methods work on. The scheduler says at which levels a chain calls the network."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    no_text = lambda prompts: PromptEmbedding(torch.zeros(len(prompts), 1))
    return cr.Model(
        name="two-colors",
        pipe=SimpleNamespace(scheduler=scheduler),
        denoiser=Denoiser(trained()),
        sampler=sampler_of(scheduler),
        embed=lambda prompts: Condition(no_text(prompts), no_text(prompts)),
        codec=Pixels(8, 8),
        defaults=Defaults(steps=10, guidance=1.0),
    )


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


if __name__ == "__main__":
    mine = model()
    before = mine.render([""] * 16, range(16))
    run = cr.finetune(
        mine, methods.DRaFTLV(), brightness, ["nothing"], out="runs/own-model", updates=40, lr=1e-2, overwrite=True,
    )  # fmt: skip
    after = mine.using(run.adapter).render([""] * 16, range(16))
    print(f"brightness {float(before.mean()):.3f} before, {float(after.mean()):.3f} after; the adapter is in {run.adapter}")
