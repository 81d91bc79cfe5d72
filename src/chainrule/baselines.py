"""What needs no training: the best of n images, and the best of some templates for prompts (arXiv:2309.17400, A.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from chainrule.asked import numbers, pairs, texts
from chainrule.errors import UserError
from chainrule.evaluate import Renderer, Table, evaluate
from chainrule.files import write_text
from chainrule.guidance import AnyGuidance
from chainrule.models import Model
from chainrule.pictures import pictures
from chainrule.processes import ALONE, Processes
from chainrule.prompts import TEMPLATES, fill
from chainrule.rewards import AnyReward, Reward, as_reward, checked


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best of several images: it, (3, h, w) in [0, 1], the seed that makes it, and its reward."""

    image: Tensor
    seed: int
    reward: float

    @property
    def picture(self) -> Image.Image:
        """The image as PIL has it."""
        return pictures(self.image[None])[0]


@dataclass(frozen=True, slots=True)
class BestOf:
    """A model of whose `n` images of a prompt the one with the highest reward is taken.

    The images of seed s are those of the seeds s n, s n + 1, ..., s n + n - 1, so that no two seeds share one.
    """

    model: Model
    reward: Reward
    n: int = 16

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"best of is {self.n}, but must be at least 1")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.device

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
    ) -> Tensor:  # fmt: skip
        """The best image of each prompt and seed, (b, 3, h, w) in [0, 1] on the CPU."""
        best = self.best(prompts, seeds, steps, guidance, batch, on_call, processes)
        return torch.stack([each.image for each in best])

    @torch.no_grad()
    def best(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
    ) -> list[Chosen]:  # fmt: skip
        """The best image of each prompt and seed. Each of several `processes` makes a share and returns all."""
        prompts, seeds = pairs(prompts, seeds)
        self.reward.to(self.device)
        found = []
        for prompt, seed in zip(processes.share(prompts), processes.share(seeds), strict=True):
            tried = numbers([seed * self.n + k for k in range(self.n)])
            images = self.model.render([prompt] * self.n, tried, steps, guidance, batch, on_call)
            parts = images.split(batch)
            scores = torch.cat([checked(self.reward, some.to(self.device), [prompt] * len(some)).cpu() for some in parts])
            at = int(scores.argmax())
            found.append(Chosen(images[at], tried[at], float(scores[at])))
        return processes.gather(found)


@dataclass(frozen=True, slots=True)
class Templated:
    """A model that is given prompts in a template with {} for the prompt, while rewards read the prompts themselves."""

    model: Renderer
    template: str

    def __post_init__(self) -> None:
        check_templates([self.template])

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.device

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
    ) -> Tensor:  # fmt: skip
        """The images of the prompts in the template, (b, 3, h, w) in [0, 1] on the CPU."""
        return self.model.render(
            [fill(self.template, prompt) for prompt in prompts], seeds, steps, guidance, batch, on_call, processes
        )  # fmt: skip


def check_templates(templates: Sequence[str]) -> list[str]:
    """Raises UserError for no template, for one without {}, and for one that is given twice."""
    found = texts(templates)
    if not found:
        raise UserError("no templates: give at least one, as 'a photo of {}'")
    for template in found:
        if "{}" not in template:
            raise UserError(f"the template {template!r} must say where the prompt goes, as in a photo of {{}}")
        if found.count(template) > 1:
            raise UserError(f"the template {template!r} is given twice")
    return found


@dataclass(frozen=True, slots=True)
class Search:
    """What a search over templates found: the best one, all of them on the prompts they were tried on, and the best on others."""

    best: str
    tried: Table
    tested: Table

    def save(self, path: str | Path) -> Path:
        """Write it as JSON: the best template, the mean of each on the prompts, and of the best and the plain prompts on others."""

        def means(table: Table) -> dict[str, dict[str, float]]:
            return {name: {column: value.mean for column, value in row.items()} for name, row in table.rows.items()}

        told = {"best": self.best, "tried": means(self.tried), "tested": means(self.tested)}
        write_text(path, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        return Path(path)


def search(
    model: Renderer, reward: AnyReward, prompts: str | Sequence[str], test: str | Sequence[str],
    templates: Sequence[str] = TEMPLATES, *, seeds: int | Sequence[int] = range(4), steps: int | None = None,
    guidance: AnyGuidance = None, batch: int = 16, on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
) -> Search:  # fmt: skip
    """Try templates on some prompts, take the one with the highest mean reward, and measure it on test prompts.

    The images' rewards read the prompts without the template. Raises UserError for a template without {}.
    """
    templates, chosen = check_templates(templates), as_reward(reward)

    def measured(models: dict[str, Renderer], on: str | Sequence[str]) -> Table:
        return evaluate(
            models, on, chosen, seeds=seeds, steps=steps, guidance=guidance, batch=batch, on_call=on_call, processes=processes
        )

    tried = measured({template: Templated(model, template) for template in templates}, prompts)
    best = max(templates, key=lambda template: tried.rows[template][chosen.name].mean)
    return Search(best, tried, measured({"prompts as they are": model, best: Templated(model, best)}, test))
