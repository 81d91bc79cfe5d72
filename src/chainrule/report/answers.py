"""The page's first lines: what was trained, whether it worked on prompts it did not train on, what it cost, how it is used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote

from chainrule.config import DistillConfig, FinetuneConfig, SteerConfig
from chainrule.methods import REGISTRY, describe
from chainrule.report.guard import alarm
from chainrule.report.material import Bar, Material, address, is_diversity, named_metrics, seconds
from chainrule.report.watched import Watched
from chainrule.report.words import duration, measured, phrase
from chainrule.report.yardstick import also, how_much
from chainrule.rewards.registry import described

FOX = "a painting of a fox"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A question in a few words, and the answer in a few sentences. `code` is a command that belongs to it."""

    question: str
    answer: str
    code: str = ""


def answers(material: Material) -> list[Answer]:
    """In the order in which they are asked. Those that the folder does not answer are left out."""
    found = [
        Answer(
            question="What was done" if isinstance(material.config, SteerConfig) else "What was trained", answer=_trained(material)
        ),
        Answer(question="Did it work on new prompts?", answer=_worked(material)),
        Answer(question="Is that a lot?", answer=how_much(material) if isinstance(material.config, FinetuneConfig) else ""),
        Answer(question="What it cost", answer=_cost(material)),
        _use(material),
        Answer(question="What the names mean", answer=_names(material)),
    ]
    return [each for each in found if each.answer or each.code]


def _trained(material: Material) -> str:
    config = material.config
    match config:
        case FinetuneConfig(settings=settings):
            what = {"adapter": f"a LoRA adapter of rank {settings.rank}", "guidance": "a guidance scale for every sampling step"}
            parts = [what.get(name, "negative embeddings") for name in settings.learned]
            how = f"by the method {phrase(config.method)}, to raise the reward {config.reward}"
            text = f"{' and '.join(parts)} for {config.model}, {how}"
            return f"{text[0].upper()}{text[1:]}, on {_source(config.prompts)}."
        case DistillConfig(settings=settings):
            return f"A student of {config.model} that makes images in {settings.student_steps} steps, on {_source(config.prompts)}."
        case SteerConfig(settings=settings):
            where = f"steered over their {settings.over} for {config.reward}"
            return f"Images of {config.model} were {where}, on {_source(config.prompts)}."
        case _:
            return ""


def _names(material: Material) -> str:
    """What the method does, and what the rewards that were trained, watched or measured are."""
    config = material.config
    if config is None:
        return ""
    lines = described(" + ".join([*config.rewards, *(key for key in material.gains if not is_diversity(key))]))
    if isinstance(config, FinetuneConfig) and (name := str(config.method["name"])) in REGISTRY:
        words, _, _ = describe(name).rpartition(" `")  # without the drawing
        lines = {name: words.replace("`", "").rstrip(".")} | lines
    return " ".join(f"{name}: {line}." for name, line in lines.items())


def _source(prompts: str | Sequence[str]) -> str:
    if isinstance(prompts, str):
        return f"the prompts {prompts}"
    return f"{len(prompts)} prompts" if len(prompts) != 1 else f"the prompt \u201c{prompts[0]}\u201d"


def _worked(material: Material) -> str:
    """Of the evaluation, else of the pictures of unseen prompts, else that nothing is known."""
    if not isinstance(material.config, FinetuneConfig):
        return ""
    if material.gains:
        named = [key for key in named_metrics(material) if key in material.gains]
        rest = [key for key in material.gains if key not in named]
        gains = {f"{key} (trained)": material.gains[key] for key in named}
        gains |= {key if is_diversity(key) or not named else f"{key} (held out)": material.gains[key] for key in rest}
        new = _new(material)
        doubt = {True: "", False: " Some of them were trained on, so this says little about others."}
        unsure = " The run does not say whether it was trained on them."
        where = f"{len(material.prompts)} prompts{' that it was not trained on' * (new is True)}"
        doubted = unsure if new is None else doubt[new]
        return f"{_verdict(material, gains, bool(named))} On {where}: {_changes(gains)}.{doubted} {also(material)}".strip()
    some = material.unseen
    if some and "reward" in some.names:
        names = {"reward": "the trained reward", "held_out": "the held-out reward", "diversity": "diversity"}
        gains = {called: _bar(some, name) for name, called in names.items() if name in some.names}
        where = f"{len(some.prompts)} prompts that it was not trained on, one image each"
        return f"{_verdict(material, gains, True)} On {where}: {_changes(gains)}. {also(material)}".strip()
    return f"Not measured.{' The second command below does it.' * bool(_test(material.config.prompts))}"


def _bar(some: Watched, name: str) -> Bar:
    found = some.change(name)
    return found.mean, found.interval


def _verdict(material: Material, gains: dict[str, Bar], trained: bool) -> str:
    """Whether the trained reward, the first of the gains if `trained`, rose by more than chance, and what the others say of it."""
    if not trained:
        return "The trained reward was not measured."
    (_, (mean, half)), *rest = gains.items()
    if not half or abs(mean) <= half:
        moved = "rose" if mean > 0 else "fell"
        why = "the interval reaches zero" if half else "one prompt has no interval"
        return f"Not shown: the reward {moved}, but {why}, so it may be chance."
    if mean < 0:
        return "No: the reward fell."
    if alarm(material.watched):
        return "Its reward rose there too, but see the warning."
    if fell := [name for name, (change, interval) in rest if interval and change < -interval]:
        return f"Its reward rose, but at a price: {' and '.join(fell)} fell."
    others = [change > interval > 0 for name, (change, interval) in rest if not is_diversity(name)]
    if not others:
        return "Its reward rose. No other reward was measured, so whether the pictures are better is for you to see."
    return (
        "Yes: the trained reward and another rose by more than chance."
        if any(others)
        else "Its reward rose. That other rewards rose too is not shown: their intervals reach zero."
    )


def _changes(gains: dict[str, Bar]) -> str:
    """How much each changed: "the trained reward +1.35 ± 0.53, hpsv2:tiny +0.028 ± 0.014 (95% intervals)"."""
    return ", ".join(f"{name} {measured(*gain, signed=True)}" for name, gain in gains.items()) + " (95% intervals)"


def _new(material: Material) -> bool | None:
    """Whether the evaluation's prompts are all new to the run; None if it does not say."""
    config = material.config
    if not isinstance(config, FinetuneConfig) or not material.prompts:
        return None
    asked = set(material.prompts)
    if not isinstance(config.prompts, str):
        return not asked & set(config.prompts)
    known = set(material.unseen.prompts) if material.unseen else set()
    watched = set(material.watched.prompts) - known if material.watched else set()
    if asked & watched:
        return False
    return True if asked & known and _test(config.prompts) else None


def _test(prompts: str | Sequence[str]) -> str:
    """The half of the prompts that was not trained on, as it is asked for: "animals:test" of "animals:train"; "" for others."""
    found = re.fullmatch(r"(.+):train((?:@\d+)?(?: as .*)?)", prompts, re.S) if isinstance(prompts, str) else None
    return f"{found[1]}:test{found[2]}" if found else ""


def _cost(material: Material) -> str:
    spent = seconds(material.rows)
    if spent is None:
        return ""
    updates, made = len(material.rows), material.environment
    config = material.config
    settings = getattr(config, "settings", None)
    images = f" of {settings.batch} images" if settings is not None and hasattr(settings, "batch") else ""
    where = f" on {made['device']}" if made.get("device") else ""
    each = f"{updates} update{'s' * (updates != 1)}{images}, {duration(spent / max(updates, 1))} each{where}"
    return f"{duration(spent)} of training: {each}."


def _use(material: Material) -> Answer:
    if not (material.folder / "adapter").exists() or isinstance(material.config, DistillConfig):
        return Answer(question="", answer="")
    where = quote(address(material.folder))
    commands = [f"chainrule sample {where} --prompts {quote(FOX)}"]
    if not material.gains and isinstance(material.config, FinetuneConfig):
        test = _test(material.config.prompts)
        commands += [f"chainrule eval {where} --prompts {quote(test)}"] if test else []
    also = " The code for diffusers is under \u201cUse it\u201d." if material.snippets else ""
    return Answer(question="How to use it", answer=f"On the command line, or in Python.{also}", code="\n".join(commands))
