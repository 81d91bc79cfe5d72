"""Steering without training: the same goal by three gradients, from Python. About two minutes on a laptop.

The goal is a plain function that says how warm a picture is. The latent at t = 600 changes; the weights do not.
"""

import torch

import chainrule as cr


def warm(images: torch.Tensor, prompts: object) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


model = cr.load("tiny-emoji")
prompts = ["a painting of a cat", "two turtles"]
for gradient in ("sdo", "full", "adjoint"):
    found = cr.steer(
        model, prompts, warm, over="latent@600", gradient=gradient, updates=20, lr=0.02, sample_steps=10, keep=0.2, seed=3,
    )  # fmt: skip
    for prompt, before, after, image in zip(found.prompts, found.rewards_before, found.rewards, found.images, strict=True):
        image.save(f"{prompt.replace(' ', '-')}-{gradient}.png")
        print(f"{gradient:8} {prompt:22} {before:.3f} to {after:.3f}")
