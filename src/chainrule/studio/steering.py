"""One image on its way to a higher reward, moment by moment."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from chainrule import rewards
from chainrule.errors import UserError
from chainrule.named import runs_code
from chainrule.settings import Steering
from chainrule.steer import Steered, steer
from chainrule.steer.gradients import GRADIENTS
from chainrule.steer.guided_sampling import GUIDES
from chainrule.steer.kinds import KINDS
from chainrule.steer.steering import check
from chainrule.studio.desk import Asked, Desk, Part, number, whole

VARIABLES = tuple(KINDS)
WAYS = (*GRADIENTS, *GUIDES)
# What the page offers; any other reward may be typed.
OFFERED = ("pickscore", "hpsv2", "aesthetic", "clip:an angry face", "10*pickscore + 2*hpsv2", "symmetry", "compressible")
STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is steered, how, and towards what. Raises UserError for a reward that names code: the page runs none."""

    reward: str
    settings: Steering

    def __post_init__(self) -> None:
        if not self.reward:
            raise UserError("no reward given; write one such as pickscore")
        if runs_code(self.reward):
            raise UserError(f"the reward {self.reward!r} names code, which the page does not run; use chainrule steer for it")
        check(self.settings)

    @classmethod
    def of(
        cls, asked: Asked, reward: str | None, over: str | None, gradient: str | None, updates: float | None, lr: float | None,
        bound: str | None,
    ) -> Wish:  # fmt: skip
        """From the fields of a form; an empty bound is none. Raises UserError for a value that does not fit."""
        values: dict[str, Any] = {
            "over": over or "", "gradient": gradient or "", "updates": whole("updates", updates), "lr": lr,
            "bound": number("bound", bound), "sample_steps": asked.steps, "guidance": asked.guidance,
        }  # fmt: skip
        return cls((reward or "").strip(), Steering(**values))


@dataclass(frozen=True, slots=True)
class Moment:
    """How far steering is: the image before, the best so far, and the reward before and after every update."""

    before: Image.Image
    image: Image.Image
    curve: Sequence[tuple[float, float]]
    about: str
    over: bool = False


def steered(
    desk: Desk, name: str | None, asked: Asked, parts: Sequence[Part], wish: Wish, stop: threading.Event, keep: str | None = None
) -> Iterator[Moment]:  # fmt: skip
    """Steer one image, and yield a moment after every update and one at the end. `stop` ends it after the update under way.

    Whoever stops listening stops the steering too. With `keep` it is a run of that name in the folder. Raises UserError for bad
    input before the first moment.
    """
    out = desk.shelf.free(keep) if keep and keep.strip() else None
    if out and (changed := next((part for part in parts if part.partial or part.scale != 1), None)):
        raise UserError(f"a run says its adapters by name alone: put {changed.adapter} to scale 1 and all steps, or keep no run")
    told: queue.SimpleQueue[Moment | BaseException] = queue.SimpleQueue()
    left = threading.Event()  # nobody listens any more; `stop` may be another steering's by then
    stop.clear()

    def watch(found: Steered) -> str | None:
        told.put(_moment(found, wish))
        return STOPPED if stop.is_set() or left.is_set() else None

    def work() -> None:
        try:
            with desk.busy:
                opened = desk.opened(name)
                reward = rewards.parse(wish.reward, opened.reward_source)
                model = desk.used(opened, parts, asked.steps)
                found = steer(model, [asked.prompt], reward, wish.settings, seeds=[asked.seed], watch=watch, out=out)
            told.put(_moment(found, wish, STOPPED if stop.is_set() else "done", over=True))
        except BaseException as error:
            told.put(error)

    worker = threading.Thread(target=work, name="steering", daemon=True)
    worker.start()
    try:
        while True:
            said = told.get()
            if isinstance(said, BaseException):
                raise said
            yield said
            if said.over:
                return
    finally:
        left.set()
        worker.join()


def _moment(found: Steered, wish: Wish, word: str = "steering", *, over: bool = False) -> Moment:
    curve = [(row["step"], row["reward"]) for row in found.curve]
    before, now = found.rewards_before[0], found.rewards[0]
    done = int(curve[-1][0]) if curve else 0
    far = f"changed by {found.distances[0]:.3f} of the range of a pixel"
    about = f"{word}: update {done} of {wish.settings.updates}; {wish.reward} {before:.4g} → {now:.4g} (best so far), {far}"
    return Moment(found.before[0], found.images[0], curve, about, over)
