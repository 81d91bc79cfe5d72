"""The first notebook runs as it stands, and values show themselves there as what they are."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from tuned import PROMPTS, gray, tuned

import chainrule as cr
from chainrule import display, methods
from chainrule.adapters import Weights
from chainrule.evaluate import Table

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_and_shows_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(cr.__file__).parents[1]))
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    outputs = [each for cell in made.executed(tmp_path).cells for each in cell.get("outputs", ())]
    data = [each.data for each in outputs if each.output_type == "execute_result"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(each["image/png"]))) for each in data if "image/png" in each]
    assert len(pictures) == 3 and all(min(picture.size) > 128 for picture in pictures)
    assert "ipywidgets" not in "".join(each.get("text", "") for each in outputs)  # what rich says where a bar cannot be shown
    assert (tmp_path / "runs/warm/adapter/pytorch_lora_weights.safetensors").is_file()
    (gain,) = re.findall(r"gain of warm +(\S+)", "".join(each["text/plain"] for each in data))
    assert float(gain) > 0
    # What is kept in the repository holds pictures, and no place of the machine that made it.
    text = (ROOT / "examples/start.ipynb").read_text()
    assert len(text) < 1_000_000 and "/tmp" not in text and text.count("image/png") >= 4


class Cells(HTMLParser):
    """The rows of an HTML table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def test_a_table_shows_the_cells_that_it_prints():
    table = Table.of(["a", "b"], {"base": {"x<y": [1.0, 2.0]}, "<b>tuned</b>": {"x<y": [1.5, 2.75]}})
    rows = Cells(table._repr_html_()).rows
    printed = [re.split(r"\s{2,}", line.strip()) for line in str(table).splitlines()]
    assert printed == [[cell.strip() for cell in row] for row in rows]
    assert "<b>" not in table._repr_html_() and repr(table) == str(table)


def test_a_run_shows_its_picture(tmp_path):
    run = tuned(tmp_path / "run", updates=1)
    shown = run._repr_html_()
    (png,) = re.findall(r"base64,([^\"]+)", shown)
    assert base64.b64decode(png) == (run.samples / "before_after.png").read_bytes() and str(run.adapter) in shown
    assert cr.Run(tmp_path)._repr_html_().startswith("<p>")  # nothing is there yet
    assert 'alt="a &quot;b&quot;"' in display.picture(b"", 'a "b"')


def test_what_was_steered_shows_pairs(sd_folder):
    found = cr.steer(cr.load(sd_folder), PROMPTS, gray, updates=1, sample_steps=2, guidance=1.0)
    picture = Image.open(io.BytesIO(found._repr_png_() or b""))
    assert picture.format == "PNG" and picture.width > picture.height // 2
    assert repr(found).startswith("Steered(2 images, rewards -0.") and len(repr(found)) < 80
    assert cr.Steered([])._repr_png_() is None


def test_reprs_are_short(sd_folder):
    model = cr.load(sd_folder)
    count = sum(weight.numel() for weight in model.network.parameters())
    told = f"UNet2DConditionModel with {count / 1000:.3g} thousand parameters"
    assert repr(model) == f"Model({sd_folder}, StableDiffusionPipeline, {told}, float32, cpu)"
    adapter = model.adapt("mine", rank=2)
    assert repr(model).endswith("float32, cpu, with mine at 1)") and f"{count / 1000:.3g} thousand" in repr(model)
    layers, own = len(adapter.weights().targets), sum(weight.numel() for weight in adapter.parameters())
    assert own < 10_000
    assert repr(adapter) == f"Adapter(mine, rank 2, {layers} layers of the unet, {own / 1000:.3g} thousand parameters)"
    result = cr.gradient(model, methods.DRaFT(k=1).plan(model.grid(2), Random(0)), gray, PROMPTS, [0, 1])
    assert repr(result).endswith("images of shape (2, 3, 16, 16))") and len(repr(result)) < 100
    weights = Weights({"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}, 2.0)
    assert repr(weights) == "Weights(rank 2, 1 layers of the unet)"
    model.drop(adapter)
    assert repr(adapter) == "Adapter(mine, not in its network any more)"


def test_a_model_shows_what_it_is_and_what_is_on(sd_folder, tmp_path):
    model = cr.load(sd_folder, dtype="bfloat16")
    adapter = model.adapt("mine", rank=2, alpha=3)
    adapter.save(tmp_path / "<b>")
    rows = dict(map(tuple, Cells(adapter._repr_html_()).rows))
    assert list(rows) == ["adapter", "rank", "layers", "parameters"] and rows["rank"] == "rank 2, alpha 3"
    model.drop(adapter)
    tuned = model.using(tmp_path / "<b>", scale=0.75, adapter_steps=(0, 2), steps=4)
    shown = tuned._repr_html_()
    rows = dict(map(tuple, Cells(shown).rows))
    high, low = tuned.grid(4)[0], tuned.grid(4)[2]
    assert rows["adapters on"] == f"loaded0 at 0.75, levels above {low} to {high}" and rows["adapters from"].endswith("<b>")
    assert rows["weights"] == "bfloat16" and rows["images"] == "16 x 16 pixels" and rows["device"] == "cpu" and "<b>" not in shown
    sliding = model.using(tmp_path / "<b>", scale=(0.5, 1))
    assert repr(sliding).endswith("with loaded1 at 0.5 at noise to 1 at the image)")
    assert "adapters on" not in model._repr_html_() and "learned" not in shown


@pytest.mark.parametrize(
    ("number", "told"),
    [(0, "0"), (999, "999"), (1000, "1 thousand"), (81_249, "81.2 thousand"), (999_499, "999 thousand"), (999_500, "1 million"),
     (859_520_964, "860 million"), (11_901_408_320, "11.9 billion")],
)  # fmt: skip
def test_amounts_have_three_digits(number, told):
    assert display.amount(number) == told
