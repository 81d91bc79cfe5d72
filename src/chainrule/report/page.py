"""Writes the report's HTML from the material of a run. Every text from outside is escaped, and nothing is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from shlex import quote

from chainrule.config import FinetuneConfig, SteerConfig
from chainrule.report import charts
from chainrule.report.answers import FOX, answers
from chainrule.report.curves import Curve, bands
from chainrule.report.embedded import figure, strip
from chainrule.report.guard import alarm
from chainrule.report.layout import beside, columns, document, header, section, table, titled, warning
from chainrule.report.material import Material, Tile, address, edges, series, tiles, title
from chainrule.report.watched import NAMES, Watched
from chainrule.report.words import flat, measured, number, phrase, signed

WATCHED = "The watched prompts: the same prompts and seeds all along."
SIGNS = (
    "What the reward's gradient reached, a sign for each call of the network, from noise to image: - nothing, = the call's "
    "weights, ~ its input, # both, + both but a share of the input's, . passed over, > another network's call, ^ noised again; "
    "brackets around what is backpropagated, | between copies."
)


def render(material: Material) -> str:
    """The whole page as one string."""
    name, under = title(material)
    sections = [
        section("Pictures", _pictures(material)),
        section("Same prompts and seeds", _watched(material)),
        section("Evaluation", _evaluation(material)),
        section("By prompt", _prompts(material)),
        section("Reward", _reward(material)),
        section("Training", _training(material)),
        section("Guidance", _guidance(material)),
        section("Plan", f"<p>{escape(SIGNS)}</p><pre>{escape(material.plan)}</pre>" if material.plan else ""),
        section("Use it", _use(material)),
        section("Settings", table(flat(material.config.values()) if material.config else {})),
        section("Environment", _environment(material.environment)),
    ]
    body = f"{_header(material, name, under)}\n{_answers(material)}\n{_tiles(tiles(material))}\n<main>\n{''.join(sections)}</main>"
    return document(f"{name}: {under}" if under else name, body)


def _header(material: Material, name: str, under: str) -> str:
    date = str(material.environment.get("date", ""))[:10]
    over = " · ".join(text for text in ("chainrule", material.folder.resolve().name, date) if text)
    return header(over, name, under)


def _answers(material: Material) -> str:
    """The first lines of the page, and the alarm, if there is one."""
    rows = ""
    for each in answers(material):
        code = f"<pre>{escape(each.code)}</pre>" if each.code else ""
        rows += f"<div><dt>{escape(each.question)}</dt><dd>{escape(each.answer)}{code}</dd></div>"
    found = alarm(material.watched)
    first = warning("It may be hacking its reward.", str(found)) if found else ""
    return f'{first}<dl class="answers">{rows}</dl>' if rows or first else ""


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


def _pictures(material: Material) -> str:
    """Prompts that were not trained on, then the watched ones before and after, then the updates in a row."""
    folder = material.folder / "samples"
    steered = isinstance(material.config, SteerConfig)
    count = len(material.rows)
    after = "after steering" if steered else f"after {count} update{'s' * (count != 1)}"
    rows = f"Top: the model as it was. Bottom: {after}. The noise is the same."
    unseen = figure(folder / "unseen.png", f"Prompts that it was not trained on. {rows}")
    whose = "The images that were steered." if steered else WATCHED
    both = figure(folder / "before_after.png", f"{whose} {rows}")
    if not both:
        captions = {"before": f"{whose} The model as it was", "after": f"The same {after}"}
        pair = [figure(folder / f"{word}.png", caption) for word, caption in captions.items()]
        both = f'<div class="pair">{"".join(pair)}</div>' if any(pair) else ""
    frames = strip(folder)
    return unseen + both + (f"<h3>The watched prompts as training went on</h3>{frames}" if frames else "")


def _watched(material: Material) -> str:
    """The main curves: the same prompts and seeds from the first update to the last."""
    some = material.watched
    if some is None or len(some.steps) < 2:
        return ""
    steps = [*map(str, some.steps)]
    listed = ", ".join(steps if len(steps) < 9 else [*steps[:2], f"… {steps[-1]}"])
    said = (
        f"The watched prompts, {len(some.prompts)} with a seed each, at the updates {listed}. "
        "The band is the 95% interval of the change since update 0. Each prompt is compared with itself, so that easy and hard "
        "prompts do not widen it. Where the band leaves the dashed line, the change is more than chance."
    )
    charts = [
        titled(NAMES.get(name, name), bands([Curve(points=some.curve(name))], title=NAMES.get(name, name))) for name in some.names
    ]
    return f"<p>{said}</p>{beside(charts)}"


def _prompts(material: Material) -> str:
    """Every watched prompt with its numbers before and after, the ones it was not trained on last."""
    parts = [("The watched prompts, one image each", material.watched)]
    parts += [("The pictured prompts that it was not trained on, one image each", material.unseen)]
    return "".join(f"<h3>{escape(name)}</h3>{_by_prompt(some)}" for name, some in parts if some and len(some.steps) > 1)


def _by_prompt(some: Watched) -> str:
    names = [name for name in ("reward", "held_out", "diversity") if name in some.names]
    head = [
        "",
        *(f"{NAMES[name]} before" if rest == "before" else rest for name in names for rest in ("before", "after", "change")),
    ]
    rows = []
    for i, prompt in enumerate(some.prompts):
        ends = [(some.values[name][0][i], some.values[name][-1][i]) for name in names]
        rows.append([prompt, *(text for a, b in ends for text in (number(a), number(b), signed(b - a)))])
    gains = [some.change(name) for name in names]
    ends = [(some.mean(name, 0), some.mean(name, -1)) for name in names]
    means = [
        text
        for (a, b), gain in zip(ends, gains, strict=True)
        for text in (number(a), number(b), measured(gain.mean, gain.interval, signed=True))
    ]
    return columns(head, [*rows, ["mean over prompts", *means]])


def _evaluation(material: Material) -> str:
    chart = charts.intervals(material.measures, material.gains, width=420)
    if not chart:
        return ""
    count = len(material.prompts)
    over = f" over {count} prompt{'s' if count != 1 else ''}" if count else ""
    shown = "".join(f"<li>{escape(prompt)}</li>" for prompt in material.prompts[:40])
    rest = f"<li>… and {count - 40} more</li>" if count > 40 else ""
    prompts = f"<details><summary>The prompts</summary><ol>{shown}{rest}</ol></details>" if shown else ""
    return (
        f"<p>Means{over}; bars are 95% intervals over prompts, which differ much. The gain compares each prompt with itself, "
        f"so its interval is smaller.</p>{chart}{prompts}"
    )


def _reward(material: Material) -> str:
    points = series(material.rows, "reward")
    ends = edges(points)
    start = ends[0][0] if ends and len(points) > 1 else None
    chart = charts.line(points, title="Reward", width=420, height=210, reference=start)
    names = dict.fromkeys(key for row in material.rows for key in _terms(row))
    small = [_curve(name, series(material.rows, "terms", name)) for name in names] if len(names) > 1 else []
    terms = f'<h3 class="terms">Its terms</h3>{beside(small)}' if any(small) else ""
    said = "Mean over the images of each update."
    if isinstance(material.config, FinetuneConfig):
        said = "Mean over the batch of each update. Prompts and seeds change each time, so it is too noisy to judge a run by."
    return f"<p>{said} Dashed: the first update.</p>{chart}{terms}" if chart else terms


def _training(material: Material) -> str:
    names = {"held_out": "Held-out reward", "loss": "Loss", "grad_norm": "Gradient norm", "lr": "Learning rate"}
    names |= {"seconds": "Seconds per update", "skipped": "Skipped updates"}
    small = []
    if material.watched:
        del names["held_out"]  # one of the main curves
    for key, name in names.items():
        points = series(material.rows, key)
        still = len({value for _, value in points}) < 2
        if not (key in ("lr", "skipped") and still):  # a constant rate and no skips say nothing as a curve
            small.append(_curve(name, points))
    return beside(small)


def _guidance(material: Material) -> str:
    """The learned guidance scale of each sampling step (as arXiv:2309.17400, Fig. 33)."""
    points: list[tuple[float, float | None]] = [(i, scale) for i, scale in enumerate(material.schedule, 1)]
    chart = charts.line(
        points, title="Guidance scale", width=420, reference=material.guidance, reference_label="before", smoothed=False, height=220
    )
    return f"<h3>The learned scale of each sampling step, from the noisiest to the last</h3>{chart}" if chart else ""


def _curve(name: str, points: Sequence[tuple[float, float | None]]) -> str:
    return titled(name, charts.line(points, title=name, width=420, height=190))


def _terms(row: Mapping[str, object]) -> Mapping[str, object]:
    terms = row.get("terms")
    return terms if isinstance(terms, Mapping) else {}


def _use(material: Material) -> str:
    """How to load the adapter, as its card says; then chainrule's own command."""
    if not (material.folder / "adapter").exists():
        return ""
    prompt = material.prompts[0] if material.prompts else FOX
    command = f"chainrule sample {quote(address(material.folder))} --prompts {quote(prompt)}"
    blocks = [*material.snippets, ("On the command line", command)]
    return "".join(f"<h3>{escape(said)}</h3><pre>{escape(code)}</pre>" for said, code in blocks)


def _environment(environment: Mapping[str, object]) -> str:
    shown = {key: value for key, value in environment.items() if key != "resumed" and value is not None}
    rows = {key: phrase(value) for key, value in shown.items()}
    resumed = environment.get("resumed")
    if isinstance(resumed, list):
        dates = [str(entry.get("date", "")) for entry in resumed if isinstance(entry, Mapping)]
        rows["resumed"] = phrase(dates)
    return table(rows)
