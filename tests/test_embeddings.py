"""Prompts embedded ahead: the same numbers, made once, kept on the CPU or in a folder; text encoders that stay on the CPU."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import CASES, SEEDS, Case, loaded, said

import chainrule as cr
from chainrule import methods
from chainrule.denoise import Condition, PromptEmbedding
from chainrule.errors import Note
from chainrule.models.embeddings import TOGETHER, fingerprint, text_encoders
from chainrule.noise import derive
from chainrule.offload import streamed
from chainrule.settings import Finetuning
from chainrule.training import drawn

MANY = [f"a {word}" for word in ("fox", "bee", "cat", "dog", "owl", "ant")]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def same(one: Condition, other: Condition, close: float = 0.0) -> None:
    for a, b in ((one.positive, other.positive), (one.negative, other.negative)):
        for part in ("states", "pooled", "mask"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=0, atol=close)


def counted(model: cr.Model, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the pipeline is asked to embed from now on."""
    asked: list[list[str]] = []
    encode = model.pipe.encode_prompt

    def counting(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        asked.append(prompt)
        return encode(prompt, *args, **kwargs)

    monkeypatch.setattr(model.pipe, "encode_prompt", counting)
    return asked


def test_embeddings_made_ahead_are_those_made_in_time(case: Case, tmp_path: Path) -> None:
    model, prompts = loaded(case), said(case)
    expected = model.embed(prompts)
    for known in (model.embedded(prompts), cr.load(model.pipe, size=case.size, prompt_cache=tmp_path).embedded(prompts)):
        same(known.embed(prompts), expected, 1e-5)
        same(known.embed(prompts[::-1]), Condition(*(turned(each) for each in (expected.positive, expected.negative))), 1e-5)
    images = model.render(prompts, SEEDS, 2)
    torch.testing.assert_close(model.embedded(prompts).render(prompts, SEEDS, 2), images, rtol=0, atol=1e-5)


def turned(embedding: PromptEmbedding) -> PromptEmbedding:
    return embedding.each(lambda part: part.flip(0))


def test_a_row_is_the_same_in_any_company_and_known_or_not(tmp_path: Path) -> None:
    case = CASES["sdxl"]
    model = loaded(case)
    alone, all_of_them = model.embedded(MANY[4:5]), model.embedded(MANY)
    for prompts in (MANY[4:5], [MANY[0], MANY[4]], MANY):
        same(alone.embed(prompts), all_of_them.embed(prompts))
    cached = cr.load(model.pipe, size=case.size, prompt_cache=tmp_path).embedded(MANY)
    same(cached.embed(MANY), all_of_them.embed(MANY))


def test_a_run_embeds_its_prompts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = loaded(CASES["sd"])
    asked = counted(model, monkeypatch)
    options: dict[str, Any] = {"sample_steps": 2, "batch": 2, "rank": 2, "sample_every": 0}
    bright = lambda images, prompts: images.mean((1, 2, 3))
    run = cr.finetune(model, methods.DRaFT(1), bright, MANY, updates=5, out=tmp_path / "run", watch=MANY[:1], **options)
    assert len(run.metrics()) == 5 and len(asked) == -(-len(MANY) // TOGETHER)
    del asked[:]
    cr.steer(model, MANY[:2], bright, updates=3, sample_steps=2)
    assert len(asked) == 1


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("updates", [3, 300])
def test_of_a_long_list_only_what_is_drawn_is_embedded(updates: int, group: int) -> None:
    prompts, settings = [f"prompt {i}" for i in range(500)], Finetuning(updates=updates, batch=4, seed=7)
    seen = set()
    for step in range(updates):
        rng = Random(derive(7, "prompts", step))
        seen |= {rng.choice(prompts) for _ in range(4 // group)}
    found = drawn(prompts, settings, {group})
    assert found == (prompts if updates == 300 else [prompt for prompt in prompts if prompt in seen])


def test_a_cache_goes_on_where_it_was_killed_and_tells_text_encoders_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = CASES["pixart-sigma"]  # whose masks are no floating point
    model = cr.load(case.pipe(), size=case.size, prompt_cache=tmp_path)
    asked = counted(model, monkeypatch)
    monkeypatch.setattr("chainrule.models.embeddings.write_tensors", killed_after(2))
    with pytest.raises(KeyboardInterrupt):
        model.embedded(MANY)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    asked = counted(model, monkeypatch)
    known = model.embedded(MANY)
    assert [prompt for batch in asked for prompt in dict.fromkeys(batch)] == MANY[2:]
    del asked[:]
    same(model.embedded(MANY).embed(MANY), known.embed(MANY))
    assert not asked
    other = cr.load(case.pipe(), size=case.size, prompt_cache=tmp_path)
    assert fingerprint(other.pipe, other.component) == fingerprint(model.pipe, model.component)
    with torch.no_grad():
        next(other.pipe.text_encoder.parameters()).mul_(2)
    same(other.embedded(MANY[:1]).embed(MANY[:1]), other.embed(MANY[:1]), 1e-5)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"x" * 20)
    with pytest.raises(cr.UserError, match="is damaged"):
        model.embedded(MANY).embed(MANY)


def killed_after(writes: int) -> Any:
    from chainrule.models.embeddings import write_tensors

    left = iter(range(writes))

    def write(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write_tensors(*args)

    return write


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(cr.UserError, match=r"cannot write .*file"):
        cr.load("no/such-model", prompt_cache=tmp_path / "file" / "cache")
    with pytest.raises(cr.UserError, match="unknown text_encoders 'gpu'"):
        cr.load("tiny-emoji", text_encoders="gpu")


def test_without_room_embeddings_are_made_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(CASES["sd"])
    row = model.embed(MANY[:1]).positive.states.nbytes
    monkeypatch.setattr("chainrule.models.embeddings.HELD", 3 * row)
    with pytest.warns(Note, match="embeddings of 6 prompts take too much memory; prompt_cache"):
        known = model.embedded(MANY)
    asked = counted(model, monkeypatch)
    same(known.embed(MANY), model.embed(MANY), 1e-5)
    assert asked[0] == [*MANY[3:], MANY[-1]]


def test_text_encoders_that_stay_on_the_cpu_give_the_same_images(case: Case) -> None:
    """accelerate moves a layer's weights to the device when it is asked; here both are the CPU."""
    pipe, expected = case.pipe(), loaded(case).render(said(case), SEEDS, 2)
    model = loaded(case, pipe)
    before = fingerprint(pipe, model.component)
    for part in text_encoders(pipe, model.component).values():
        streamed(part, "cpu")
    assert torch.equal(loaded(case, pipe).render(said(case), SEEDS, 2), expected)
    assert fingerprint(pipe, model.component) == before
    assert {weight.device.type for weight in model.network.parameters()} == {"cpu"}
