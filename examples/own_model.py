"""A model of one's own under the same methods: what `cr.Model` asks of it, by a rectified flow that is a few lines long.

    python examples/own_model.py

It learns two colors by flow matching, 32 numbers a picture; then DRaFT-LV trains a LoRA on it towards brighter ones.
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
from chainrule.models.solvers import sampler_of


class Network(nn.Module):
    """The velocity of 3 x 4 x 4 pixels. LoRA goes to layers by name, and these have names that transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v, self.out = nn.Linear(48 + 1, 96), nn.Linear(96, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        seen = torch.cat([x.flatten(1), time[:, None]], 1)
        return self.out(self.to_v(self.to_q(seen).tanh()).tanh()).view_as(x)


@dataclass(frozen=True)
class Denoiser:
    """Asked for a state at a level, 1000 sigma here, and the words of each image, which this one does not read."""

    network: Network

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding) -> Tensor:
        return self.network(x, torch.full((len(x),), level / 1000))


def trained() -> Network:
    """Flow matching: from noise at sigma 1 to pictures that are one dark red or one dark blue."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    colors = torch.tensor([[0.2, -0.8, -0.8], [-0.8, -0.8, 0.2]])
    for _ in range(600):
        clean = colors[torch.randint(2, (128,))][:, :, None, None].expand(-1, 3, 4, 4)
        noise, sigma = torch.randn(128, 3, 4, 4), torch.rand(128)
        mixed = (1 - sigma)[:, None, None, None] * clean + sigma[:, None, None, None] * noise
        loss = (network(mixed, sigma) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)


def model() -> cr.Model:
    """Everything the methods ask for. The scheduler says which levels a run of so many steps has."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    unread = lambda prompts: PromptEmbedding(torch.zeros(len(prompts), 1))
    return cr.Model(
        name="two-colors",
        pipe=SimpleNamespace(scheduler=scheduler),
        denoiser=Denoiser(trained()),
        sampler=sampler_of(scheduler),
        embed=lambda prompts: Condition(unread(prompts), unread(prompts)),
        codec=Pixels(4, 4),
    )


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


if __name__ == "__main__":
    mine = model()
    before = mine.render([""] * 16, range(16), 10, 1.0)
    run = cr.finetune(
        mine, methods.DRaFTLV(), brightness, ["nothing"], out="runs/own-model", steps=40, lr=1e-2, sample_steps=10, guidance=1.0,
        overwrite=True,
    )  # fmt: skip
    after = mine.using(run.adapter).render([""] * 16, range(16), 10, 1.0)
    print(f"brightness {float(before.mean()):.3f} before, {float(after.mean()):.3f} after; the adapter is in {run.adapter}")
