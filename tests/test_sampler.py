"""A learned sampler: it starts as the model samples, and comes back from a run's folder here and in plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CASES, PROMPTS, SEEDS, Case, images_of, loaded
from PIL import Image
from pipelines import make_pipeline, pixel_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuned import gray

import chainrule as cr
from chainrule.adapters import mix
from chainrule.errors import Note
from chainrule.guidance import CFG, Interval
from chainrule.learnable import sampler_parts
from chainrule.learned import GuidanceWeights, NegativeEmbedding, NegativeNetwork, load
from chainrule.rewards import parse
from chainrule.settings import Finetuning

GUIDED = [name for name, case in CASES.items() if case.texts and len(case.guidances) == 2]
LEARN: dict[str, Any] = {
    "learn": "negative,guidance", "updates": 2, "batch": 2, "sample_steps": 3, "guidance": 3.0, "lr": 1e-2, "rank": 2,
    "sample_every": 0, "save_every": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDED)
def test_it_starts_as_the_model_samples_and_comes_back_in_the_plain_pipeline(name: str, tmp_path: Path) -> None:
    case: Case = CASES[name]
    model = loaded(case).guided(4.0)
    bare = model.render(PROMPTS, SEEDS, case.steps)
    for part_name, part in sampler_parts(model, Finetuning(learn="guidance,negative", sample_steps=case.steps)).items():
        model = model.learning(part_name, part)
    torch.testing.assert_close(model.render(PROMPTS, SEEDS, case.steps), bare, rtol=0, atol=2e-5)
    weights, negative = model.learned.values()
    assert isinstance(weights, GuidanceWeights) and isinstance(negative, NegativeEmbedding)
    weights.weights.data += torch.linspace(-3.5, 2.0, case.steps)  # the first below 1, where a pipeline would leave guidance out
    torch.manual_seed(2)
    for parameter in negative.network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    tuned = model.render(PROMPTS, SEEDS, case.steps)
    assert float((tuned - bare).abs().max()) > 1e-3
    for part_name, part in model.learned.items():
        part.save(tmp_path / "learned" / part_name)

    fresh = case.pipe()
    with cr.attach(fresh, tmp_path):
        theirs = images_of(case.run(fresh, PROMPTS, SEEDS, 9.0, case.steps, output_type="np"))
        if hasattr(fresh, "do_classifier_free_guidance"):
            with pytest.raises(cr.UserError, match="call the pipeline with a guidance_scale above 1"):
                case.run(fresh, PROMPTS, SEEDS, 1.0, case.steps, output_type="np")
    np.testing.assert_allclose(theirs, tuned.permute(0, 2, 3, 1).numpy(), atol=2e-5)
    again = loaded(case).using(tmp_path)
    torch.testing.assert_close(again.render(PROMPTS, SEEDS, case.steps), tuned, rtol=0, atol=1e-5)


def test_the_paper_network_is_mlp_of_attention_added_to_the_empty_prompts_states() -> None:
    torch.manual_seed(0)
    empty, e = torch.randn(5, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    network = NegativeNetwork(empty)
    assert torch.equal(network(e), empty.expand(2, -1, -1))
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    attention, (first, _, last) = network.attention, network.mlp
    q, k, v = (
        (e @ w.T + b).unflatten(-1, (8, 2)).transpose(1, 2)
        for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    )
    mixed = (torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1) @ v).transpose(1, 2).flatten(-2)
    seen = mixed @ attention.out_proj.weight.T + attention.out_proj.bias
    hidden = torch.nn.functional.gelu(seen @ first.weight.T + first.bias)
    torch.testing.assert_close(network(e), empty + hidden @ last.weight.T + last.bias)


def model() -> cr.Model:
    return cr.load(make_pipeline(dtype=torch.float32))


def test_a_run_that_learned_the_sampler_alone_is_used_like_any_other(tmp_path: Path) -> None:
    net = model()
    run = cr.finetune(net, "sdo", gray, PROMPTS, out=tmp_path / "run", **LEARN)
    assert sorted(p.relative_to(run.adapter).as_posix() for p in run.adapter.glob("learned/*/*.*")) == [
        f"learned/{name}/{name}.{end}" for name in ("guidance", "negative") for end in ("json", "safetensors")
    ]
    told = json.loads((run.adapter / "learned/guidance/guidance.json").read_text())
    assert told["guidance"] == 3.0 and [level for level, _ in told["schedule"]] == list(net.grid(3))[:-1]
    assert any(abs(scale - 3.0) > 1e-3 for _, scale in told["schedule"])
    used = [model().using(place).render(PROMPTS, SEEDS, 3) for place in (run.folder, run.adapter)]
    assert torch.equal(*used) and not torch.allclose(used[0], model().render(PROMPTS, SEEDS, 3, 3.0), atol=1e-4)
    # More steps read the same schedule; a guidance that is asked for goes before it.
    assert model().using(run.folder).render(PROMPTS, SEEDS, 6).isfinite().all()
    asked = model().using(run.folder).render(PROMPTS, SEEDS, 3, 5.0)
    assert not torch.equal(asked, used[0])

    # What was loaded stays as it is when more is trained on top of it.
    before = load_file(run.adapter / "learned/guidance/guidance.safetensors")
    top = cr.finetune(model().using(run.folder), "sdo", gray, PROMPTS, out=tmp_path / "top", **{**LEARN, "learn": "adapter"})
    assert not (top.adapter / "learned").exists() and (top.adapter / "pytorch_lora_weights.safetensors").is_file()
    assert all(torch.equal(load_file(run.adapter / "learned/guidance/guidance.safetensors")[k], v) for k, v in before.items())


def test_the_command_line_samples_and_compares_with_what_was_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chainrule: Any
) -> None:
    """Trained from a guidance of 4: `before` has that, `after` the learned scales, and one that is asked for goes before both."""
    monkeypatch.chdir(tmp_path)
    make_pipeline(dtype=torch.float32).save_pretrained("sd")
    line = ["--model", "sd", "--method", "sdo", "--reward", "symmetry", "--prompts", "animals", "--updates", "2", "--batch", "1"]
    found = chainrule("train", *line, "--learn", "guidance, adapter", "--guidance", "4", "--sample-steps", "3", "--out", "r")
    assert found.code == 0, found.err
    for asked, guided in (([], {}), (["--guidance", "2"], {"guidance": 2.0})):
        found = chainrule("sample", "r", "--prompts", "a fox", "--out", "s", "--overwrite", *asked)
        assert found.code == 0, found.err
        image = cr.load("sd").guided(4.0).using("r").sample(["a fox"], [0], 3, **guided)[0]
        assert np.array_equal(np.asarray(Image.open("s/0000.png")), np.asarray(image))
    assert chainrule("eval", "r", "--prompts", "animals:test", "--seeds", "1", "--reward", "symmetry").code == 0
    means = {row["name"]: row["metrics"]["symmetry"]["mean"] for row in json.loads(Path("r/evaluation.json").read_text())["rows"]}
    base, prompts = cr.load("sd").guided(4.0), cr.prompts("animals:test")
    for name, net in (("before", base), ("after", base.using("r"))):
        expected = float(parse("symmetry")(net.render(prompts, [0] * len(prompts), 3), prompts).mean())
        assert means[name] == pytest.approx(expected, abs=1e-5)
    with pytest.warns(Note, match="learned a sampler too"):
        mix({Path("r"): 0.5})


def test_a_part_has_its_own_rate_and_the_guidance_moves_fifty_times_as_far(tmp_path: Path) -> None:
    options = {**LEARN, "learn": "adapter,guidance", "updates": 1, "lr": 1e-3, "weight_decay": 0.0}
    run = cr.finetune(model(), "draft", gray, PROMPTS, out=tmp_path / "run", **options)
    scales = load_file(run.adapter / "learned/guidance/guidance.safetensors")["weights"]
    assert float((scales - 3.0).abs().max()) == pytest.approx(0.05, rel=0.05)


def flux() -> cr.Model:
    return loaded(CASES["flux"])


@pytest.mark.parametrize(
    ("net", "options", "said"),
    [
        (flux, {"guidance": 3.5}, "reads its guidance and no negative prompt; leave guidance and negative out"),
        (model, {"guidance": 1.0}, "the guidance is 1.0; learning it, or a negative, takes one scale above 1"),
        (model, {"guidance": Interval(CFG(3.0), 0, 500)}, "takes one scale above 1"),
        (lambda: cr.load(pixel_pipeline(None)), {"learn": "negative"}, "the guidance is 1.0; learning it, or a negative"),
        (model, {"learn": "sampler"}, "learn is 'sampler', but must be any of adapter, guidance, negative"),
        (model, {"learn": ""}, "learn is '', but must be any of"),
    ],
)
def test_what_cannot_be_learned_is_one_line(net: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(cr.UserError, match=said):
        cr.finetune(net(), "sdo", gray, PROMPTS, out=tmp_path / "run", **{**LEARN, "guidance": None, **options})
    assert not (tmp_path / "run").exists()


def tensors(**values: Tensor) -> dict[str, Tensor]:
    return values


def test_damaged_parts_are_one_line(tmp_path: Path) -> None:
    run = cr.finetune(model(), "sdo", gray, PROMPTS, out=tmp_path / "run", **LEARN)
    place = run.adapter / "learned"
    kept = tmp_path / "kept"
    shutil.copytree(place, kept)
    nan, two = torch.tensor([float("nan")]), torch.ones(2)
    for file, spoil in {
        "guidance/guidance.safetensors": lambda path: save_file(tensors(levels=nan, weights=nan.clone()), path),
        "guidance/guidance.json": lambda path: path.write_text("[[1"),
        "negative/negative.safetensors": lambda path: save_file(tensors(empty=two), path),
        "negative/negative.json": lambda path: path.write_text('{"heads": 7}'),
    }.items():
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        spoil(place / file)
        with pytest.raises(cr.UserError, match="damaged") as caught:
            model().using(run.folder)
        assert "\n" not in str(caught.value)
    code = tmp_path / "code.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for inner in ({"name": f"{code}:Mine"}, {"name": "interval"}, {"name": "nothing"}, "cfg", None, [1]):
        (place / "guidance/guidance.json").write_text(json.dumps({"guidance": inner, "schedule": []}))
        with pytest.raises(cr.UserError, match="damaged, or of a guidance of its own"):
            load([place / "guidance"])
    assert not (tmp_path / "ran").exists()
    save_file(tensors(levels=two, weights=torch.ones(3)), kept / "guidance/guidance.safetensors")
    with pytest.raises(cr.UserError, match="no scale for each level"):
        load([kept / "guidance"])
    other = loaded(CASES["sd3"])
    shutil.rmtree(place / "guidance")
    shutil.copy(kept / "negative/negative.json", place / "negative")
    with pytest.raises(cr.UserError, match="learned for prompts of shape"):
        other.using(place.parent).render(PROMPTS, SEEDS, 2, 4.0)
