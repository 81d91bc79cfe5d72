"""A text-to-image model, as the rest of chainrule sees it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from chainrule import adapters, display
from chainrule.adapters import Active, Adapter, Band
from chainrule.asked import numbers, pairs, texts
from chainrule.cast import Answerer, Cast, Member, networks_of
from chainrule.chain import Chain, Memory
from chainrule.denoise import Condition, Denoiser
from chainrule.errors import UserError
from chainrule.guidance import AnyGuidance, Guidance, of_number, read, specification
from chainrule.learned import GuidanceWeights, Learned
from chainrule.learned import load as load_learned
from chainrule.models import loras, published, shown, solvers, students
from chainrule.models.blocks import recomputed
from chainrule.models.codec import Codec
from chainrule.models.defaults import Defaults
from chainrule.models.embeddings import Folder, Known, ahead
from chainrule.models.finished import PIXELS, finished
from chainrule.models.pipeline import weight_type
from chainrule.models.solvers import Sampler
from chainrule.noise import Noise
from chainrule.pictures import Finished, pictures
from chainrule.plan import Grid, Levels, walk
from chainrule.processes import ALONE, Processes
from chainrule.shards import is_sharded
from chainrule.size import Size, config_size
from chainrule.solve import Solver


@dataclass(slots=True, repr=False)
class Model:
    """A loaded pipeline with everything a chain needs. Made by `chainrule.load`.

    `active` says which adapters answer for this value; `using` makes another value over the same weights.
    """

    name: str
    pipe: Any
    denoiser: Denoiser
    sampler: Sampler
    embed: Callable[[Sequence[str]], Condition]
    codec: Codec
    component: str = "unet"  # what the pipeline calls the network that denoises
    defaults: Defaults = field(default_factory=Defaults)
    active: dict[str, Band] = field(default_factory=dict)
    asked: Guidance | None = None  # what `guided` was given; None: the default scale, as a plain number
    members: Mapping[str, Answerer] = field(default_factory=dict)  # of the cast, besides those that every model has
    learned: Mapping[str, Learned] = field(default_factory=dict)  # what is in its chains besides adapters, by name
    student_name: str | None = None
    quantize: str | None = None  # how its base weights are held, if in fewer bits
    base_adapters: tuple[str, ...] = ()  # the adapters of `using`, as they were named
    prompt_cache: Path | None = None  # the folder of `embedded`; None: in memory

    def __repr__(self) -> str:
        return shown.line(self)

    def _repr_html_(self) -> str:
        """In a notebook."""
        return display.listed(shown.facts(self))

    @property
    def network(self) -> nn.Module:
        """The module that denoises."""
        return self.denoiser.network

    @property
    def size(self) -> Size:
        """Height and width of its images, in pixels."""
        return self.codec.height, self.codec.width

    @property
    def solver(self) -> Solver:
        """How a step is made."""
        return self.sampler.solver

    @property
    def family(self) -> str:
        """The class of its pipeline."""
        return type(self.pipe).__name__

    @property
    def micro_batch(self) -> int:
        """Images that are decoded and scored at a time with a gradient: 8, fewer where they are large."""
        return max(1, min(8, PIXELS // prod(self.size)))

    @property
    def opening(self) -> dict[str, Any]:
        """What `chainrule.load` has to be told to open it like this again."""
        dtype = str(weight_type(self.network)).removeprefix("torch.")
        return {"dtype": dtype, "solver": self.sampler.name, "size": config_size(self.size), "quantize": self.quantize}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Latents are float32 or better, whatever the network computes in."""
        return torch.promote_types(weight_type(self.network), torch.float32)

    def grid(self, steps: int | None = None) -> Grid:
        """Falling levels of a sampling run with this many network calls (default: the model's best), ending at 0."""
        steps = self.defaults.steps if steps is None else steps
        if not 1 <= steps <= self.solver.process.schedule.top:
            raise UserError(f"steps is {steps}, but must be between 1 and {self.solver.process.schedule.top}")
        return self.sampler.levels(steps)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The initial latents of these seeds, (b, c, h, w): image k is the same in any batch."""
        return self.sampler.start * self._noise(seeds).initial().to(self.device, self.dtype)

    def _noise(self, seeds: Sequence[int]) -> Noise:
        return Noise(tuple(numbers(seeds)), self.codec.latent_shape)

    @property
    def guidance(self) -> Guidance:
        """How the base member is guided."""
        return self.asked or of_number(self.denoiser, self.defaults.guidance)

    @property
    def guidance_spec(self) -> float | dict[str, Any] | None:
        """How a config holds the guidance this model was given; None if it was given none."""
        return None if self.asked is None else specification(self.asked)

    def guided(self, guidance: AnyGuidance) -> Model:
        """This model with another guidance: a value of `chainrule.guidance`, one as a config has it, or a number. None: as it is.

        A number is classifier-free guidance, or what the network reads where it reads its guidance. It goes before
        guidance weights that were learned by a run. Raises UserError for a number outside [0, 100] and for an unknown name.
        """
        if guidance is None:
            return self
        learned = {name: part for name, part in self.learned.items() if not (isinstance(part, GuidanceWeights) and part.frozen)}
        return replace(self, active=dict(self.active), asked=read(self.denoiser, guidance), learned=learned)

    def with_member(self, name: str, member: Answerer) -> Model:
        """This model with a member `(x, level, condition) -> answer` that plans call by this name (`Jump(..., via=name)`)."""
        return replace(self, active=dict(self.active), members={**self.members, name: member})

    def learning(self, name: str, part: Learned) -> Model:
        """This model with a learned part in its chains: it answers when sampling, and is trained by `finetune` if not frozen."""
        return replace(self, active=dict(self.active), learned={**self.learned, name: part})

    def cast(self) -> Cast:
        """Who may answer in a plan: `base`, `unguided`, and the members that were added."""
        active = Active(dict(self.active))
        base = Member(self.denoiser, self.guidance, active)
        return {"base": base, "unguided": replace(base, guidance=of_number(self.denoiser, 1.0)), **self.members}

    def chain(
        self, prompts: Sequence[str], seeds: Sequence[int], memory: Memory = Memory.RECOMPUTE,
        on_call: Callable[[], None] = lambda: None,
    ) -> Chain:  # fmt: skip
        """A batch's surroundings: its members, solver, embedded prompts and noise, with the learned parts in their places."""
        prompts, seeds = pairs(prompts, seeds)
        chain = Chain(self.cast(), self.solver, self.embed(prompts), self._noise(seeds), memory, on_call)
        for part in self.learned.values():
            chain = part.into(chain)
        return chain

    def embedded(self, prompts: Sequence[str]) -> Model:
        """This model with the embeddings of these prompts made once, ahead, and kept on the CPU or in its `prompt_cache`.

        Others are made when they come. Only rounding depends on it: an embedding is the same in any company.
        """
        rows = ahead(self.embed, prompts, Folder.of(self.prompt_cache, self.pipe, self.component))
        return replace(self, active=dict(self.active), embed=Known(self.embed, rows, self.network))

    def blockwise(self, memory: Memory) -> AbstractContextManager[None]:
        """Within the block, with `Memory.BLOCKS`, networks keep their blocks' inputs, VAEs their layers', and make the rest again.

        About one block's activations instead of a call's, for one more forward pass. Raises UserError for a network that cannot.
        """
        if memory is not Memory.BLOCKS:
            return nullcontext()
        return recomputed(networks_of(self.cast()), [self.codec.network] if self.codec.network is not None else [])

    def adapt(
        self, name: str = "default", *, rank: int = 8, alpha: float | None = None, seed: int = 0, levels: Levels | None = None,
    ) -> Adapter:  # fmt: skip
        """Add a trainable LoRA and switch it on, for these levels or for all. It is an identity until trained."""
        adapter = adapters.inject(self.network, name, rank=rank, alpha=alpha, seed=seed, component=self.component)
        self.active[name] = Band(spans=levels)
        return adapter

    def drop(self, adapter: Adapter) -> None:
        """Take an adapter out again."""
        self.active.pop(adapter.name, None)
        adapter.remove()

    def using(
        self, source: str | Path | adapters.Weights, *, scale: adapters.Scale = 1.0,
        adapter_steps: tuple[int, int] | None = None, steps: int | None = None,
    ) -> Model:  # fmt: skip
        """This model with a saved adapter (a run, a folder, a file, OWNER/NAME:FILE on the hub) on top, at `scale`.

        Two scales, (0, 1) say, are those at noise and image, linear in the level. What a run learned besides comes along.
        A student of `distill` and a name of `chainrule.models.PUBLISHED` (hyper-sd15-4, tiny-emoji-4, ...) are sampled in their own
        few steps. `adapter_steps=(first, last)` switches it on for those of `steps` sampling steps only, first included, last
        excluded (arXiv:2309.17400, Fig. 26-27). The weights are shared, and go when nothing is left that can switch them on.
        """
        known = students.known(source, self.family)
        model = self
        if known:
            sampler = students.sampler(known, self.solving(known.solver, known.settings).sampler)
            defaults = replace(self.defaults, steps=known.steps, guidance=known.guidance)
            model = replace(self, sampler=sampler, defaults=defaults, asked=None)
        files = {} if isinstance(source, adapters.Weights) else adapters.adapter_files(published.local(source))
        spans = adapters.span_of(model.grid(steps), adapter_steps) if adapter_steps else None
        if spans and any(files.values()):
            raise UserError(f"{source} has adapters with levels of their own; leave adapter_steps out")
        loaded = [(loras.read(file, self.family, getattr(self.network, "config", None)), own) for file, own in files.items()]
        active = dict(self.active)
        for weights, own in [(source, None)] if isinstance(source, adapters.Weights) else loaded:
            name = adapters.unused_name(self.network, "loaded")
            lease = adapters.lease(self.network, name, weights)
            active[name] = Band(scale, own or spans, lease, known.scale if known else 1.0)
        learned = {} if isinstance(source, adapters.Weights) else load_learned(adapters.learned_folders(source))
        whole = scale == 1 and not adapter_steps and not isinstance(source, adapters.Weights)
        name = str(source) if whole else adapters.InPart(source)
        return replace(model, active=active, learned={**self.learned, **learned}, base_adapters=(*self.base_adapters, name))

    def with_student(self, source: str | Path | None = None) -> Model:
        """This model with a few-step student beside it, frozen and without guidance, for methods that jump (ShortFT).

        `source` is a LoRA for this model (a folder of `distill`, a file, or OWNER/NAME:FILE on the hub), or the folder or hub id
        of a network of its own; by default the student that ships with a bundled model. Raises UserError when it does not fit.
        """
        student = students.load(
            source, base=self.name, pipe=self.pipe, denoiser=self.denoiser, guidance=self.defaults.guidance,
            prediction=self.solver.process.prediction.value,
        )  # fmt: skip
        return replace(self.with_member("student", student), student_name="its own" if source is None else str(source))

    def solving(self, solver: str | None, settings: Mapping[str, object] | None = None) -> Model:
        """This model sampled by another solver of `chainrule.models.solvers.SOLVERS`, over the levels of diffusers' scheduler.

        `settings` change the scheduler's configuration, {"timestep_spacing": "trailing"} say.
        """
        sampler = solvers.sampler_of(self.pipe.scheduler, solver, self.sampler.spacing, settings)
        return replace(self, active=dict(self.active), sampler=sampler)

    def states(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None,
        guidance: AnyGuidance = None, on_call: Callable[[], None] = lambda: None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The latents after every step of one batch, (b, c, h, w) each; the last one is the finished image's."""
        chain, levels = self.guided(guidance).chain(prompts, seeds, on_call=on_call), self.grid(steps)
        self.check_bands(levels)
        yield from chain.states(self.noise(seeds), walk(levels))

    def check_bands(self, levels: Grid) -> None:
        """Raises UserError for an adapter by levels that would be on in no call of this grid."""
        adapters.check_calls(self.active, levels[:-1])

    def finished(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None, batch: int = 16,
        on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE, done: Container[int] = (),
    ) -> Iterator[Finished]:  # fmt: skip
        """Images as they are made, a batch at a time. Image k depends neither on its batch nor on the number of processes.

        Each of several `processes` makes its share, its last batch perhaps empty. A batch is left out if all of it is `done`.
        """
        states = partial(self.states, steps=steps, guidance=guidance, on_call=on_call)
        return finished(states, self.codec, prompts, seeds, batch, processes, done, is_sharded(self.network))

    def render(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: int | None = None, guidance: AnyGuidance = None,
        batch: int = 16, on_call: Callable[[], None] = lambda: None, processes: Processes = ALONE,
    ) -> Tensor:  # fmt: skip
        """The `finished` images all together, (n, 3, h, w) in [0, 1] on the CPU, on every process."""
        made = self.finished(prompts, seeds, steps, guidance, batch, on_call, processes)
        return torch.cat(processes.gather([some.images for some in made]))

    def sample(
        self, prompts: str | Sequence[str], seeds: int | Sequence[int] | None = None, steps: int | None = None,
        guidance: AnyGuidance = None, batch: int = 16, on_call: Callable[[], None] = lambda: None,
        processes: Processes = ALONE,
    ) -> list[Image.Image]:  # fmt: skip
        """A PIL image per prompt; seeds default to 0, 1, 2, ... Each of several `processes` makes a share and returns all."""
        prompts = texts(prompts)
        if not prompts:
            raise UserError("no prompts: give at least one")
        prompts, seeds = pairs(prompts, range(len(prompts)) if seeds is None else seeds)
        return pictures(self.render(prompts, seeds, steps, guidance, batch, on_call, processes))
