"""What needs no training: the best of n images, and the best of some templates for prompts (arXiv:2309.17400, A.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Sequence
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
from chainrule.pictures import Finished, pictures
from chainrule.processes import ALONE, Processes
from chainrule.prompts import TEMPLATES, fill
from chainrule.rewards import AnyReward, Reward, as_reward, checked
from chainrule.shards import is_sharded

NONE = torch.empty(0, 3, 1, 1, dtype=torch.float32)  # no image


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
        on_call: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """The best image of each prompt and seed, (b, 3, h, w) in [0, 1] on the CPU."""
        return torch.stack([each.image for each in self.best(prompts, seeds, steps, guidance, batch, on_call)])

    def best(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None,
    ) -> list[Chosen]:  # fmt: skip
        """The best image of each prompt and seed."""
        prompts, seeds = pairs(prompts, seeds)
        return [self._best(*pair, steps, guidance, batch, on_call) for pair in zip(prompts, seeds, strict=True)]

    def finished(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE, done: Container[int] = (),
    ) -> Iterator[Finished]:  # fmt: skip
        """The best image of each prompt and seed that is not `done`, one at a time, with the seed that it has."""
        prompts, seeds = pairs(prompts, seeds)
        for each in processes.rounds(len(prompts), 1, done):
            made = [
                self._best(prompts[k], seeds[k], steps, guidance, batch, on_call)
                for k in each.along(is_sharded(self.model.network))
            ]
            best = made[: len(each.own)]
            yield Finished(each.own, [one.seed for one in best], torch.stack([one.image for one in best]) if best else NONE)

    @torch.no_grad()
    def _best(
        self, prompt: str, seed: int, steps: int | None, guidance: AnyGuidance, batch: int, on_call: Callable[[], None]
    ) -> Chosen:  # fmt: skip
        """The best one, while never more than a batch of them is held."""
        self.reward.to(self.device)
        tried = numbers([seed * self.n + k for k in range(self.n)])
        best: list[Chosen] = []
        for some in self.model.finished([prompt] * self.n, tried, steps, guidance, batch, on_call):
            scores = checked(self.reward, some.images.to(self.device), [prompt] * len(some.images)).cpu()
            at = int(scores.argmax())
            best.append(Chosen(some.images[at].clone(), some.seeds[at], float(scores[at])))
            best = [best[int(torch.tensor([each.reward for each in best]).argmax())]]
        return best[0]


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
        on_call: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """The images of the prompts in the template, (b, 3, h, w) in [0, 1] on the CPU."""
        return self.model.render([fill(self.template, prompt) for prompt in prompts], seeds, steps, guidance, batch, on_call)


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
