"""The settings of a run, of whichever kind: checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from chainrule.errors import UserError, unknown
from chainrule.size import size_of, written


def _made(kind: type[BaseModel], values: Mapping[str, Any]) -> Any:
    """Checked settings. Raises UserError naming the first wrong key and value."""
    for key in values:
        if key not in kind.model_fields:
            raise unknown("option", key, kind.model_fields)
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(said := first.get("ctx", {}).get("error"), UserError):
            raise said from error
        reason = first["msg"].replace("Input should be", "must be")
        raise UserError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}, but {reason}") from error


class Opening(BaseModel):
    """How a model is opened."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="type of the base weights")
    device: str | None = Field(None, description="cuda, cuda:1, mps or cpu; default: the GPU if there is one")
    quantize: Literal["int8", "8bit", "4bit"] | None = Field(
        None, description="hold the denoiser's base weights in fewer bits; int8: by torchao, 8bit and 4bit: by bitsandbytes"
    )
    solver: str | None = Field(
        None, description="how to sample: ddim, ddpm, euler, euler-a, dpm++, lcm or tcd; default: the pipeline's own scheduler"
    )
    size: str | None = Field(
        None, description="pixels of the images: 512, a square, or 768x1024, HEIGHTxWIDTH; default: the model's own"
    )

    @field_validator("size", mode="before")
    @classmethod
    def _size(cls, value: Any) -> str | None:
        return None if value is None else str(written(size_of(value)))

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Opening:
        """Checked settings. Raises UserError naming the first wrong key and value."""
        made: Opening = _made(cls, values)
        return made


class Distillation(BaseModel):
    """How to distill a few-step student."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(4, ge=2, le=16, description="network calls the student makes an image with")
    updates: int = Field(1000, ge=1, description="updates")
    batch: int = Field(8, ge=1, description="trajectories of the base model per update")
    starts: int = Field(12, ge=1, description="states of each trajectory that are learned from")
    teacher_steps: int = Field(20, ge=2, description="network calls of a trajectory; at least two per step of the student")
    guidance: float | None = Field(None, ge=0, le=100, description="guidance that is baked in; default: the model's")
    lr: float = Field(1e-3, gt=0, description="AdamW learning rate, falling linearly to 0")
    clip: float = Field(1.0, gt=0, description="gradient norm is clipped here")
    rank: int = Field(32, ge=1, description="LoRA rank, on every linear layer and convolution")
    ema: float = Field(0.98, ge=0, lt=1, description="decay of the average of the student that is saved; 0: none")
    seed: int = Field(0, ge=0, description="of the student, the prompts, the noise and the levels")
    save_every: int = Field(100, ge=0, description="updates between checkpoints; 0: only at the end")

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Distillation:
        """Checked settings. Raises UserError naming the first wrong key and value."""
        made: Distillation = _made(cls, values)
        if made.teacher_steps < 2 * made.steps:
            raise UserError(f"teacher_steps is {made.teacher_steps}, but must be at least twice the student's {made.steps} steps")
        return made


class Steering(BaseModel):
    """How to steer. Defaults are SDO's for text-guided manipulation (arXiv:2505.07477, section 5.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    over: str = Field(
        "latent", description="what is optimized: latent, latent@600 (the one at t = 600), prompt, negative, controls, weights"
    )
    gradient: str = Field("sdo", description="sdo, full, adjoint, invertible or flowgrad; freedom and universal guide a single run")
    updates: int = Field(50, ge=1, description="updates; every one samples the image again")
    lr: float = Field(0.01, gt=0, description="learning rate")
    optimizer: Literal["adam", "sgd", "momentum"] = Field("adam", description="of the variable")
    keep: float = Field(0.0, ge=0, lt=1, description="share of the loss that is the distance to the image as it was")
    bound: float | None = Field(None, gt=0, description="largest change of any number of the latent; default: none")
    renormalize: bool | None = Field(None, description="hold the latent's norm; default: only for invertible, as DOODL does")
    steps: int | None = Field(None, ge=1, description="network calls of a sampling chain; default: the model's")
    guidance: float | None = Field(None, ge=0, le=100, description="classifier-free guidance; default: the model's")
    rank: int = Field(8, ge=1, description="of the LoRA that is optimized over weights")
    strength: float = Field(0.2, gt=0, description="of freedom and universal, as a share of the sampler's own step or noise")
    patience: int = Field(0, ge=0, description="stop after this many updates in which no image got better; 0: never")
    batch: int = Field(4, ge=1, description="images steered at a time; changes no image")
    memory: Literal["recompute", "blocks", "keep"] = Field(
        "recompute", description="how activations are held; blocks: one block of the network at a time"
    )

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Steering:
        """Checked settings. Raises UserError naming the first wrong key and value."""
        made: Steering = _made(cls, values)
        return made


class Settings(BaseModel):
    """How to fine-tune. Defaults are DRaFT's small-scale ones (arXiv:2309.17400, Table 1) where the paper has one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(200, ge=1, description="updates")
    batch: int = Field(8, ge=1, description="images per update, over all processes")
    accumulate: int = Field(1, ge=1, description="backward passes an update is split into; must divide the batch")
    lr: float = Field(4e-4, gt=0, description="AdamW learning rate")
    schedule: Literal["constant", "sqrt"] = Field(
        "constant", description="learning rate over the steps; sqrt: lr * min(10 / sqrt(step), 1)"
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay, towards the pre-trained weights")
    clip: float = Field(1.0, gt=0, description="gradient norm is clipped here")
    rank: int = Field(8, ge=1, description="LoRA rank")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the average of the adapter that is saved; 0: none")
    kl: float = Field(0.0, ge=0, description="weight of the squared distance to the base model at the last call")
    sample_steps: int | None = Field(None, ge=1, description="network calls of a sampling chain; default: the model's")
    guidance: float | None = Field(None, ge=0, le=100, description="classifier-free guidance; default: the model's")
    memory: Literal["recompute", "blocks", "keep"] = Field(
        "recompute", description="how activations are held; recompute: one call's graph at a time; blocks: one block's"
    )
    micro_batch: int | None = Field(None, ge=1, description="images decoded and scored at a time; default: 8, fewer if large")
    seed: int = Field(0, ge=0, description="of the adapter, the plans, the prompts and the noise")
    sample_every: int = Field(50, ge=0, description="updates between sample grids; 0: only before and after")
    save_every: int = Field(50, ge=0, description="updates between checkpoints; 0: only at the end")
    patience: int = Field(0, ge=0, description="stop after this many sample grids without a better held-out reward; 0: never")
    stage_steps: list[int] | None = Field(None, description="updates of each stage of a staged method; default: equal shares")
    plateau: int = Field(
        0, ge=0, description="end a stage early after this many updates without a better (smoothed) reward; 0: never"
    )
    tracker: Literal["none", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"] = (
        Field("none", description="where numbers go besides metrics.jsonl")
    )

    @classmethod
    def make(cls, values: Mapping[str, Any]) -> Settings:
        """Checked settings. Raises UserError naming the first wrong key and value."""
        made: Settings = _made(cls, values)
        if made.stage_steps is not None and not (all(n >= 1 for n in made.stage_steps) and sum(made.stage_steps) == made.steps):
            raise UserError(f"stage_steps is {made.stage_steps}, but must be numbers of at least 1 that sum to steps, {made.steps}")
        if made.batch % made.accumulate:
            raise UserError(f"accumulate is {made.accumulate}, but must divide the batch of {made.batch}")
        if made.tracker != "none" and find_spec(made.tracker) is None:
            raise UserError(f"the tracker {made.tracker!r} is not installed; pip install {made.tracker}")
        return made
