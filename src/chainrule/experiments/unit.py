"""One run of a table: what decides its numbers, the key that is a hash of it, and the folder its result lies in.

The names are `chainrule train`'s and `chainrule steer`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from chainrule.errors import UserError, unknown
from chainrule.experiments.table import Row, Table, Values
from chainrule.files import digest
from chainrule.methods import read as read_method
from chainrule.methods import spelled
from chainrule.prompts import prompts as read_prompts
from chainrule.report.tables import slug
from chainrule.settings import Finetuning, Steering

VERSIONS = ("chainrule", "torch", "diffusers", "transformers", "peft")
RESULT = "evaluation.json"
OPENING = {"model": "tiny-emoji", "adapter": None, "solver": None}  # the solver is that of training
OWN: dict[str, Values] = {  # what a task takes besides the library's settings, and what stands for what is not given
    "finetune": {**OPENING, "student": None, "method": "draft-lv", "reward": None, "prompts": "animals:train"},
    "steer": {**OPENING, "reward": None, "prompts": [""], "seeds": None, "images": None, "unit": "one", "counts": None,
              "parts": None},
    "cost": {"model": "tiny-emoji", "gradient": "sdo", "prompts": [""], "sample_steps": 50, "rounds": 3},
}  # fmt: skip
OWN["evaluate"] = {**OWN["finetune"], "trained": None}  # the label of the row whose run is measured
MEASURED: Values = {"prompts": "animals:test", "rewards": None, "seeds": [0, 1, 2, 3], "sample_steps": None, "guidance": None,
                    "best_of": None, "template": None, "scale": None, "adapter_steps": None}  # fmt: skip
# Settings that change no number, so that they are no part of a key.
SILENT = ("memory", "micro_batch", "sample_every", "save_every", "best", "tracker", "rounds")
# Settings whose values are always in a key. A later one is in it where it is not its default, so that older results stay valid.
DECIDE = (
    "updates", "batch", "accumulate", "lr", "schedule", "weight_decay", "clip", "rank", "ema", "kl", "sample_steps", "guidance",
    "seed", "patience", "stage_steps", "plateau", "over", "gradient", "optimizer", "keep", "bound", "renormalize", "strength",
)  # fmt: skip
FILE = re.compile(r"(?<![\w./-])[\w./~-]+\.(?:png|jpe?g|webp|py|safetensors|txt|csv|jsonl?)\b")


@dataclass(frozen=True, slots=True)
class Unit:
    """One row with one seed. `config` holds what decides the numbers, `settings` what the library is called with."""

    table: str
    label: str
    task: str
    seed: int | None
    config: Values
    settings: Values
    measure: Values
    recorded: dict[str, float]
    of: Unit | None = None  # the run whose adapter is measured, where this one trains none of its own

    @property
    def key(self) -> str:
        """A hash of the config and of the versions of the packages that compute."""
        text = json.dumps({"config": self.config, "versions": versions()}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def folder(self, root: Path) -> Path:
        """Where the result is, or will be. Rows of the same config have the same result, whatever they are called."""
        name = slug(self.label, *(() if self.seed is None else (self.seed,)))
        return next((place for place in sorted(root.glob(f"*-{self.key}")) if place.is_dir()), root / f"{name}-{self.key}")

    def done(self, root: Path) -> bool:
        """Whether the result is there."""
        return (self.folder(root) / RESULT).is_file()

    @property
    def title(self) -> str:
        """What the run is called."""
        return self.label if self.seed is None else f"{self.label}, seed {self.seed}"


@cache
def versions() -> dict[str, str]:
    """The versions that a result belongs to."""
    return {name: metadata.version(name) for name in VERSIONS}


def units(table: Table) -> list[Unit]:
    """Every run of the table, a row after the other. Raises UserError for a setting no task knows, and for a wrong value."""
    found: list[Unit] = []
    for label, row in table.rows.items():
        task = row.task or table.task
        alone = task == "cost" or (task == "evaluate" and not row.settings.get("trained"))
        seeds: Sequence[int | None] = [None] if alone else row.seeds or table.seeds
        for seed in seeds:
            try:
                found.append(_unit(table, label, row, task, seed))
            except UserError as error:
                raise UserError(f"{label!r} of the table {table.name}: {error}") from error
    return [_measuring(unit, found) if unit.settings.get("trained") else unit for unit in found]


def _measuring(unit: Unit, every: Sequence[Unit]) -> Unit:
    """A unit that measures another row's run of the same seed, whose key is part of its own."""
    label = unit.settings["trained"]
    run = next((other for other in every if other.label == label and other.seed == unit.seed), None)
    if run is None or run.task != "finetune":
        trained = [other.label for other in every if other.task == "finetune" and other.seed == unit.seed]
        raise unknown(f"trained row of {unit.label!r} in the table {unit.table}", str(label), trained)
    return replace(unit, config=unit.config | {"trained": run.key}, of=run)


def _unit(table: Table, label: str, row: Row, task: str, seed: int | None) -> Unit:
    layers = [table.settings, row.settings]
    if seed is not None:
        layers += [table.by_seed.get(seed, {}), row.by_seed.get(seed, {})]
    given: Values = {key: value for layer in layers for key, value in layer.items()}
    measure = table.measure | row.measure
    files = _files([given, measure], table.place)
    given, measure = _replaced(given, files), _replaced(measure, files)
    folders = {given[key]: table.place / Path(given[key]).expanduser() for key in ("adapter", "student") if given.get(key)}
    folders = {name: place.resolve() for name, place in folders.items() if place.is_dir()}
    given |= {key: str(folders[given[key]]) for key in ("adapter", "student") if given.get(key) in folders}
    if task in ("finetune", "evaluate"):
        config, settings, measure = _trained(task, given, measure, seed)
    elif task == "steer":
        config, settings = _steered(given, measure, seed or 0)
    else:
        config, settings = _costed(given)
    # A key must not depend on where a file lies, but on what it holds.
    config = _replaced(config, {whole: name for name, whole in files.items()})
    config |= {key: name for name, place in folders.items() for key in ("adapter", "student") if config.get(key) == str(place)}
    held = {name: hashlib.sha256(Path(whole).read_bytes()).hexdigest() for name, whole in files.items()}
    held |= {name: digest(_weights(place)) for name, place in folders.items()}
    if held:
        config |= {"files": held}
    return Unit(table.name, label, task, seed, config, settings, measure, row.recorded)


def _split(task: str, given: Values, library: Sequence[str]) -> tuple[Values, Values]:
    """A task's own keys, and the library's settings. Raises UserError for a key of neither."""
    own = OWN[task]
    for key in given:
        if key not in own and key not in library:
            raise unknown("setting", key, [*own, *library])
    return own | {key: value for key, value in given.items() if key in own}, {k: v for k, v in given.items() if k not in own}


def _deciding(made: Finetuning | Steering) -> Values:
    """What of the library's settings decides numbers, defaults included."""
    fields = type(made).model_fields
    deciding = {key: value for key, value in made if key in DECIDE or value != fields[key].default}
    return {key: value for key, value in deciding.items() if value is not None and key not in SILENT}


def _trained(task: str, given: Values, measure: Values, seed: int | None) -> tuple[Values, Values, Values]:
    own, rest = _split(task, given, list(Finetuning.model_fields))
    settings = rest if seed is None else rest | {"seed": seed}
    decides = _deciding(Finetuning(**settings))
    for key in measure:
        if key not in MEASURED:
            raise unknown("key of measure", key, MEASURED)
    measured = MEASURED | measure
    if isinstance(measured["rewards"], str):
        measured["rewards"] = [measured["rewards"]]
    if not measured["rewards"]:
        raise UserError("measure says no rewards; add them, as in measure: {rewards: [pickscore:tiny]}")
    for key in ("sample_steps", "guidance"):
        measured[key] = measured[key] if measured[key] is not None else decides.get(key)
    config: Values = {"task": task, **_opened(own), "measure": _given(measured | {"prompts": read_prompts(measured["prompts"])})}
    if task == "evaluate":
        return config, {key: own[key] for key in (*OPENING, "trained")}, measured
    if not own["reward"]:
        raise UserError("no reward given; add reward to the settings")
    method = read_method(own["method"])
    config |= {
        "method": {"name": spelled(method)["name"], **json.loads(json.dumps(asdict(method), default=str))},  # type: ignore[call-overload]
        "reward": own["reward"], "prompts": read_prompts(own["prompts"]), "settings": decides,
    }  # fmt: skip
    return config | _given({"student": own["student"]}), own | {"settings": settings}, measured


def _steered(given: Values, measure: Values, seed: int) -> tuple[Values, Values]:
    own, settings = _split("steer", given, list(Steering.model_fields))
    decides = _deciding(Steering(**settings))
    parts = []
    for number, part in enumerate(own["parts"] or [{}]):
        for key in part:
            if key not in ("reward", "prompts", "seeds", "images", "counts", "measure"):
                raise unknown("key of a part", key, ["reward", "prompts", "seeds", "images", "counts", "measure"])
        one = {key: part.get(key, own[key]) for key in ("reward", "prompts", "seeds", "images", "counts")}
        if not one["reward"]:
            raise UserError(f"part {number + 1} has no reward; add reward to the settings, or to the part")
        one["prompts"] = [one["prompts"]] if isinstance(one["prompts"], str) else list(one["prompts"])
        count = max(len(one["prompts"]), len(one["images"] or ()))
        one["seeds"] = one["seeds"] or [count * seed + k for k in range(count)]
        parts.append(_given(one) | {"measure": measure | part.get("measure", {})})
    if not any(part["measure"] for part in parts):
        raise UserError("measure is empty; say what to measure, as in measure: {clip: clip:tiny}")
    config = {"task": "steer", **_opened(own), "unit": own["unit"], "parts": parts, "settings": decides}
    return config, {key: own[key] for key in (*OPENING, "unit")} | {"parts": parts, "settings": settings}


def _costed(given: Values) -> tuple[Values, Values]:
    own, _ = _split("cost", given, ())
    return {"task": "cost", **{key: value for key, value in own.items() if key not in SILENT}}, own


def _opened(own: Values) -> Values:
    return {key: own[key] for key, default in OPENING.items() if key == "model" or own[key] != default}


def _given(values: Values) -> Values:
    return {key: value for key, value in values.items() if value is not None}


def _files(values: Any, place: Path) -> dict[str, str]:
    """The files that texts name, relative to the table: their whole paths."""
    if isinstance(values, str):
        found = {name: (place / Path(name).expanduser()).resolve() for name in FILE.findall(values)}
        return {name: str(file) for name, file in found.items() if file.is_file()}
    inside = values.values() if isinstance(values, Mapping) else values if isinstance(values, list | tuple) else ()
    return {name: whole for value in inside for name, whole in _files(value, place).items()}


def _weights(folder: Path) -> list[Path]:
    """The files of an adapter folder, or of a run's, that decide what it answers."""
    inside = folder / "adapter" if (folder / "adapter").is_dir() else folder
    return sorted(file for file in inside.rglob("*") if file.suffix in (".safetensors", ".json"))


def _replaced(values: Any, names: Mapping[str, str]) -> Any:
    """The same values with other names for files."""
    if isinstance(values, str):
        known = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        return re.sub(rf"(?<![\w./~-])(?:{known})", lambda found: names[found[0]], values) if names else values
    if isinstance(values, Mapping):
        return {key: _replaced(value, names) for key, value in values.items()}
    return [_replaced(value, names) for value in values] if isinstance(values, list | tuple) else values
