"""The command line's main flow: train, sample, evaluate, report, mix, distill, analyze, steer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import words
from PIL import Image

import chainrule as cr
from chainrule.adapters.files import read


@pytest.fixture
def trained(sd_folder, chainrule, tmp_path, monkeypatch) -> Path:
    """A run trained by the command line: two updates on a random-weight model."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a fox\ntwo bees\n")
    line = f"--model {sd_folder} --method sdo --reward symmetry --prompts prompts.txt --out run --lr 0.05 --rank 2 " + SHORT
    found = chainrule("train", *line.split())
    assert found.code == 0, found.err
    assert "adapter: run/adapter" in found.out
    return tmp_path


SHORT = "--steps 2 --batch 2 --sample-steps 3 --guidance 2"


def rows() -> list[dict[str, object]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_train_leaves_a_whole_run_and_resume_goes_on(trained, sd_folder, chainrule):
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    given = {"model": str(sd_folder), "method": {"name": "sdo"}, "reward": "symmetry", "prompts": "prompts.txt", "updates": 2,
             "batch": 2, "sample_steps": 3, "guidance": 2.0, "lr": 0.05, "rank": 2}  # fmt: skip
    assert config == config | given
    assert [row["step"] for row in rows()] == [1, 2]
    assert all(-1 <= row["reward"] <= 0 and row["grad_norm"] > 0 for row in rows())
    assert set(Path("run/plan.txt").read_text().split()) <= {"[#--]", "[-#-]", "[--#]"}
    assert {path.name for path in Path("run/samples").iterdir()} == {"before.png", "after.png", "before_after.png"}
    assert read("run").rank == 2

    first = Path("run/adapter/pytorch_lora_weights.safetensors").read_bytes()
    refused = chainrule("train", *f"--model {sd_folder} --reward symmetry --out run".split())
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "run is not empty" in refused.err
    changed = f"--model {sd_folder} --method sdo --reward symmetry --prompts prompts.txt --out run --lr 0.05 --resume " + SHORT
    refused = chainrule("train", *changed.split(), "--rank", 4)
    assert refused.err.splitlines()[-1].startswith("error: cannot resume run: rank was 2 and is now 4")
    assert Path("run/adapter/pytorch_lora_weights.safetensors").read_bytes() == first

    assert chainrule("train", *changed.split(), "--rank", 2, "--steps", 3).code == 0
    assert [row["step"] for row in rows()] == [1, 2, 3]
    assert Path("run/checkpoints/step-000003/state.json").is_file()
    assert Path("run/adapter/pytorch_lora_weights.safetensors").read_bytes() != first

    assert chainrule("train", *changed.replace("--resume", "--overwrite").split(), "--rank", 1, "--steps", 1).code == 0
    assert [row["step"] for row in rows()] == [1]
    assert read("run").rank == 1


def pixels(folder: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("0*.png"))]


def test_sample_makes_the_images_of_the_library(trained, sd_folder, chainrule):
    found = chainrule(*words("sample run --prompts 'a fox' --prompts prompts.txt --seeds 2 --steps 3 --guidance 2 --out images"))
    assert found.code == 0, found.err
    prompts = ["a fox"] * 4 + ["two bees"] * 2
    model = cr.load(str(sd_folder))
    expected = model.using("run").sample(prompts, [0, 1] * 3, 3, 2.0)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(pixels("images"), expected, strict=True))
    assert Image.open("images/grid.png").width > 6 * 16

    common = "--prompts 'a fox' --steps 3 --guidance 2 --first-seed 7"
    chainrule(*words(f"sample run {common} --scale 0 --out off"))
    chainrule(*words(f"sample {sd_folder} {common} --out base"))
    chainrule(*words(f"sample {sd_folder} {common} --adapter run/adapter --out on"))
    off, base, on = (pixels(name)[0] for name in ("off", "base", "on"))
    assert np.array_equal(off, base)
    assert np.array_equal(base, np.asarray(model.sample(["a fox"], [7], 3, 2.0)[0]))
    assert not np.array_equal(on, base)
    assert np.array_equal(on, np.asarray(model.using("run").sample(["a fox"], [7], 3, 2.0)[0]))


def test_eval_and_report(trained, sd_folder, chainrule):
    found = chainrule(*words("eval run --prompts prompts.txt --reward symmetry --seeds 2"))
    assert found.code == 0, found.err
    saved = json.loads(Path("run/evaluation.json").read_text())
    assert saved["prompts"] == ["a fox", "two bees"]
    assert [row["name"] for row in saved["rows"]] == ["before", "after"]
    images = cr.load(str(sd_folder)).render(["a fox"] * 2 + ["two bees"] * 2, [0, 1] * 2, 3, 2.0)
    symmetry = -(images - images.flip(-1)).abs().mean()
    assert saved["rows"][0]["metrics"]["symmetry"]["mean"] == pytest.approx(float(symmetry), rel=1e-4)
    assert f"{saved['rows'][1]['metrics']['symmetry']['mean']:.4g}" in found.out
    assert found.out.splitlines()[0] == "2 prompts x 2 seeds; mean ± 95% interval over prompts"

    found = chainrule("report", "run")
    assert (found.code, found.out) == (0, "run/report.html\n")
    page = Path("run/report.html").read_text()
    assert "sdo" in page
    assert "two bees" in page
    assert "data:image" in page


def test_eval_of_several_runs_has_a_row_for_each_though_their_folders_have_one_name(trained, chainrule):
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "run").symlink_to(trained / "run") if name == "one" else copy(trained / "run", Path(name, "run"))
    found = chainrule(*words("eval one/run two/run --prompts prompts.txt --seeds 2"))
    assert found.code == 0, found.err
    lines = [line.split("  ")[0] for line in found.out.splitlines()]
    assert {"before", "one/run", "two/run"} <= set(lines)
    assert not Path("two/run/evaluation.json").exists()
    twice = chainrule(*words("eval run one/run --prompts prompts.txt --seeds 2"))
    assert twice.err == "error: a run is given twice: run, one/run\n"


def copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


def test_mix_is_the_scaled_sum(trained, chainrule):
    def change(source: str) -> dict[str, torch.Tensor]:
        adapter = read(source)
        scale = adapter.alpha / adapter.rank
        return {t: scale * adapter.tensors[f"{t}.lora_B.weight"] @ adapter.tensors[f"{t}.lora_A.weight"] for t in adapter.targets}

    found = chainrule("mix", "run=0.5", "--out", "half")
    assert (found.code, found.out) == (0, "adapter: half\n")
    assert chainrule("mix", "run=0.5", "half=2", "run=-0.25", "--out", "sum").code == 0
    whole, half, total = change("run"), change("half"), change("sum")
    assert any(part.abs().max() > 1e-4 for part in whole.values())
    for target, part in whole.items():
        torch.testing.assert_close(half[target], 0.5 * part)
        torch.testing.assert_close(total[target], (0.5 + 1.0 - 0.25) * part)


def test_a_config_file_is_overridden_by_the_command_line(sd_folder, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "model": str(sd_folder), "reward": "2*symmetry", "method": {"name": "draft-lv", "n": 1}, "prompts": ["a fox", "a cat"],
        "out": "run", "steps": 50, "batch": 1, "lr": "1e-3", "sample_steps": 2, "guidance": 1.5, "rank": 1, "held_out": "rotation",
    }  # fmt: skip
    Path("config.yaml").write_text(yaml.safe_dump(config))
    found = chainrule("train", "config.yaml", "--steps", 1, "--method-option", "n=3")
    assert found.code == 0, found.err
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    expected = {"updates": 1, "batch": 1, "lr": 1e-3, "method": {"name": "draft-lv", "n": 3}, "held_out": "rotation",
                "reward": "2*symmetry", "prompts": ["a fox", "a cat"], "guidance": 1.5}  # fmt: skip
    assert written == written | expected
    assert Path("run/plan.txt").read_text() == "-[#|^#|^#|^#]\n"


@pytest.mark.usefixtures("brief_analysis")
def test_distill_train_sample_and_analyze_go_together(sd_folder, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a fox\ntwo bees\n")
    small = "--updates 2 --batch 2 --starts 4 --teacher-steps 8 --rank 2 --guidance 2"
    found = chainrule(*f"distill {sd_folder} --out student --prompts prompts.txt {small}".split())
    assert found.code == 0 and "shortcut.md" in found.out, found.err
    line = f"--model {sd_folder} --student student --method shortft --method-option k=2 --reward symmetry --prompts prompts.txt"
    options = "--steps 4 --batch 2 --sample-steps 5 --guidance 2 --rank 2 --lr 0.05"
    found = chainrule(*f"train {line} --out run {options}".split())
    made = ["README.md", "bands.json", "before_after.png", "lora1", "lora2"]
    assert found.code == 0 and sorted(p.name for p in Path("run/adapter").iterdir()) == made, found.err
    assert [row["stage"] for row in rows()] == [1, 1, 2, 2]
    page = Path("run/report.html").read_text()
    assert "adapter = &quot;run/adapter&quot;" in page and "chainrule.attach(pipe, adapter)" in page
    assert chainrule(*words("sample run --prompts prompts.txt --out made")).code == 0
    model = cr.load(str(sd_folder))
    expected = model.using("run").sample(["a fox", "two bees"], [0, 0], 5, 2.0)  # the steps and guidance it was trained with
    assert [list(Image.open(f"made/{i:04d}.png").getdata()) for i in (0, 1)] == [list(image.getdata()) for image in expected]
    assert "gain of after" in chainrule(*words("eval run --prompts prompts.txt --seeds 2")).out
    asked = f"analyze shortcut {sd_folder} --student student --prompts prompts.txt --seeds 1 --steps 10 --points 2 --guidance 2"
    found = chainrule(*asked.split())
    assert found.code == 0 and "| 902 | 4 | shortcut |" in found.out and Path("runs/shortcut/shortcut.png").exists(), found.err


def test_a_run_on_top_of_an_adapter_is_used_on_top_of_it(trained, sd_folder, chainrule):
    line = f"--model {sd_folder} --adapter run --method draft-1 --reward symmetry --prompts prompts.txt --out above --rank 2 "
    assert chainrule("train", *(line + SHORT).split()).code == 0
    assert chainrule(*words("sample above --prompts prompts.txt --out made")).code == 0
    expected = cr.load(str(sd_folder)).using("run").using("above").sample(["a fox", "two bees"], [0, 0], 3, 2.0)
    assert list(Image.open("made/0000.png").getdata()) == list(expected[0].getdata())
    refused = chainrule("train", *(line.replace("--adapter run ", "") + SHORT + " --resume").split())
    assert refused.code == 2 and "adapter was" in refused.err


def test_steer_leaves_pictures_a_curve_and_a_report(sd_folder, chainrule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "orange").save("photo.png")
    common = f"--model {sd_folder} --reward symmetry --steps 5 --updates 2 --guidance 2 --lr 0.05"
    found = chainrule("steer", "a fox", "two bees", *f"{common} --seeds 2 --out made".split())
    assert found.code == 0, found.err
    assert found.out.count(" to ") == 4 and "report: made/report.html" in found.out
    assert len(list(Path("made/images").glob("*.png"))) == 8
    rows = [json.loads(line) for line in Path("made/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    expected = cr.load(str(sd_folder)).sample(["a fox"] * 2 + ["two bees"] * 2, [0, 1, 0, 1], 5, 2.0)
    again = cr.steer(
        cr.load(str(sd_folder)), ["a fox"] * 2 + ["two bees"] * 2, cr.rewards.parse("symmetry"), seeds=[0, 1, 0, 1], steps=5,
        updates=2, guidance=2.0, lr=0.05,
    )  # fmt: skip
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(again.before, expected, strict=True))
    assert np.array_equal(np.asarray(Image.open("made/images/0003.png")), np.asarray(again.images[3]))
    pictured = chainrule("steer", *f"--image photo.png {common} --keep 0.5 --over latent@601 --solver dpm++ --out photo".split())
    assert pictured.code == 2 and "t = 601 is not on the 5-step grid" in pictured.err  # that solver's levels are others
    pictured = chainrule("steer", *f"--image photo.png {common} --keep 0.5 --over latent@601 --out photo".split())
    assert pictured.code == 0 and json.loads(Path("photo/steered.json").read_text())["inverted"][0] > 0
    assert chainrule("steer", "a fox", *f"{common} --out made".split()).code == 2
    assert chainrule("steer", "a fox", *f"{common} --out made --overwrite".split()).code == 0
