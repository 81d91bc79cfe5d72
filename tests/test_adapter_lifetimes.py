"""Whose an adapter is: found by its exact name, in the network as long as something can switch it on, and no longer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from pipelines import make_pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

import chainrule as cr
from chainrule.adapters import Weights, inject, lease, recompute, selected
from chainrule.adapters.select import unchanged
from chainrule.plan import walk

PROMPTS, SEEDS = ["a fox", "two bees"], [3, 8]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Reference counts alone must do: nothing here waits for the cycle collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def shaken(model: cr.Model, name: str, seed: int = 0) -> cr.Adapter:
    adapter = model.adapt(name, rank=2)
    torch.manual_seed(seed)
    for weight in adapter.parameters():
        weight.data.normal_(0, 0.15)
    return adapter


def latents(model: cr.Model) -> Tensor:
    return list(model.states(PROMPTS, SEEDS, 3, 2.0))[-1]


def names(model: cr.Model) -> list[str]:
    return list(getattr(model.network, "peft_config", {}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        shaken(cr.load(make_pipeline(dtype=torch.float32)), name, seed).save(folder / name)
    return folder


def test_an_adapter_named_like_a_layer_has_its_own_weights_alone(tmp_path: Path) -> None:
    """`attn1` is a part of the layers' own names, `lora_A` of the matrices'."""
    model = cr.load(make_pipeline(dtype=torch.float32))
    adapters = {name: shaken(model, name, seed) for seed, name in enumerate(("b", "attn1", "lora_A", "weight"))}
    counts = {name: len(adapter.parameters()) for name, adapter in adapters.items()}
    owners = [id(weight) for adapter in adapters.values() for weight in adapter.parameters()]
    assert len(set(counts.values())) == 1 and len(set(owners)) == len(owners) == 4 * counts["b"]
    seen = latents(cr.load(model.pipe))
    for name, adapter in adapters.items():
        for key, weight in adapter.named_parameters().items():
            layer, matrix = key.removesuffix(".weight").rsplit(".", 1)
            assert weight is getattr(model.network.get_submodule(layer), matrix)[name].weight
        file = adapter.save(tmp_path / name) / "pytorch_lora_weights.safetensors"
        stored = load_file(file)
        assert len(stored) == counts["b"]
        assert all(torch.equal(stored[f"unet.{key}"], weight) for key, weight in adapter.named_parameters().items())
    for adapter in adapters.values():
        model.drop(adapter)
    assert torch.equal(latents(model), seen) and not names(model)


def test_what_nothing_can_switch_on_any_more_is_taken_out(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    before, modules = latents(base), [type(module) for module in base.network.modules()]
    for _ in range(5):
        base.using(saved / "one")
    assert names(base) == []
    for name in ("one", "two", "one"):
        tuned = base.using(saved / name)
        assert len(names(base)) == 1
    del tuned
    assert names(base) == [] and [type(module) for module in base.network.modules()] == modules
    assert torch.equal(latents(base), before)


def test_a_student_by_a_lora_is_taken_out_with_its_model(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    taught = base.with_student(saved / "one")
    member = taught.members["student"]
    assert len(names(base)) == 1
    del taught
    assert len(names(base)) == 1 and callable(member)
    del member
    assert names(base) == []


def test_whatever_can_switch_it_on_keeps_it(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    tuned = base.using(saved / "one")
    expected, x, level = latents(tuned), base.noise(SEEDS), base.grid(3)[0]
    chain = tuned.guided(2.0).chain(PROMPTS, SEEDS)
    both = tuned.using(saved / "two")
    slower = tuned.solving("euler")
    del tuned
    assert names(base) == ["loaded0", "loaded1"]
    del both
    assert names(base) == ["loaded0"]
    del slower
    assert torch.equal(chain.end(x, walk(base.grid(3))), expected)
    member = chain.cast["base"]
    del chain
    assert names(base) == ["loaded0"]
    assert member(x, level, base.embed(PROMPTS)).isfinite().all()
    del member
    assert names(base) == []


def test_the_same_file_twice_counts_twice(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    twice = base.using(saved / "one").using(saved / "one")
    torch.testing.assert_close(latents(twice), latents(base.using(saved / "one", scale=2.0)))
    assert len(names(base)) == 2


def test_a_file_that_does_not_fit_leaves_nothing(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    with pytest.raises(cr.UserError, match="made for another model"):
        base.using(Weights({"no.layer.lora_A.weight": torch.zeros(1, 2), "no.layer.lora_B.weight": torch.zeros(2, 1)}, 1.0))
    assert names(base) == []


def test_a_student_can_be_distilled_after_adapters_came_and_went(saved: Path, tmp_path: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    tuned = base.using(saved / "one")
    with pytest.raises(cr.UserError, match="distill needs the model without adapters"):
        cr.distill(base, out=tmp_path / "refused")
    del tuned
    cr.distill(base, steps=2, updates=1, batch=1, starts=1, teacher_steps=4, rank=2, prompts=["a fox"], out=tmp_path / "student")
    assert names(base) == []


def test_a_running_chain_of_another_adapter_does_not_notice(saved: Path) -> None:
    base = cr.load(make_pipeline(dtype=torch.float32))
    kept, gone = base.using(saved / "one"), [base.using(saved / "two")]
    expected = list(kept.states(PROMPTS, SEEDS, 4, 2.0))
    seen = []
    for number, state in enumerate(kept.states(PROMPTS, SEEDS, 4, 2.0)):
        seen.append(state)
        if number == 1:
            gone.clear()
            assert names(base) == ["loaded0"]
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def _two(network: nn.Module) -> dict[str, Weights]:
    weights = {}
    for name in ("kept", "gone"):
        adapter = inject(network, name, rank=2, targets=("0", "2"))
        for weight in adapter.parameters():
            weight.data.normal_(0, 0.4)
        weights[name] = adapter.weights()
        adapter.remove()
    return weights


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double().requires_grad_(False)


@pytest.mark.parametrize("thread", [False, True])
def test_it_goes_after_the_call_that_it_was_released_in(thread: bool) -> None:
    """In the middle of a forward pass, as the collector may, in this thread or another one: the call is not disturbed."""
    network, x = _network(), torch.randn(3, 4).double()
    weights = _two(network)
    kept = lease(network, "kept", weights["kept"])
    with selected(network, {"kept": 1.0}):
        expected = network(x)
    gone = [lease(network, "gone", weights["gone"])]
    inside: list[list[str]] = []

    def release(*_: object) -> None:
        if thread:
            worker = Thread(target=gone.clear)
            worker.start()
            worker.join()
        gone.clear()
        inside.append(list(network.peft_config))  # type: ignore[arg-type]

    hook = network[1].register_forward_hook(release)
    with selected(network, {"gone": 0.5}):
        with selected(network, {"kept": 1.0}):
            assert torch.equal(network(x), expected)
        assert list(network.peft_config) == ["kept", "gone"]  # type: ignore[arg-type]
    hook.remove()
    assert inside == [["kept", "gone"]] and list(network.peft_config) == ["kept"]  # type: ignore[arg-type]
    with selected(network, {"kept": 1.0}):
        assert torch.equal(network(x), expected)
    bare = _network()
    del kept
    assert not hasattr(network, "peft_config") and torch.equal(network(x), bare(x))


def test_an_adapter_taken_out_by_hand_within_a_selection_leaves_the_others_on() -> None:
    network, x = _network(), torch.randn(3, 4).double()
    weights = _two(network)
    kept = lease(network, "kept", weights["kept"])
    with selected(network, {"kept": 1.0}):
        expected = network(x)
        gone = inject(network, "gone", rank=2, targets=("0", "2"))
        gone.remove()
        assert torch.equal(network(x), expected)
    with selected(network, {"kept": 1.0, "gone": 1.0}):
        assert torch.equal(network(x), expected)
    assert network[0].scaling == {"kept": 1.0}  # type: ignore[comparison-overlap]
    assert kept.adapter.name == "kept"


def test_a_graph_that_will_be_made_again_holds_its_adapter() -> None:
    """The second forward pass, in the backward pass, after everything else has let go of it."""
    network, gradients = _network(), []
    weights = _two(network)["kept"]
    for call in (lambda f, x: f(x), recompute):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        held = lease(network, "kept", weights)
        with selected(network, {"kept": 1.0}):
            loss = call(network, x).square().sum()
        del held
        loss.backward()
        gradients.append(x.grad)
        del loss
        assert not hasattr(network, "peft_config")
    torch.testing.assert_close(gradients[1], gradients[0])


def test_nothing_goes_while_layers_are_walked_through() -> None:
    network = _network()
    weights = _two(network)
    held = [lease(network, "gone", weights["gone"])]
    with unchanged(network):
        for number, _ in enumerate(network.modules()):
            if number == 2:
                held.clear()
    assert not hasattr(network, "peft_config")
