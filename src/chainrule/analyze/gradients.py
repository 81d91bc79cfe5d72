"""Gradients along the chain: their norm against the depth of backpropagation, and their angles.

SDO's Fig. 11a and DRaFT's Fig. 8 (norms), DRaFT's Fig. 25 (the angle between DRaFT-1's and DRaFT-K's gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from PIL import Image
from torch import Tensor

from chainrule.chain import Chain
from chainrule.estimate import Estimate
from chainrule.gradient import backpropagate
from chainrule.guidance import AnyGuidance
from chainrule.methods import DRaFT
from chainrule.models import Model
from chainrule.plan import Grad, Jump, Plan, walk
from chainrule.report.plots import plot
from chainrule.report.tables import markdown
from chainrule.rewards import RewardFunction


@dataclass(frozen=True, slots=True)
class Depths:
    """The gradients of a fresh LoRA at every depth K, as estimates over batches.

    `draft` is the norm of DRaFT-K's gradient. `cosine` is that of its angle to DRaFT-1's. `sdo` is the norm of SDO's gradient
    with its one live call K steps before the end, times the number of calls, which makes it an estimate of the whole.
    """

    draft: dict[int, Estimate]
    cosine: dict[int, Estimate]
    sdo: dict[int, Estimate]

    def __str__(self) -> str:
        columns = ("depth K", "DRaFT-K's norm", "its cosine to DRaFT-1's", "SDO's norm, its call at K")
        return markdown(columns, [(k, self.draft[k], self.cosine[k], self.sdo[k]) for k in self.draft])

    def picture(self) -> Image.Image:
        """A plot of the norms against the depth, on a logarithmic scale."""
        curves = {"DRaFT-K": self.draft, "SDO, its call at K": self.sdo}
        points = {name: [(float(k), e.mean) for k, e in curve.items()] for name, curve in curves.items()}
        return plot(points, "Norm of the gradient against the depth of backpropagation", "depth K", log=True)


def gradients(
    model: Model, prompts: Sequence[str], reward: RewardFunction, *, steps: int = 50, guidance: AnyGuidance = None,
    depths: Sequence[int] = (1, 2, 5, 10, 20, 35, 50), batches: int = 4, batch: int = 4, rank: int = 8,
    on_call: Callable[[], None] = lambda: None,
) -> Depths:  # fmt: skip
    """Measure the gradients of the same batches at every depth, with respect to a LoRA that is removed afterwards.

    `batches` batches of `batch` random prompts each. Depths beyond `steps` are left out, and 1 is always measured.
    """
    model, levels = model.guided(guidance), model.grid(steps)
    depths = sorted({k for k in depths if k <= steps} | {1})
    adapter = model.adapt("measured", rank=rank)
    norms: dict[str, dict[int, list[float]]] = {name: {k: [] for k in depths} for name in ("draft", "cosine", "sdo")}

    def gradient(chain: Chain, plan: Plan, x: Tensor, texts: list[str]) -> Tensor:
        backpropagate(chain, plan, x, model.codec.decode, reward, texts)
        found = [w.grad.flatten() if w.grad is not None else torch.zeros(w.numel(), device=w.device) for w in adapter.parameters()]
        for weight in adapter.parameters():
            weight.grad = None
        return torch.cat(found)

    try:
        for number in range(batches):
            rng = Random(number)
            texts, seeds = [rng.choice(list(prompts)) for _ in range(batch)], [rng.getrandbits(32) for _ in range(batch)]
            chain, x = model.chain(texts, seeds, on_call=on_call), model.noise(seeds)
            first = gradient(chain, DRaFT(1).plan(levels, rng), x, texts)
            for k in depths:
                whole = gradient(chain, DRaFT(k).plan(levels, rng), x, texts)
                norms["draft"][k].append(float(whole.norm()))
                norms["cosine"][k].append(float(torch.cosine_similarity(whole, first, dim=0)))
                path = walk(levels)
                live = tuple(
                    Jump(j.start, j.stop, j.via, Grad.WEIGHTS if i == steps - k else Grad.NONE, j.finish)
                    for i, j in enumerate(path)
                )
                norms["sdo"][k].append(steps * float(gradient(chain, Plan((), (live,)), x, texts).norm()))
    finally:
        model.drop(adapter)
    return Depths(*({k: Estimate.of(values) for k, values in norms[name].items()} for name in ("draft", "cosine", "sdo")))
