"""A training loop of your own, made of the library's parts: a plan, its gradient, and any optimizer. About a minute on a laptop.

The reward is a plain function that says how blue a picture is.
"""

from random import Random

import torch

import chainrule as cr
from chainrule import methods


def blue(images: torch.Tensor, prompts: object) -> torch.Tensor:
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3))


model = cr.load("tiny-emoji")
adapter = model.adapt("blue", rank=4)
optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3)
method, rng, prompts = methods.SDO(), Random(0), cr.prompts("animals:train")

for step in range(20):
    batch = rng.sample(prompts, 4)
    plan = method.plan(model.grid(12), rng)
    result = cr.gradient(model, plan, blue, batch, seeds=range(4 * step, 4 * step + 4))
    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(step, plan, f"reward {result.rewards.mean():.3f}")

model.sample(["a painting of a fox"], seeds=[0])[0].save("blue-fox.png")
print("saved blue-fox.png and", adapter.save("blue"))
