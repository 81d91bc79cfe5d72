"""A card says what the run knows, its snippets make the run's own images, and `push` sends it where it is told."""

from __future__ import annotations

import html
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from families import CASES, PROMPTS
from huggingface_hub import ModelCard
from students import student_file
from tuned import gray

import chainrule as cr
from chainrule import card
from chainrule.card.base import TAGS, Base, public
from chainrule.card.page import text
from chainrule.config import DistillConfig, FinetuneConfig, SteerConfig
from chainrule.errors import UserError
from chainrule.methods import ShortFT
from chainrule.models import FAMILIES
from chainrule.push import Parcel
from chainrule.report.material import gather
from chainrule.settings import Distillation, Steering

TRAINED: dict[str, Any] = {"updates": 1, "batch": 1, "sample_steps": 3, "rank": 2, "lr": 1e-1, "guidance": 2.0}
EVALUATION = {
    "prompts": ["a fox", "an owl"],
    "rows": [
        {"name": "before", "metrics": {"gray": {"mean": 1.2, "interval": 0.05}}},
        {"name": "after", "metrics": {"gray": {"mean": 1.7, "interval": 0.04}}},
    ],
    "gains": {"gray": {"mean": 0.5, "interval": 0.06}},
}


def run_of(folder: Path, family: str = "sd", method: str = "draft-1", student: bool = False, **options: Any) -> cr.Run:
    """A short run on a saved random-weight pipeline of a family."""
    case = CASES[family]
    if not (folder / "base").exists():
        case.pipe().save_pretrained(folder / "base")
    model = cr.load(folder / "base", size=case.size)
    if student:
        method, model = ShortFT(k=2), model.with_student(student_file(folder / "student", torch.float32))
    return cr.finetune(model, method, gray, PROMPTS, out=folder / "run", **{**TRAINED, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> cr.Run:
    return run_of(tmp_path_factory.mktemp("card"))


def snippets(run: cr.Run) -> list[str]:
    """The card's code, with the placeholders filled in."""
    told = (run.adapter / card.CARD).read_text(encoding="utf-8")
    base = run.folder.parent / "base"
    return [code.replace("path/to/base-model", str(base)) for code in re.findall(r"```python\n(.*?)```", told, re.S)]


def image_of(code: str, run: cr.Run, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What a snippet makes. The pipeline's noise is drawn from a seeded generator, as chainrule's is."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(run.adapter))
    said: dict[str, Any] = {}
    seeded = code.replace("pipe(", "pipe(generator=torch.Generator().manual_seed(0), prompt=")
    exec(compile(f"import torch\n{seeded}", "card", "exec"), said)
    return np.asarray(said["image"]).astype(float)


FURTHER = [("pixart-sigma", "draft-1"), ("sdxl", "draft-1"), ("sd", "shortft")]
HARD = [pytest.param(*each, marks=pytest.mark.heavy) for each in FURTHER]


@pytest.mark.parametrize(("family", "method"), [("sd", "draft-1"), ("flux", "draft-1"), *HARD])
def test_both_snippets_make_the_same_picture(family, method, tmp_path, monkeypatch):
    """diffusers' own loader and pipeline against `using`; the base model's picture is another one."""
    run = run_of(tmp_path, family, method, **({"updates": 2, "student": True} if method == "shortft" else {}))
    plain, ours = snippets(run)
    assert ("load_lora_weights" in plain) == (family != "pixart-sigma" and method != "shortft")
    if "pixart" in family:
        plain = plain.replace(").images", ", use_resolution_binning=False, clean_caption=False).images")
    found = [image_of(code, run, monkeypatch) for code in (plain, ours)]
    assert np.abs(found[0] - found[1]).max() <= 1
    alone = image_of(re.sub(r".*(load_lora_weights|attach\().*", "", plain), run, monkeypatch)
    assert np.abs(found[0] - alone).max() > 1


def test_the_reports_code_is_the_cards_for_the_runs_own_folder(run, monkeypatch):
    monkeypatch.chdir(run.folder.parent)
    code = [html.unescape(each) for each in re.findall(r"<pre>(.*?)</pre>", cr.report(run.folder).read_text(), re.S)]
    shown = [each.replace("path/to/base-model", "base") for each in code if 'adapter = "run/adapter"' in each]
    made = [image_of(each, run, monkeypatch) for each in shown]
    assert len(made) == 2 and all("huggingface_hub" not in each for each in shown)
    assert np.abs(made[0] - image_of(snippets(run)[0], run, monkeypatch)).max() == 0 and np.abs(made[0] - made[1]).max() <= 1


CONFIGS = {
    "distill": (DistillConfig(model="some/model", settings=Distillation(student_steps=4)), ".with_student(adapter)"),
    "steer": (SteerConfig(reward="/home/me/r.py:warm", prompts=("a fox",), settings=Steering(over="weights")), "load_lora_weights"),
    "on top": (FinetuneConfig(adapter=("me/first",), reward="symmetry"), 'model.using("me/first")'),
}


@pytest.mark.parametrize(("config", "has"), CONFIGS.values(), ids=CONFIGS)
def test_other_runs_have_a_card_too(config, has, tmp_path):
    run = cr.Run.create(tmp_path / "run", config)
    run.adapter.mkdir()
    card.write(run, Base.named(config))
    told = (run.adapter / card.CARD).read_text()
    assert has in told and "/home" not in told and ModelCard(told).data.library_name == "diffusers"
    for code in re.findall(r"```python\n(.*?)```", told, re.S):
        compile(code, "card", "exec")


def test_a_family_is_loaded_by_what_its_pipeline_has():
    assert {name for name in FAMILIES if hasattr(getattr(diffusers, name), "load_lora_weights")} == set(TAGS)


def test_the_card_says_what_the_run_knows(run):
    told = ModelCard.load(run.adapter / card.CARD)
    assert told.data.library_name == "diffusers" and told.data.pipeline_tag == "text-to-image"
    assert {"lora", "diffusers", "text-to-image", "stable-diffusion"} <= set(told.data.tags)
    assert told.data.base_model is None and told.data.license is None  # a folder on this disk, of which nothing is known
    known = ("draft(k=1)", "gray", *PROMPTS, "| `lr` | 0.1 |", "in training", torch.__version__, "see its card", "before_after")
    for said in known:
        assert said in told.text
    assert str(run.folder.parent) not in told.text
    assert (run.adapter / "before_after.png").read_bytes() == (run.samples / "before_after.png").read_bytes()


def test_a_model_of_the_hub_is_named(run):
    base = Base(
        name="some/model", family="StableDiffusionXLPipeline", scheduler="DDIMScheduler", steps=30, guidance=5.0, size=(512, 768)
    )
    told = ModelCard(text(gather(run), base, run.adapter))
    assert told.data.base_model == "some/model" and "stable-diffusion-xl" in told.data.tags
    plain, _ = re.findall(r"```python\n(.*?)```", told.text, re.S)
    assert 'from_pretrained("some/model")' in plain and "DDIMScheduler.from_config(pipe.scheduler.config)" in plain
    assert "num_inference_steps=30, guidance_scale=5, height=512, width=768" in plain
    compile(plain, "card", "exec")


def test_the_best_adapter_has_a_card_and_a_bundled_model_its_own_way(tmp_path):
    model = cr.load("tiny-emoji")
    options = {**TRAINED, "updates": 2, "sample_every": 1}
    run = cr.finetune(model, "draft-1", gray, PROMPTS, out=tmp_path / "run", held_out=gray, watch=PROMPTS[:1], **options)
    told = ModelCard.load(run.folder / "best" / card.CARD)
    assert told.data.license == "apache-2.0" and 'chainrule.load("tiny-emoji").pipe' in told.text and told.data.base_model is None


def test_a_later_evaluation_goes_into_the_card_and_nothing_else_changes(run):
    place = run.adapter / card.CARD
    place.write_text(place.read_text().replace("## Licence", "Mine.\n\n## Licence"))
    before = place.read_text()
    facts = {
        "steps": 4,
        "guidance": 0.0,
        "adapters": [{"adapter": "beneath", "scale": 1.0}, {"adapter": "run", "scale": [0.0, 20.0]}],
    }
    told = EVALUATION | {"made": {"before": {"steps": 4, "guidance": 0.0}, "after": facts}}
    (run.folder / "evaluation.json").write_text(json.dumps(told))
    card.refresh(run)
    after = place.read_text()
    assert "Images were made with steps 4, guidance 0.0, scale 0.0, 20.0." in after
    assert "| gain | +0.500 ± 0.060 |" in after and "Mine." in after and "in training" not in after
    outside = re.compile(r"<!-- what was measured -->.*<!-- end of what was measured -->", re.S)
    assert outside.sub("", before) == outside.sub("", after)
    place.write_text("all mine\n")
    card.refresh(run)
    assert place.read_text() == "all mine\n"
    place.unlink()
    card.refresh(run)  # a run of an earlier version has none
    assert "+0.500 ± 0.060" in place.read_text() and "load_lora_weights" in place.read_text()


def test_folders_of_somebodys_disk_are_left_out():
    assert public("2*/home/me/my.rewards/r.py:bright + pickscore:yuvalkirstain/PickScore_v1") == (
        "2*r.py:bright + pickscore:yuvalkirstain/PickScore_v1"
    )
    assert public(r"C:\data\prompts.txt") == "prompts.txt" and public("animals:train") == "animals:train"


def test_push_sends_the_folder_with_its_card(run, chainrule, monkeypatch):
    sent: dict[str, Any] = {}

    def upload(self: object, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        sent.update({path.relative_to(folder_path).as_posix(): path.read_bytes() for path in Path(folder_path).rglob("*.*")})
        return type("Commit", (), {"commit_url": f"the/{repo_id}"})

    made = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, *args, **options: made.append((args, options)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    answer = chainrule("push", run.folder, "me/gray", "--private")
    assert not answer.code and answer.out.endswith("sent: the/me/gray\n") and "hf_secret" not in answer.out
    assert made == [(("me/gray",), {"private": True, "exist_ok": True})]
    assert set(sent) == {"README.md", "before_after.png", "pytorch_lora_weights.safetensors"}
    assert b'snapshot_download("me/gray")' in sent["README.md"] and b"OWNER/NAME" not in sent["README.md"]
    assert sent["pytorch_lora_weights.safetensors"] == (run.adapter / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.parametrize(("token", "options", "why"), [(None, (), "no token"), ("hf_secret", ("--dry-run",), "a dry run")])
def test_nothing_is_sent_without_a_token_or_in_a_dry_run(token, options, why, run, chainrule, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", partial(pytest.fail, "sent"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    answer = chainrule("push", run.folder, "me/gray", *options)
    assert not answer.code and f"nothing was sent: {why}" in answer.out and "README.md" in answer.out


def test_push_says_in_one_line_what_is_wrong(run, chainrule, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    for place, name, why in (
        (run.folder, "gray", "OWNER/NAME"), (run.folder, "me/--", "OWNER/NAME"), (tmp_path, "me/gray", "not a run folder"),
        (run.folder, "me/gray", "HF_HUB_OFFLINE"),
    ):  # fmt: skip
        answer = chainrule("push", place, name)
        assert answer.code == 2 and why in answer.err and len(answer.err.splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    parcel = Parcel.of(run.folder, "me/gray")
    with pytest.raises(UserError, match=r"cannot push to me/gray: .*refused"):
        parcel.send()
