"""Reads everything the report shows from a run folder, and computes the numbers at the top of the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrule.config import AnyConfig, DistillConfig, FinetuneConfig, SteerConfig
from chainrule.errors import UserError
from chainrule.estimate import Estimate
from chainrule.report.snippets import snippets
from chainrule.report.watched import NAMES, Watched, watched_of
from chainrule.report.words import duration, measured, number, phrase
from chainrule.runs import METRICS, WATCHED, Run

Row = Mapping[str, Any]
Bar = tuple[float, float]  # a mean and the half-width of its 95% interval; 0 where there is none, so that it can be drawn
MOST_TILES = 4


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that the page shows. What the folder does not hold is empty."""

    folder: Path
    config: AnyConfig | None
    environment: Mapping[str, Any]
    rows: Sequence[Row]
    plan: str
    measures: Sequence[tuple[str, Mapping[str, Bar]]]
    gains: Mapping[str, Bar]
    prompts: Sequence[str]
    schedule: Sequence[float] = ()  # the learned guidance scale of each sampling step
    guidance: float | None = None  # what it was before
    watched: Watched | None = None  # the same prompts and seeds at every grid
    unseen: Watched | None = None  # prompts that it was not trained on, before and after
    snippets: Sequence[tuple[str, str]] = ()  # what is said above each, and the code
    how: str = ""  # how the last row's images were made, where the evaluation says it


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number at the top of the page."""

    label: str
    before: str = ""
    after: str
    note: str = ""


def gather(run: Run) -> Material:
    """Read the run folder. Raises UserError if nothing of a run is in it."""
    if not run.folder.is_dir():
        raise UserError(f"no run folder at {run.folder}")
    known = ("config.yaml", METRICS, WATCHED, "evaluation.json", "plan.txt", "samples")
    if not any((run.folder / name).exists() for name in known):
        raise UserError(f"{run.folder} holds nothing of a run: none of {', '.join(known)}")
    evaluation = _evaluation(run.folder / "evaluation.json")
    plan = run.folder / "plan.txt"
    watched, unseen = watched_of(run.watched())
    schedule, before = _schedule(run.folder / "adapter" / "learned" / "guidance" / "guidance.json")
    return Material(
        folder=run.folder,
        config=run.config if (run.folder / "config.yaml").is_file() else None,
        environment=run.environment,
        rows=run.metrics(),
        plan=plan.read_text(encoding="utf-8", errors="replace").strip("\n") if plan.is_file() else "",
        measures=[(str(row.get("name", "")), _bars(row.get("metrics"))) for row in evaluation.get("rows", [])],
        gains=_bars(evaluation.get("gains")),
        prompts=[str(prompt) for prompt in evaluation.get("prompts", [])],
        schedule=schedule,
        guidance=before,
        watched=watched,
        unseen=unseen,
        how=_how(evaluation.get("made")),
        snippets=snippets(run.adapter / "README.md", f"{address(run.folder)}/adapter"),
    )


def address(folder: Path) -> str:
    """The folder's path relative to the current directory; its name alone if it lies elsewhere."""
    whole = folder.resolve()
    near = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else Path(whole.name)
    return near.as_posix() if near.parts else whole.name


def seconds(rows: Sequence[Row]) -> float | None:
    """How long all updates took together; None where no row says it."""
    found = [value for _, value in series(rows, "seconds") if value is not None]
    return sum(found) if found else None


def _schedule(path: Path) -> tuple[list[float], float | None]:
    """The learned guidance scales and what they started from; nothing for a file that is missing or holds something else."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        guidance = told["guidance"]
        before = guidance if isinstance(guidance, int | float) else guidance.get("scale")
        return [float(scale) for _, scale in told["schedule"]], None if before is None else float(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [], None


def tiles(material: Material) -> list[Tile]:
    """The numbers at the top of the page: the trained reward, held-out rewards, diversity and the time; at most MOST_TILES."""
    found: list[Tile] = []
    if any(values for _, values in material.measures):
        found += _evaluated(material)
    else:
        found += _watched(material.watched) if material.watched and len(material.watched.steps) > 1 else _trained(material.rows)
    ends = edges(series(material.rows, "held_out"))
    if ends and not any(tile.label.startswith("Held-out") for tile in found):
        found.append(_tile("Held-out reward", ends))
    spent = seconds(material.rows)
    if spent is not None:
        skipped = sum(int(value or 0) for _, value in series(material.rows, "skipped"))
        note = f"{len(material.rows)} updates" + (f", {skipped} skipped" if skipped else "")
        found = [*found[: MOST_TILES - 1], Tile(label="Training", after=duration(spent), note=note)]
    return found[:MOST_TILES]


def series(rows: Sequence[Row], key: str, inside: str = "") -> list[tuple[float, float | None]]:
    """A metric's curve, as pairs of step and value. Rows without the metric are left out.

    `inside` is the entry of a metric that is a mapping, such as "terms"; without it such a metric is averaged.
    """
    found: list[tuple[float, float | None]] = []
    for index, row in enumerate(rows):
        value = row.get(key)
        if inside:
            value = value.get(inside) if isinstance(value, Mapping) else None
        elif isinstance(value, Mapping):
            value = sum(item for item in value.values() if isinstance(item, int | float)) / max(len(value), 1)
        if isinstance(value, int | float):
            found.append((float(row.get("step", index + 1)), float(value)))
    return found


def edges(points: Sequence[tuple[float, float | None]]) -> tuple[Bar, Bar, int] | None:
    """The means over the first and the last tenth of a curve (at least one step, at most 50), and how many steps."""
    values = [value for _, value in points if value is not None and math.isfinite(value)]
    if not values:
        return None
    count = min(max(len(values) // 10, 1), 50)
    return _mean(values[:count]), _mean(values[-count:]), count


def trained_metrics(material: Material) -> list[str]:
    """The evaluated metrics that the config's reward names; if it names none of them, the first one."""
    return named_metrics(material) or [key for key in _metrics(material) if not is_diversity(key)][:1]


def named_metrics(material: Material) -> list[str]:
    """The evaluated metrics that the config's reward names."""
    return _named(material, [key for key in _metrics(material) if not is_diversity(key)])


def title(material: Material) -> tuple[str, str]:
    """The page's title, the model and for which reward it was trained, and the line under it, how."""
    config = material.config
    match config:
        case FinetuneConfig(reward=reward) if reward:
            return f"{config.model}, trained for {reward}", f"by the method {phrase(config.method)}"
        case SteerConfig(settings=settings, reward=reward):
            return f"{config.model}, steered for {reward}", f"{settings.gradient} over {settings.over}"
        case DistillConfig(settings=settings):
            return f"{config.model}, distilled into {settings.student_steps} steps", material.folder.resolve().name
        case _:
            return material.folder.resolve().name, ""


def _evaluated(material: Material) -> list[Tile]:
    rows = [(name, values) for name, values in material.measures if values]
    names = [name for name, _ in rows]
    first = rows[names.index("before") if "before" in names else 0]
    last = rows[names.index("after") if "after" in names else -1]
    trained = trained_metrics(material)
    others = [key for key in _metrics(material) if key not in trained and not is_diversity(key)]
    diversities = [key for key in _metrics(material) if is_diversity(key)]
    other = "Held-out, " if _named(material, trained) else ""  # not known to be held out if the config names no metric
    labels = {key: f"Reward, {key}" for key in trained}
    found = []
    for key in [*trained[:1], *others[:1], *diversities, *trained[1:], *others[1:]]:
        if key not in last[1]:
            continue
        label = "Diversity" if key == "diversity" else labels.get(key, f"{other if key in others else ''}{key}")
        before = measured(*first[1][key]) if first is not last and key in first[1] else ""
        gain = material.gains.get(key)
        note = f"change {measured(*gain, signed=True)}" if gain else ""
        found.append(Tile(label=label, before=before, after=measured(*last[1][key]), note=note))
    return found


def _watched(watched: Watched) -> list[Tile]:
    found = []
    for name in ("reward", "held_out", "diversity"):
        if name in watched.names:
            before, after = number(watched.mean(name, 0)), number(watched.mean(name, -1))
            gain = watched.change(name)
            note = f"change {measured(gain.mean, gain.interval, signed=True)}, {len(watched.prompts)} watched prompts"
            found.append(Tile(label=NAMES[name], before=before, after=after, note=note))
    return found


def _trained(rows: Sequence[Row]) -> list[Tile]:
    ends = edges(series(rows, "reward"))
    return [_tile("Reward in training", ends)] if ends else []


def _tile(label: str, ends: tuple[Bar, Bar, int]) -> Tile:
    first, last, count = ends
    note = "first and last value" if count == 1 else f"mean of the first and last {count} values"
    return Tile(label=label, before=measured(*first), after=measured(*last), note=note)


def _evaluation(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} should hold an object with rows, not {type(found).__name__}")
    return found


def _how(made: Any) -> str:
    """Steps, guidance and the adapter's scale of an evaluation's last row."""
    facts = [*made.values()][-1] if isinstance(made, Mapping) and made else None
    if not isinstance(facts, Mapping):
        return ""
    scales = [one.get("scale") for one in facts.get("adapters") or () if isinstance(one, Mapping)]
    told = {"steps": facts.get("steps"), "guidance": facts.get("guidance"), "scale": scales[-1] if scales else None}
    return ", ".join(f"{name} {phrase(value)}" for name, value in told.items() if value is not None)


def _bars(values: Any) -> dict[str, Bar]:
    """{metric: {"mean": m, "interval": i}} as {metric: (m, i)}; a plain number has no interval."""
    found = {}
    for key, value in (values or {}).items():
        mean = value.get("mean") if isinstance(value, Mapping) else value
        half = value.get("interval") if isinstance(value, Mapping) else None
        if isinstance(mean, int | float) and math.isfinite(mean):
            found[str(key)] = (float(mean), float(half) if half and math.isfinite(half) else 0.0)
    return found


def _metrics(material: Material) -> list[str]:
    return list(dict.fromkeys(key for _, values in material.measures for key in values))


def _named(material: Material, metrics: Sequence[str]) -> list[str]:
    reward = _squash(material.config.rewards[0] if material.config and material.config.rewards else "")
    return [key for key in metrics if _squash(key.split(":")[0]) in reward]


def _mean(values: Sequence[float]) -> Bar:
    found = Estimate.of(values)
    return found.mean, found.interval if math.isfinite(found.interval) else 0.0


def is_diversity(key: str) -> bool:
    """Whether a metric is the diversity, which is no reward."""
    return key.lower().startswith("diversity")


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
