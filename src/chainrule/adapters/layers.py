"""peft's LoRA layers, which compute in the type of what they are given.

peft casts the input of an adapted layer up to the adapter's float32 and keeps it for the backward pass: with a bfloat16
network that is a third of a call's activations. Here the small matrices are cast down instead. Gradients still reach the
float32 matrices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from chainrule.errors import UserError


class Linear(lora.Linear):
    """W x + b + scale B A x, for every adapter that is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out), in the type of `x`."""
        if args or kwargs or not _usual(self):
            return super().forward(x, *args, **kwargs)
        if not torch.is_grad_enabled() and _merges(self.base_layer, x):
            weight = self.base_layer.weight
            for name in _on(self):
                down, up = _matrices(self, name, weight.dtype)
                weight = torch.addmm(weight, up, down)
            return F.linear(x, weight, self.base_layer.bias)
        answer: Tensor = self.base_layer(x)
        for name in _on(self):
            down, up = _matrices(self, name, answer.dtype)
            hidden = F.linear(x, down)
            rows, hidden = answer.reshape(-1, answer.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
            # One pass over the answer, into its own memory where no graph could need it.
            added = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
            answer = added(rows, hidden, up.t()).view(answer.shape)
        return answer

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """peft's own. Raises UserError where the base weights are held in fewer bits, to which nothing can be added."""
        weight = self.get_base_layer().weight
        if not weight.is_floating_point() or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
            raise UserError("a LoRA cannot be fused into weights that are held in fewer bits; load the model without quantize")
        super().merge(*args, **kwargs)


class Conv2d(lora.Conv2d):
    """A convolution, and for every adapter that is on another one to its rank, followed by one of a single pixel."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(b, in, h, w) to (b, out, h', w'), in the type of `x`."""
        if args or kwargs or not _usual(self):
            return super().forward(x, *args, **kwargs)
        answer: Tensor = self.base_layer(x)
        for name in _on(self):
            down, up = _matrices(self, name, answer.dtype)
            hidden = self.lora_A[name]._conv_forward(x, down, None)
            answer = answer + self.lora_B[name]._conv_forward(hidden, up, None)
        return answer


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}


def _matrices(layer: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and scale B. The scale is not handed to an operation as its option: compiled code would be compiled again for another."""
    return layer.lora_A[name].weight.to(dtype), (layer.lora_B[name].weight * layer.scaling[name]).to(dtype)


def _merges(base: Any, x: Tensor) -> bool:
    """Whether W + scale B A, made for this call alone, costs less than taking `x` through A and B, and loses nothing.

    Not in half precision: W would swallow a small B A. Nor where something else answers for the layer, as hooks do.
    """
    weight, device = base.weight, x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (
        type(base) is nn.Linear
        and x.dtype == weight.dtype in (torch.float32, torch.float64)
        and not (autocast or base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        and x.numel() // x.shape[-1] * sum(weight.shape) >= weight.numel()
    )


def _on(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _usual(layer: Any) -> bool:
    """Whether what is on is plain LoRA: else (DoRA, dropout, biases, switched off as a whole, merged) peft answers."""
    return not (layer.disable_adapters or layer.merged) and all(
        name not in layer.lora_variant and isinstance(layer.lora_dropout[name], nn.Identity) and layer.lora_B[name].bias is None
        for name in _on(layer)
    )
