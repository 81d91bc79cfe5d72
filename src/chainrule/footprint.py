"""How much memory an update takes, counted without a GPU and without weights.

The model is an outline on PyTorch's meta device (`chainrule.models.outline`). One update goes through the trainer's own code, and
every operation says how many bytes it makes. Not counted are scratch space inside kernels, the allocator's fragmentation, and
the GPU's context; so a card counts as full at `USABLE` of its bytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.adapters import Active
from chainrule.adapters.select import layers_of
from chainrule.cast import Member
from chainrule.denoise import Denoiser, PromptEmbedding, guidance_is_input
from chainrule.errors import Note, UserError
from chainrule.guidance import of_number
from chainrule.meters import LiveBytes, peak_bytes
from chainrule.methods import Method, needs
from chainrule.models import Model
from chainrule.models.outline import META, outline_of
from chainrule.offload import is_lent
from chainrule.rewards import Reward
from chainrule.rewards.base import FunctionReward
from chainrule.settings import Finetuning
from chainrule.standins import holding
from chainrule.training import FinetuneTask

BATCHES = (1, 2, 8, 32)  # that are counted
USABLE = 0.9  # of a card
POLICIES = ("keep", "recompute", "blocks")  # from the fastest to the smallest


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one fine-tuning: `fixed` between updates, by what they are for, and `peaks` above it in an update, by batch."""

    fixed: Mapping[str, int]
    peaks: Mapping[int, int]

    def total(self, batch: int) -> int:
        """The most bytes held at once with a batch of this many images; between those counted, no less than there are."""
        known = sorted(self.peaks.items())
        if batch in self.peaks or len(known) == 1:
            return sum(self.fixed.values()) + self.peaks.get(batch, known[0][1])
        # The most of what does not grow and what grows in proportion: a line between two batches lies above it.
        upper = next((i for i, (there, _) in enumerate(known) if there > batch), len(known) - 1)
        (a, low), (b, high) = known[max(upper - 1, 0)], known[max(upper, 1)]
        return sum(self.fixed.values()) + math.ceil(low + (batch - a) * (high - low) / (b - a))

    def largest(self, room: float, most: int = 4096) -> int:
        """The largest batch within so many bytes, up to `most`; 0: not even one image."""
        batch = 0
        while batch < most and self.total(batch + 1) <= room:
            batch += 1
        return batch


def count(
    model: Model, method: Method, reward: Reward, settings: Finetuning, batches: Sequence[int] = BATCHES,
    on_batch: Callable[[], None] = lambda: None,
) -> Footprint:  # fmt: skip
    """What fine-tuning the outline of a model takes, with these settings but for the batch.

    `reward` must answer on the meta device: `chainrule.standins` makes such.
    """
    peaks: dict[int, int] = {}
    meter = LiveBytes(META)
    for name in needs(method, model.grid(settings.sample_steps)).members:
        if name not in model.cast():  # a student is the network with an adapter of its own
            model = model.with_member(name, Member(model.denoiser, of_number(model.denoiser, 1.0), Active({})))
    few = {"batch": 1, "accumulate": 1, "updates": 10**9, "sample_every": 0, "stage_steps": None, "balance": "none"}
    alone = settings.model_copy(update=few)
    with flash_attention():
        task = FinetuneTask.start(_rehearsed(model, meter), method, reward, ["a prompt"], alone)
        try:
            with meter:  # AdamW makes its moments in its first step
                task.update()
            for batch in batches:
                task.settings = alone.model_copy(update={"batch": batch})
                task.learner.optimizer.zero_grad(set_to_none=True)
                meter.start()
                with meter:
                    task.update()
                peaks[batch] = meter.peak
                on_batch()
            return Footprint(fixed_bytes(task, reward), peaks)
        finally:
            task.remove()


def fixed_bytes(task: FinetuneTask, reward: Reward) -> dict[str, int]:
    """What a task holds between updates: the weights of its parts, and its adapters with all that the optimizer keeps of them."""
    loras = {id(weight) for weight in task.learner.named_parameters().values()}
    state = [t for each in task.learner.optimizer.state.values() for t in each.values() if t.numel() > 1]
    trained = [*task.learner.named_parameters().values(), *state, *task.learner.average.values()]
    judges = [term.function for _, term in reward.weighted() if isinstance(term, FunctionReward)]
    parts: dict[str, list[Any]] = {"network": [task.model.network], "vae": [task.model.codec.network], "reward": judges}

    def weights(part: nn.Module) -> int:
        away = {id(w) for block in part.modules() if is_lent(block) for w in (*block.parameters(), *block.buffers())}
        return sum(w.nbytes for w in (*part.parameters(), *part.buffers()) if id(w) not in loras | away)

    found = {name: sum(weights(part) for part in of if isinstance(part, nn.Module)) for name, of in parts.items()}
    return found | {"adapters": sum(tensor.nbytes for tensor in trained)}


def fitted(model: Model, methods: Sequence[Method], reward: Reward, settings: Finetuning, share: int) -> Finetuning:
    """Settings whose `memory` is "auto", with the fastest policy instead that fits the device; a note says which.

    `methods` are the stages' and `share` is a process's images in a backward pass. What is on the device already stays there.
    Raises UserError if nothing fits, with the largest batch that would.
    """
    if settings.memory != "auto":
        return settings
    bare, room = outline_of(model), USABLE * free_bytes(model.device)
    micro = min(share, settings.micro_batch or model.micro_batch)
    scored, peaks = holding(_scoring(model, reward, micro)), {}
    for policy in POLICIES if hasattr(model.network, "enable_gradient_checkpointing") else POLICIES[:2]:
        own = settings.model_copy(update={"memory": policy})
        found = [count(bare, method, scored, own, (1, share)) for method in methods]
        taken = {n: max(each.fixed["adapters"] + each.peaks[n] for each in found) for n in (1, share)}
        if taken[share] <= room:
            said = f"an update takes about {gigabytes(taken[share])} of {gigabytes(room / USABLE)} that are free"
            warnings.warn(Note(f"memory: {policy}; {said}"), stacklevel=3)
            return own
        peaks = taken
    whole = Footprint({}, peaks).largest(room)
    advice = f"a batch of {whole} would do" if whole else f"one image takes {gigabytes(peaks[1])}; take a smaller size, or quantize"
    there = f"takes {gigabytes(peaks[share])} at the least, and {gigabytes(room)} can be used"
    raise UserError(f"memory is 'auto', but a batch of {share} {there}; {advice}")


def free_bytes(device: torch.device) -> float:
    """What can still be allocated on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return float(psutil.virtual_memory().available)


def gigabytes(size: float) -> str:
    """10^9 bytes, as cards are sold."""
    return f"{size / 1e9:.3g} GB"


def _scoring(model: Model, reward: Reward, count: int) -> int:
    """The bytes that so many images' rewards hold at the most, with their gradient."""
    images = torch.rand(count, 3, *model.size, device=model.device, requires_grad=True)
    return peak_bytes(lambda: reward(images, ["a prompt"] * count).sum().backward(), model.device)


# Counting


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Attention as one operation that keeps its inputs, its output and a logarithm per row, and no matrix of weights.

    That is what the fused kernels on a GPU keep. The meta device would take attention apart instead, matrix and all.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _flash):
        yield


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """A denoiser whose calls without gradient run once: of others like the first, only the peak is counted.

    A chain has fifty of them, which hold the same bytes on top of what is held already.
    """

    denoiser: Denoiser
    meter: LiveBytes
    seen: dict[Any, int] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        """The network that is called."""
        return self.denoiser.network

    @property
    def guidance_is_input(self) -> bool:
        """As the denoiser says."""
        return guidance_is_input(self.denoiser)

    def __call__(self, x: Tensor, level: float, embedding: PromptEmbedding, *scale: Any, **named: Any) -> Tensor:
        """The denoiser's answer, or one of its form."""
        ask: Callable[[], Tensor] = lambda: self.denoiser(x, level, embedding, *scale, **named)
        if torch.is_grad_enabled():
            return ask()
        on = tuple(name for layer in layers_of(self.network)[:1] for name in layer.active_adapters)
        key, meter = (x.shape, on), self.meter
        if key in self.seen:
            meter.peak = max(meter.peak, meter.live + self.seen[key])
            return torch.empty_like(x)
        most, before = meter.peak, meter.live
        meter.peak = before
        answer = ask()
        self.seen[key] = meter.peak - before
        meter.peak = max(most, meter.peak)
        return answer


def _rehearsed(model: Model, meter: LiveBytes) -> Model:
    return replace(model, active=dict(model.active), denoiser=Rehearsed(model.denoiser, meter))
