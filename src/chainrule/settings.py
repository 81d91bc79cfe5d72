"""The settings of training, distilling, steering and sampling: every option written down once, checked before anything heavy loads.

Number of steps, one word each: `updates` are optimizer updates, `sample_steps` network calls of a sampling chain,
`student_steps` network calls of a student, `teacher_steps` those of the trajectory it learns from. `steps` is an accepted
second spelling of the one that a class is mostly asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BeforeValidator, Field, field_validator, model_validator

from chainrule.checked import Checked
from chainrule.errors import UserError
from chainrule.named import name_and_options
from chainrule.size import config_size, size_of


def _guidance(value: Any) -> Any:
    """A name stands for the guidance with no options."""
    if isinstance(value, str | Mapping):
        name, options = name_and_options(value, "guidance")
        return {"name": name, **options}
    return value


GuidanceSpec = Annotated[Annotated[float, Field(ge=0, le=100)] | dict[str, Any], BeforeValidator(_guidance)]
"""How guidance is written in settings: a number, or a value of `chainrule.guidance` by its name, with options."""
LEARNABLE = ("adapter", "guidance", "negative")
TIMEOUT = 1800.0  # seconds, torch's own for processes on CPUs
MOST_IMAGES = 10**6
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]
Steps = Annotated[int, Field(ge=1, le=10_000)]  # a model says how many levels it has
Updates = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=4096)]  # wider than most layers
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
Memory = Literal["recompute", "blocks", "keep"]
MEMORY = "what is held for the backward pass; recompute: one network call, blocks: one block of it, keep: all calls"
GUIDANCE = 'scale of classifier-free guidance, or another guidance as "{name: rescaled, scale: 7.5}"'


class Opening(Checked):
    """How a model is opened."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(default="float32", description="type of the base weights")
    device: str | None = Field(
        default=None, exclude=True, description="device: cuda, cuda:1, mps or cpu; default: the GPU if there is one"
    )
    quantize: Literal["int8", "8bit", "4bit"] | None = Field(
        default=None, description="hold the denoiser's base weights in fewer bits, int8 by torchao, 8bit and 4bit by bitsandbytes"
    )
    solver: str | None = Field(
        default=None,
        description="sampler: ddim, ddpm, euler, euler-a, dpm++, dpm++3m, lcm or tcd; default: the pipeline's own scheduler",
    )
    size: int | str | None = Field(
        default=None, description="pixels of the images, 512 for a square or HEIGHTxWIDTH as 768x1024; default: the model's own"
    )

    text_encoders: Literal["cpu", "device"] = Field(
        default="cpu",
        exclude=True,
        description="where text encoders are; cpu: moved to the device layer by layer while they are asked",
    )
    network: Literal["cpu", "device"] = Field(
        default="device",
        exclude=True,
        description="where the network's blocks are; cpu: moved to a small card one by one",
    )
    compile: bool = Field(default=False, exclude=True, description="compile the network: slower to start, then faster")
    prompt_cache: str | None = Field(
        default=None,
        exclude=True,
        description="folder that keeps the embeddings of prompts, for this run and others; default: memory",
    )

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> int | str | None:
        return None if value is None else config_size(size_of(value))


class Sampling(Checked):
    """How images are sampled."""

    sample_steps: Steps | None = Field(default=None, validation_alias=AliasChoices("sample_steps", "steps"),
        description="network calls per image; default: the run's or the model's own",
    )  # fmt: skip
    guidance: GuidanceSpec | None = Field(default=None, description=f"{GUIDANCE}; default: the run's or the model's own")


class Together(Checked):
    """What several processes that do one thing are told."""

    timeout: float = Field(
        default=TIMEOUT, gt=0, le=10**7, exclude=True, description="seconds that a process waits for the others before it ends"
    )


class Distillation(Together):
    """How to distill a few-step student."""

    student_steps: int = Field(
        default=4, ge=2, le=16, validation_alias=AliasChoices("student_steps", "steps"),
        description="network calls the student makes an image with",
    )  # fmt: skip
    updates: Updates = Field(default=1000, description="optimizer updates")
    batch: Images = Field(default=8, description="trajectories of the base model per update")
    starts: Steps = Field(default=12, description="states of each trajectory that the student learns from")
    teacher_steps: Steps = Field(default=20, ge=2, description="network calls of a trajectory; at least twice the student's")
    guidance: GuidanceSpec | None = Field(
        default=None, description="guidance that the student learns, a scale or by name; default: the model's own"
    )
    lr: float = Field(default=1e-3, gt=0, description="AdamW learning rate, falling linearly to 0")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm; a larger gradient is scaled down to it")
    rank: Rank = Field(default=32, description="LoRA rank, on every linear layer and convolution")
    ema: float = Field(default=0.98, ge=0, lt=1, description="decay of the moving average that is saved; 0: no average")
    seed: Seed = Field(default=0, description="seed of the student, the prompts, the noise and the levels")
    save_every: int = Field(default=100, ge=0, description="updates between checkpoints; 0: only at the end")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher_steps < 2 * self.student_steps:
            least = f"must be at least twice the student's {self.student_steps} steps"
            raise ValueError(f"teacher_steps is {self.teacher_steps}, but {least}")
        return self


class Steering(Together):
    """How to steer. Defaults are SDO's for text-guided manipulation (arXiv:2505.07477, section 5.1)."""

    over: str = Field(
        default="latent",
        description="what is optimized: latent (initial noise), latent@600 (at t = 600), prompt, negative, controls or weights",
    )
    gradient: str = Field(
        default="sdo",
        description="gradient: sdo, full, adjoint, invertible or flowgrad; freedom and universal guide a single run instead",
    )
    updates: Updates = Field(default=50, description="optimizer updates; each one samples the image again")
    lr: float = Field(default=0.01, gt=0, description="learning rate")
    optimizer: Literal["adam", "sgd", "momentum"] = Field(default="adam", description="optimizer of the variable")
    keep: float = Field(default=0.0, ge=0, lt=1, description="share of the loss that is the distance to the image before steering")
    bound: float | None = Field(default=None, gt=0, description="largest change of any value of the latent; default: no bound")
    renormalize: bool | None = Field(
        default=None, description="keep the norm of the latent; default: only for invertible, as DOODL does"
    )
    sample_steps: Steps | None = Field(default=None, validation_alias=AliasChoices("sample_steps", "steps"),
        description="network calls of a sampling chain; default: the model's own",
    )  # fmt: skip
    guidance: GuidanceSpec | None = Field(default=None, description=f"{GUIDANCE}; default: the model's own")
    rank: Rank = Field(default=8, description="rank of the LoRA, where weights are optimized")
    strength: float = Field(
        default=0.2,
        gt=0,
        description="strength of freedom, as a share of the sampler's step, or of universal, as a share of the noise",
    )
    patience: int = Field(default=0, ge=0, description="stop after this many updates in which no image got better; 0: never stop")
    batch: Images = Field(default=4, description="images steered at a time, over all processes; changes no image")
    save_every: int = Field(default=10, ge=0, description="updates between checkpoints; 0: only at the end")
    memory: Memory = Field(default="recompute", description=MEMORY)


class Finetuning(Together):
    """How to fine-tune. Defaults are DRaFT's small-scale ones (arXiv:2309.17400, Table 1) where the paper has one."""

    updates: Updates = Field(default=200, validation_alias=AliasChoices("updates", "steps"), description="optimizer updates")
    batch: Images = Field(default=8, description="images per update, over all processes")
    accumulate: int = Field(default=1, ge=1, description="backward passes an update is split into; must divide the batch")
    lr: float = Field(default=4e-4, gt=0, description="AdamW learning rate")
    schedule: Literal["constant", "sqrt"] = Field(
        default="constant", description="how the learning rate changes; sqrt: lr * min(10 / sqrt(update), 1)"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW weight decay, towards the pre-trained weights")
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm; a larger gradient is scaled down to it")
    rank: Rank = Field(default=8, description="LoRA rank")
    learn: str = Field(
        default="adapter",
        description="what is trained: adapter, guidance (a scale per step), negative; with commas between",
    )
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the moving average that is saved; 0: no average")
    balance: Literal["none", "deviation", "gradient"] = Field(
        default="none",
        description="what a sum's rewards are divided by before their weights count: their deviation over first images, or the "
        "norm of their gradient there",
    )
    balance_batches: int = Field(
        default=8, ge=1, le=10_000, description="batches that balance measures, those of the first updates"
    )
    kl: float = Field(default=0.0, ge=0, description="weight of the squared distance to the base model at the last trained call")
    flat: float = Field(
        default=0.0, ge=0, le=1, description="RSA-FT's radius: gradients of nearby worse weights and images, twice the time; 0: off"
    )
    sample_steps: Steps | None = Field(default=None, description="network calls of a sampling chain; default: the model's own")
    guidance: GuidanceSpec | None = Field(default=None, description=f"{GUIDANCE}; default: the model's own")
    memory: Literal["recompute", "blocks", "keep", "auto"] = Field(
        default="recompute", description=f"{MEMORY}, auto: the fastest that fits"
    )
    micro_batch: int | None = Field(
        default=None, ge=1, description="images decoded and scored at a time; default: 8, fewer for large images"
    )
    seed: Seed = Field(default=0, description="seed of the adapter, the plans, the prompts and the noise")
    sample_every: int = Field(default=50, ge=0, description="updates between sample grids; 0: only before and after")
    save_every: int = Field(default=50, ge=0, description="updates between checkpoints; 0: only at the end")
    best: Literal["held_out", "sound", "diversity", "edges", "colors", "brightness", "saturation", "sharpness"] = Field(
        default="held_out",
        description="what the adapter in best/ is the best by; sound: the trained reward while the report raises no alarm",
    )
    patience: int = Field(
        default=0, ge=0, description="stop after this many sample grids without a better one by what best names; 0: never stop"
    )
    stage_steps: list[int] | None = Field(
        default=None, description="updates of a stage of a staged method, given once per stage; default: equal shares"
    )
    plateau: int = Field(
        default=0, ge=0, description="end a stage early after this many updates without a better smoothed reward; 0: never"
    )
    tracker: Literal["none", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"] = (
        Field(default="none", description="where the log goes besides metrics.jsonl")
    )

    @property
    def learned(self) -> tuple[str, ...]:
        """What is trained, by name."""
        return tuple(self.learn.split(","))

    @field_validator("learn", mode="before")
    @classmethod
    def _learn(cls, value: Any) -> Any:
        """In one order, with commas and without spaces; a list stands for the same."""
        names = value if isinstance(value, list | tuple) else [name.strip() for name in str(value).split(",")]
        if not names or not set(names) <= set(LEARNABLE):
            raise ValueError(f"learn is {value!r}, but must be any of {', '.join(LEARNABLE)}, with commas between them")
        return ",".join(name for name in LEARNABLE if name in names)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        lengths = self.stage_steps
        if lengths is not None and not (all(n >= 1 for n in lengths) and sum(lengths) == self.updates):
            raise ValueError(f"stage_steps is {lengths}, but must be numbers of at least 1 that sum to updates, {self.updates}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, but must divide the batch of {self.batch}")
        return self


S = TypeVar("S", bound=Checked)


def chosen(kind: type[S], settings: S | None, options: Mapping[str, Any]) -> S:
    """The settings object a library function was given, or the one its keywords spell. Raises UserError if both are given."""
    if settings is None:
        return kind(**options)
    if options:
        raise UserError(f"settings and the option {next(iter(options))} are both given; put the option into the settings")
    return settings


def merged(base: S, over: S) -> S:
    """These settings, with what was given in `over` in the place of their own."""
    return base.model_copy(update={name: getattr(over, name) for name in over.model_fields_set})


def check_tracker(tracker: str) -> None:
    """Raises UserError for a tracker that is not installed."""
    if tracker != "none" and find_spec(tracker) is None:
        raise UserError(f"the tracker {tracker!r} is not installed; pip install {tracker}")
