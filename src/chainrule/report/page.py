"""Writes the report's HTML from the material of a run. Every text from outside is escaped, and nothing is fetched."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from shlex import quote

from PIL import Image

from chainrule.report import charts
from chainrule.report.material import Material, Tile, edges, series, tiles, title
from chainrule.report.style import STYLE
from chainrule.report.words import flat, phrase

PICTURE_BYTES = 1_500_000  # a larger picture file is shrunk before it is put into the page
PICTURE_SIDE, THUMBNAIL_SIDE = 1800, 520
MOST_FRAMES = 12  # of the filmstrip
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(material: Material) -> str:
    """The whole page as one string."""
    name, under = title(material)
    sections = [
        _section("Pictures", _pictures(material.folder / "samples")),
        _section("Evaluation", _evaluation(material)),
        _section("Reward", _reward(material)),
        _section("Training", _training(material)),
        _section("Guidance", _guidance(material)),
        _section("Plan", f"<pre>{escape(material.plan)}</pre>" if material.plan else ""),
        _section("Use it", _use(material)),
        _section("Config", _table(flat(material.config.values()) if material.config else {})),
        _section("Environment", _environment(material.environment)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(name)}{escape(f": {under}" if under else "")}</title>
<style>{STYLE}</style>
</head>
<body>
{_header(material, name, under)}
{_tiles(tiles(material))}
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _header(material: Material, name: str, under: str) -> str:
    date = str(material.environment.get("date", ""))[:10]
    over = " · ".join(text for text in ("chainrule", material.folder.resolve().name, date) if text)
    below = f"<p>{escape(under)}</p>" if under else ""
    return f'<header><p class="over">{escape(over)}</p><h1>{escape(name)}</h1>{below}</header>'


def _tiles(shown: Sequence[Tile]) -> str:
    if not shown:
        return ""
    elements = []
    for tile in shown:
        mean, _, half = tile.after.partition(" ± ")
        after = escape(mean) + (f" <small>± {escape(half)}</small>" if half else "")
        before = f"{escape(tile.before)} →" if tile.before else ""
        note = f'<dd class="note">{escape(tile.note)}</dd>' if tile.note else ""
        elements.append(
            f'<div><dt>{escape(tile.label)}</dt><dd class="before">{before}</dd><dd class="after">{after}</dd>{note}</div>'
        )
    return f'<dl class="tiles">{"".join(elements)}</dl>'


def _section(name: str, body: str) -> str:
    return f"<section><h2>{escape(name)}</h2><div>{body}</div></section>\n" if body else ""


def _pictures(folder: Path) -> str:
    """The picture of before and after, in one or in two; then the pictures of the steps in a row."""
    both = _figure(folder / "before_after.png", "The same prompts and seeds, before and after")
    if not both:
        pair = [_figure(folder / f"{word}.png", word.capitalize()) for word in ("before", "after")]
        both = f'<div class="pair">{"".join(pair)}</div>' if any(pair) else ""
    frames = []
    for path in folder.glob("step-*.png"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            frames.append((int(match[1]), path))
    strip = [_figure(path, f"Step {step}", THUMBNAIL_SIDE) for step, path in _spread(sorted(frames), MOST_FRAMES)]
    return both + (f'<div class="strip">{"".join(strip)}</div>' if any(strip) else "")


def _figure(path: Path, caption: str, side: int = PICTURE_SIDE) -> str:
    """A picture inside the page; "" if the file is missing or is no picture."""
    source = _embedded(path, side)
    if not source:
        return ""
    text = escape(caption, quote=True)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _embedded(path: Path, side: int) -> str:
    try:
        with Image.open(path) as image:
            image.load()
            small = max(image.size) <= side and path.stat().st_size <= PICTURE_BYTES
            if small and image.format in ("PNG", "JPEG", "WEBP"):
                kind, data = image.format.lower(), path.read_bytes()
            else:
                kind, data = "jpeg", _shrunk(image, side)
    except (OSError, ValueError, SyntaxError):
        return ""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _shrunk(image: Image.Image, side: int) -> bytes:
    layers = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(layers, mask=layers.getchannel("A"))
    paper.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    paper.save(file, "JPEG", quality=90)
    return file.getvalue()


def _evaluation(material: Material) -> str:
    chart = charts.intervals(material.measures, material.gains)
    if not chart:
        return ""
    count = len(material.prompts)
    over = f" over {count} prompt{'s' if count != 1 else ''}" if count else ""
    shown = "".join(f"<li>{escape(prompt)}</li>" for prompt in material.prompts[:40])
    rest = f"<li>… and {count - 40} more</li>" if count > 40 else ""
    prompts = f"<details><summary>The prompts</summary><ol>{shown}{rest}</ol></details>" if shown else ""
    return f"<p>Means{over}; bars are 95% intervals.</p>{chart}{prompts}"


def _reward(material: Material) -> str:
    points = series(material.rows, "reward")
    ends = edges(points)
    start = ends[0][0] if ends and len(points) > 1 else None
    chart = charts.line(points, title="Reward", reference=start, reference_label="start")
    names = dict.fromkeys(key for row in material.rows for key in _terms(row))
    small = [_small(name, series(material.rows, "terms", name)) for name in names] if len(names) > 1 else []
    terms = f'<h3 class="terms">Its terms</h3><div class="small">{"".join(small)}</div>' if any(small) else ""
    return f"<h3>Mean over the batch, each step</h3>{chart}{terms}" if chart else terms


def _training(material: Material) -> str:
    names = {"held_out": "Held-out reward", "loss": "Loss", "grad_norm": "Gradient norm", "lr": "Learning rate"}
    names |= {"seconds": "Seconds per step", "skipped": "Skipped updates"}
    small = []
    for key, name in names.items():
        points = series(material.rows, key)
        still = len({value for _, value in points}) < 2
        if not (key in ("lr", "skipped") and still):  # a constant rate and no skips say nothing as a curve
            small.append(_small(name, points))
    return f'<div class="small">{"".join(small)}</div>' if any(small) else ""


def _guidance(material: Material) -> str:
    """The learned guidance scale of each sampling step (as arXiv:2309.17400, Fig. 33)."""
    points: list[tuple[float, float | None]] = [(i, scale) for i, scale in enumerate(material.schedule, 1)]
    chart = charts.line(
        points, title="Guidance scale", reference=material.guidance, reference_label="before", smoothed=False, height=220
    )
    return f"<h3>The learned scale of each sampling step, from the noisiest to the last</h3>{chart}" if chart else ""


def _small(name: str, points: Sequence[tuple[float, float | None]]) -> str:
    chart = charts.line(points, title=name, width=360, height=170)
    return f"<div><h3>{escape(name)}</h3>{chart}</div>" if chart else ""


def _terms(row: Mapping[str, object]) -> Mapping[str, object]:
    terms = row.get("terms")
    return terms if isinstance(terms, Mapping) else {}


def _use(material: Material) -> str:
    """How to load the adapter: plain diffusers, then chainrule's own command."""
    if not (material.folder / "adapter").exists():
        return ""
    model = material.config.model if material.config else "the/base-model"
    where = _address(material.folder)
    hub = "/" in model or "\\" in model
    load = (
        f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({model!r})"
        if hub
        else f"import chainrule\n\npipe = chainrule.load({model!r}).pipe"
    )
    prompt = material.prompts[0] if material.prompts else "a painting of a fox"
    own = [material.folder / "adapter" / name for name in ("bands.json", "learned")]
    if any(path.exists() for path in own):  # adapters by level and a learned sampler, which diffusers cannot load
        on = f"{load}\nattached = chainrule.attach(pipe, {where!r})".replace("from diffusers", "import chainrule\nfrom diffusers")
    else:
        on = f"{load}\npipe.load_lora_weights({f'{where}/adapter'!r})"
    code = f"{on}\nimage = pipe({prompt!r}).images[0]"
    command = f"chainrule sample {quote(where)} --prompts {quote(prompt)}"
    return f"<h3>With diffusers alone</h3><pre>{escape(code)}</pre><h3>With chainrule</h3><pre>{escape(command)}</pre>"


def _address(folder: Path) -> str:
    """The folder's path relative to the current directory; its name alone if it lies elsewhere."""
    whole = folder.resolve()
    near = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else Path(whole.name)
    return near.as_posix() if near.parts else whole.name


def _environment(environment: Mapping[str, object]) -> str:
    shown = {key: value for key, value in environment.items() if key != "resumed" and value is not None}
    rows = {key: phrase(value) for key, value in shown.items()}
    resumed = environment.get("resumed")
    if isinstance(resumed, list):
        dates = [str(entry.get("date", "")) for entry in resumed if isinstance(entry, Mapping)]
        rows["resumed"] = phrase(dates)
    return _table(rows)


def _table(rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    body = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in rows.items())
    return f"<table>{body}</table>"


def _spread(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]
