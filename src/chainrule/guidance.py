"""Guidance as a value: how the network's answers with and without the prompt become one.

Every value here is a function `(ask, x, level, condition) -> answer`, with `ask` the network (a `Denoiser`). Written below are u,
the answer for the negative embedding, and c, the answer for the prompt's. Where both are needed, they are one batch of twice
the size, u first, as in diffusers. A guidance of one's own is a frozen dataclass with this one method; `both` gives it u and c.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from chainrule.denoise import Condition, Denoiser, GuidanceReader, guidance_is_input
from chainrule.errors import UserError
from chainrule.named import Catalog

Scale: TypeAlias = float | Tensor  # a tensor, (), is learned


class Guidance(Protocol):
    """One answer of the network, guided: x (b, c, h, w) at a level -> (b, c, h, w), in whatever the network predicts."""

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor: ...


AnyGuidance: TypeAlias = float | str | Mapping[str, Any] | Guidance | None


class Scaled(Guidance, Protocol):
    """A guidance with a strength, which `ByLevel` may set per level."""

    @property
    def scale(self) -> Scale: ...


def both(ask: Denoiser, x: Tensor, level: float, condition: Condition) -> tuple[Tensor, Tensor]:
    """(u, c): the answers for the negative embedding and for the prompt's, from one call of twice the batch."""
    embedding = condition.negative.concatenated(condition.positive)
    u, c = ask(torch.cat([x, x]), level, embedding).chunk(2)
    return u, c


def reads_negative(guidance: Guidance) -> bool:
    """Whether the negative embedding matters to this guidance; true for one that does not say."""
    return bool(getattr(guidance, "reads_negative", True))


def _off(scale: Scale) -> bool:
    """Whether only c is computed: at a given scale of 1 or below, as in diffusers. A learned scale always needs both."""
    return not isinstance(scale, Tensor) and scale <= 1


def _guided(
    scale: Scale, ask: Denoiser, x: Tensor, level: float, condition: Condition, then: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`then(m, c)` with m = u + scale (c - u); c alone where that is off."""
    if _off(scale):
        return ask(x, level, condition.positive)
    u, c = both(ask, x, level, condition)
    return then(u + (scale.to(c) if isinstance(scale, Tensor) else scale) * (c - u), c)


@dataclass(frozen=True, slots=True)
class CFG:
    """Classifier-free guidance, u + scale (c - u) (arXiv:2207.12598, in diffusers' convention). 1 and below: only c."""

    scale: Scale = 7.5

    @property
    def reads_negative(self) -> bool:
        """Whether the negative embedding matters."""
        return not _off(self.scale)

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        return _guided(self.scale, ask, x, level, condition, lambda m, c: m)


@dataclass(frozen=True, slots=True)
class Rescaled:
    """CFG with the standard deviation of c, which a large scale inflates (arXiv:2305.08891, Eq. 14-16).

    m = u + scale (c - u); the answer is rescale * m std(c) / std(m) + (1 - rescale) m, with deviations per image.
    """

    scale: Scale = 7.5
    rescale: float = 0.7

    @property
    def reads_negative(self) -> bool:
        """Whether the negative embedding matters."""
        return not _off(self.scale)

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        return _guided(self.scale, ask, x, level, condition, self._rescaled)

    def _rescaled(self, m: Tensor, c: Tensor) -> Tensor:
        axes = tuple(range(1, c.ndim))
        rescaled = m * (c.std(axes, keepdim=True) / m.std(axes, keepdim=True))
        return self.rescale * rescaled + (1 - self.rescale) * m


@dataclass(frozen=True, slots=True)
class NormRescaled:
    """CFG with the norm of c in every token, as Qwen-Image samples (arXiv:2508.02324; diffusers' `true_cfg_scale`).

    m = u + scale (c - u); the answer is m |c| / |m|, with norms over the channels of each `patch` x `patch` latents.
    """

    scale: Scale = 4.0
    patch: int = 2

    @property
    def reads_negative(self) -> bool:
        """Whether the negative embedding matters."""
        return not _off(self.scale)

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        return _guided(self.scale, ask, x, level, condition, lambda m, c: m * (self._norms(c) / self._norms(m)))

    def _norms(self, answer: Tensor) -> Tensor:
        """The norm of each token, at every one of its latents: (b, 1, h, w).

        Raises UserError for sides that the patch does not divide.
        """
        if answer.shape[-1] % self.patch or answer.shape[-2] % self.patch:
            sides = f"{answer.shape[-2]} x {answer.shape[-1]}"
            raise UserError(f"patch is {self.patch}, but must divide both sides of the latents, {sides}")
        square = answer.square().sum(1, keepdim=True)
        pooled = torch.nn.functional.avg_pool2d(square, self.patch) * self.patch**2
        return pooled.sqrt().repeat_interleave(self.patch, -1).repeat_interleave(self.patch, -2)


@dataclass(frozen=True, slots=True)
class Embedded:
    """The network reads the scale as a number and is called once (FLUX; latent consistency models, arXiv:2310.04378)."""

    scale: Scale = 3.5
    reads_negative: ClassVar[bool] = False

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        if not guidance_is_input(ask):
            raise UserError("guidance is embedded, but this network does not read its guidance; give a number")
        return cast(GuidanceReader, ask)(x, level, condition.positive, scale=self.scale)


@dataclass(frozen=True, slots=True)
class ByLevel:
    """A scale for every level, given or learned: linear between `levels`, constant outside them.

    `scales` has one number for each of the rising or falling `levels`, or is a learned tensor of them, (n,) (DRaFT's learned
    sampler, arXiv:2309.17400, B.12). `inner` is the guidance whose scale they are. Raises UserError for other lengths.
    """

    levels: tuple[float, ...]
    scales: tuple[float, ...] | Tensor
    inner: Scaled = field(default_factory=CFG)

    def __post_init__(self) -> None:
        if not len(self.levels) or len(self.levels) != len(self.scales):
            raise UserError(f"guidance by level has {len(self.levels)} levels but {len(self.scales)} scales; give one each")
        if len(set(self.levels)) < len(self.levels):
            raise UserError("guidance by level names a level twice")

    @property
    def reads_negative(self) -> bool:
        """Whether the negative embedding matters."""
        scales = self.scales
        each = [scales] if isinstance(scales, Tensor) else scales
        return any(reads_negative(replace(self.inner, scale=one)) for one in each)  # type: ignore[type-var]

    def at(self, level: float) -> Scale:
        """The scale at a level."""
        places = sorted(range(len(self.levels)), key=self.levels.__getitem__)
        above = bisect_left(places, level, key=self.levels.__getitem__)
        if above in (0, len(places)):
            return self.scales[places[min(above, len(places) - 1)]]
        i, j = places[above - 1], places[above]
        share = (level - self.levels[i]) / (self.levels[j] - self.levels[i])
        return self.scales[j] if share == 1 else (1 - share) * self.scales[i] + share * self.scales[j]

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        guidance: Guidance = replace(self.inner, scale=self.at(level))  # type: ignore[type-var]
        return guidance(ask, x, level, condition)


@dataclass(frozen=True, slots=True)
class Interval:
    """Guidance at the levels low < level <= high only, and c alone elsewhere (arXiv:2404.07724).

    At high noise guidance costs diversity and at low noise it changes little, which is why both may go without.
    """

    inner: Guidance
    low: float = 0.0
    high: float = 1000.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"guidance is on above level {self.low} up to {self.high}, which is nowhere; give low below high")

    @property
    def reads_negative(self) -> bool:
        """Whether the negative embedding matters."""
        return reads_negative(self.inner)

    def __call__(self, ask: Denoiser, x: Tensor, level: float, condition: Condition) -> Tensor:
        inside = self.low < level <= self.high
        return (self.inner if inside else of_number(ask, 1.0))(ask, x, level, condition)


def of_number(denoiser: Denoiser, scale: float) -> Guidance:
    """What a plain number means for a network: the number it reads if it reads one, classifier-free guidance otherwise.

    Raises UserError for a number outside [0, 100].
    """
    if not 0 <= scale <= 100:
        raise UserError(f"guidance is {scale}, but must be between 0 and 100")
    return Embedded(scale) if guidance_is_input(denoiser) else CFG(scale)


def read(denoiser: Denoiser, given: AnyGuidance) -> Guidance:
    """A guidance for a network: a value, a number as `of_number` reads it, or a name or name with options as a config has it."""
    if isinstance(given, str | Mapping):
        return GUIDANCES.read(given)
    return given if callable(given) else of_number(denoiser, given)  # type: ignore[arg-type]


def value_among(options: Mapping[str, Any]) -> tuple[Guidance | None, dict[str, Any]]:
    """The guidance value among a function's keywords, if it is one, and the keywords that settings can hold."""
    given = options.get("guidance")
    return (
        (given, {key: value for key, value in options.items() if key != "guidance"}) if callable(given) else (None, dict(options))
    )


def specification(guidance: Guidance) -> float | dict[str, Any]:
    """How a config holds a guidance: a number for classifier-free guidance and for one that is read, else name and options.

    One that is neither here nor from a file is written as its repr. Raises UserError for a learned one.
    """
    if isinstance(guidance, CFG | Embedded) and not isinstance(guidance.scale, Tensor):
        return guidance.scale
    return GUIDANCES.spelled(guidance)


# The values by name, for configs and the command line.
GUIDANCES: Catalog[Guidance] = Catalog("guidance", {
    "cfg": CFG, "rescaled": Rescaled, "norm-rescaled": NormRescaled, "embedded": Embedded, "by-level": ByLevel,
    "interval": Interval,
})  # fmt: skip
