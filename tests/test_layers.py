"""LoRA layers compute in the network's type from float32 matrices: peft's answers, no activation cast up, gradients in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, PROMPTS, SEEDS, Case, images_of, loaded, said, shaken
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import chainrule as cr
from chainrule.adapters import inject, selected
from chainrule.adapters.layers import LAYERS
from chainrule.models import attach

LAYER_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (2, 5, 6)),
    "without a bias": (lambda: nn.Linear(6, 10, bias=False), (3, 6)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 8, 6)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 8, 6)),
}
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
HALVES = [torch.bfloat16, torch.float16]


def network(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    made = nn.Sequential(make()).to(dtype)
    for name, seed in (("one", 2), ("two", 3)):
        adapter = inject(made, name, rank=4, alpha=3.0, targets=("0",))
        generator = torch.Generator().manual_seed(seed)
        for weight in adapter.parameters():
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return made


def of_peft(net: nn.Sequential, x: Tensor, on: dict[str, float]) -> Tensor:
    """The answer of peft's own layers in float64, with these matrices."""
    torch.manual_seed(1)
    other = nn.Sequential(net[0].get_base_layer()).double()
    for name in on:
        other.__dict__.pop("peft_config", None)  # one after the other, without a warning
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"]), other, name)
    mine, theirs = net[0], other[0]
    assert type(theirs) not in LAYERS.values()
    for name, scale in on.items():
        for part in ("lora_A", "lora_B"):
            getattr(theirs, part)[name].weight.data = getattr(mine, part)[name].weight.data.double()
        theirs.scaling[name] = 3.0 / 4 * scale
    theirs._active_adapter = list(on)
    return theirs(x.double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("on", [{}, {"one": 1.0}, {"one": 0.5, "two": -2.0}], ids=str)
@pytest.mark.parametrize("name", LAYER_CASES)
@pytest.mark.parametrize("graph", [True, False])
def test_a_layer_answers_as_pefts_own(name: str, on: dict[str, float], graph: bool) -> None:
    make, shape = LAYER_CASES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype, close in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        net = network(make, dtype)
        with selected(net, on), torch.set_grad_enabled(graph):
            answer = net(x.to(dtype))
        assert answer.dtype == dtype
        torch.testing.assert_close(answer.double(), of_peft(net, x, on), rtol=close / 10, atol=close)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LAYER_CASES)
def test_no_activation_is_cast_up_and_the_gradient_reaches_the_float32_matrices(name: str, dtype: torch.dtype) -> None:
    make, shape = LAYER_CASES[name]
    net, x = network(make, dtype), torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept: list[Tensor] = []
    with selected(net, {"one": 1.0}), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        answer = net(x)
    answer.float().square().sum().backward()
    assert kept and all(t.dtype == dtype for t in kept)
    exact = network(make, torch.float64)
    for mine, theirs in zip(net.parameters(), exact.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    with selected(exact, {"one": 1.0}):
        exact(x.double()).square().sum().backward()
    for part in ("lora_A", "lora_B"):
        mine, theirs = (getattr(each[0], part)["one"].weight for each in (net, exact))
        assert mine.dtype == mine.grad.dtype == torch.float32 and getattr(net[0], part)["two"].weight.grad is None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.02


@pytest.mark.parametrize("graph", [True, False])
def test_the_input_and_the_graph_are_left_alone(graph: bool) -> None:
    """With a graph the answer of the layer below may be needed again, so only without one is it written over."""
    net = network(lambda: nn.Linear(4, 4), torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with selected(net, {"one": 1.0}), torch.set_grad_enabled(graph):
        before = x.detach().clone()
        answers = [net(x) for _ in range(2)]
        assert torch.equal(x, before) and torch.equal(*answers) and answers[0].requires_grad == graph
    if graph:
        with selected(net, {"one": 1.0}):
            torch.autograd.gradcheck(net, (x,))


@pytest.mark.parametrize("how", ["autocast", "a hook before", "a hook", "a forward of its own", "bfloat16"])
def test_the_matrices_are_not_added_to_the_weight_where_that_would_lose_something(how: str) -> None:
    """A call without a graph adds them where its rows are many: never where the sum is rounded off or the layer is not asked."""
    net = network(lambda: nn.Linear(6, 10), torch.bfloat16 if how == "bfloat16" else torch.float32)
    base, seen = net[0].get_base_layer(), []
    x = torch.tensor([1.0, -1.0] * 3, dtype=base.weight.dtype).expand(50, 6)
    if how == "a hook before":
        base.register_forward_pre_hook(lambda *_: seen.append(1))
    elif how == "a hook":
        base.register_forward_hook(lambda *_: seen.append(1))
    elif how == "a forward of its own":
        forward = base.forward
        base.forward = lambda rows: seen.append(1) or forward(rows)
    base.weight.data.fill_(1.0)  # its own answer is 0: what is seen is the adapter's
    base.bias.data.zero_()
    net[0].lora_B["one"].weight.data.mul_(1e-3)  # less than bfloat16 tells from 1
    for graph in (True, False):
        with selected(net, {"one": 1.0}), torch.set_grad_enabled(graph), torch.autocast("cpu", torch.bfloat16, how == "autocast"):
            answer = net(x)
        if graph:
            asked = answer.detach().clone()
    assert float(asked.abs().max()) > 1e-4
    torch.testing.assert_close(answer, asked, rtol=0.02, atol=1e-6)
    assert len(seen) == (2 if "of its own" in how or "hook" in how else 0)


def test_what_peft_has_besides_plain_lora_it_answers_itself() -> None:
    """A DoRA put into the same layers by their owner, and layers switched off as a whole."""
    torch.manual_seed(0)
    net, x = network(lambda: nn.Linear(6, 10), torch.float64), torch.randn(3, 6, dtype=torch.float64)
    plain = net[0].get_base_layer()(x)
    layer: Any = net[0]
    layer.update_layer("dora", 4, lora_alpha=4, config=LoraConfig(r=4, use_dora=True, init_lora_weights=False))
    with selected(net, {"dora": 1.0}):
        theirs = super(type(layer), layer).forward(x)
        assert torch.equal(net(x), theirs) and not torch.allclose(theirs, plain)
        layer.enable_adapters(False)
        assert torch.equal(net(x), plain)


def test_a_lora_is_not_fused_into_weights_in_fewer_bits() -> None:
    net = network(lambda: nn.Linear(6, 10), torch.float32)
    net[0].get_base_layer().weight = nn.Parameter(torch.ones(10, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(cr.UserError, match="cannot be fused into weights that are held in fewer bits"):
        net[0].merge(adapter_names=["one"])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ddpm", "ddim")])  # whose pipelines know no bfloat16
def test_in_bfloat16_the_saved_file_gives_the_same_image_in_plain_diffusers(name: str, tmp_path: Any) -> None:
    """To that type's rounding: by less than bfloat16 itself changes the image."""
    case: Case = CASES[name]
    guidance = case.guidances[-1]
    images: dict[torch.dtype, np.ndarray] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = loaded(case, case.pipe(dtype=dtype))
        adapter = shaken(model)
        images[dtype] = model.render(said(case), SEEDS, case.steps, guidance).permute(0, 2, 3, 1).numpy()
    adapter.save(tmp_path)
    fresh = case.pipe(dtype=torch.bfloat16)
    if hasattr(fresh, "load_lora_weights"):
        fresh.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    else:
        attach(fresh, tmp_path)
    theirs = images_of(case.run(fresh, PROMPTS, SEEDS, guidance, case.steps, output_type="np"))
    ours, rounding = images[torch.bfloat16], np.abs(images[torch.bfloat16] - images[torch.float32])
    print(name, np.abs(theirs - ours).mean(), rounding.mean())
    assert np.abs(theirs - ours).mean() < max(2 * rounding.mean(), 1e-3)
