"""The page: fields, buttons and where their answers go. The only file that knows gradio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from chainrule.errors import UserError
from chainrule.studio import showing
from chainrule.studio.desk import MOST_CELLS, Asked, Desk, Part, whole
from chainrule.studio.steering import OFFERED, VARIABLES, WAYS, Wish, steered
from chainrule.studio.style import STYLE

SLOTS = 3  # adapters at a time
MOST_STEPS = 100  # of the slider's length
ONE = "model"  # what uses the model waits in one line
FOLLOWED = 4.0  # seconds between looks at a run under way

Fields = list[Any]


def build(desk: Desk) -> gr.Blocks:
    """The whole page."""
    models = list(desk.shelf.models())
    with gr.Blocks(title="chainrule studio", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as page:
        with gr.Row():
            gr.HTML("<h1>chainrule <span>studio</span></h1>", elem_id="title", min_width=120)
            model = gr.Dropdown(models, value=models[0], label="Model or run", allow_custom_value=True, scale=2)
            prompt = gr.Textbox("a painting of a fox", label="Prompt", max_lines=2, scale=4)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
            steps = gr.Slider(1, MOST_STEPS, 20, step=1, label="Steps", min_width=180)
            guidance = gr.Textbox(label="Guidance", placeholder="its own", min_width=100)
        about = gr.HTML(elem_id="about")
        asked: Fields = [model, prompt, seed, steps, guidance]
        with gr.Tabs():
            with gr.Tab("Adapters") as first:
                slots, mixed = _adapters(desk, asked)
            with gr.Tab("Steer one image") as second:
                kept = _steering(desk, asked, slots)
            with gr.Tab("Report") as third:
                runs = _report(desk)
            with gr.Tab("Vote") as fourth:
                contestants, studies = _votes(desk, asked)
        names = [slot[0] for slot in slots]

        def choices() -> list[Any]:
            shelf, adapters = desk.shelf, list(desk.shelf.adapters())
            every = [shelf.models(), *[["", *adapters]] * SLOTS, shelf.runs(), [showing.BASE, *adapters], shelf.studies()]
            return [gr.update(choices=list(each)) for each in every]

        def look(name: str) -> list[Any]:
            with desk.busy:
                opened = desk.opened(name)
            most = min(MOST_STEPS, opened.model.solver.process.schedule.top)
            return [escape(opened.about), gr.update(value=min(opened.steps, most), maximum=most), desk.own(name) or ""]

        changes = [page.load, mixed.change, kept.change, *(tab.select for tab in (first, second, third, fourth))]
        gr.on(changes, choices, None, [model, *names, runs, contestants, studies], api_name=False, show_progress="hidden")
        gr.on([page.load, model.change], safe(look), model, [about, steps, names[0]], api_name="look", concurrency_id=ONE)
    return page


def safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a user's mistake shown on the page as its one line."""

    @wraps(function)
    def shown(*values: Any) -> Any:
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(_line(error), print_exception=False) from error

    return shown


def _line(error: UserError) -> str:
    return escape(" ".join(str(error).split()), quote=False)


def counting(progress: gr.Progress, total: int, what: str) -> Callable[[], None]:
    """What counts network calls on a bar of the page."""
    done = iter(range(1, 10**9))
    return lambda: progress((min(next(done), total), total), desc=what, unit="calls")


# Adapters


def _slots(steps: gr.Slider) -> list[Fields]:
    """The fields of every adapter: name, scale, first step, the one after the last."""
    found = []
    for number in range(1, SLOTS + 1):
        with gr.Group():
            name = gr.Dropdown([""], value="", label=f"Adapter {number}", allow_custom_value=True)
            scale = gr.Slider(-1, 2, 1, step=0.05, label="Scale, and the steps it is on")
            with gr.Row():
                first = gr.Slider(0, MOST_STEPS, 0, step=1, label="from", min_width=100)
                last = gr.Slider(1, MOST_STEPS, MOST_STEPS, step=1, label="until", min_width=100)
        found.append([name, scale, first, last])
    ends = [field for _, _, *span in found for field in span]
    steps.change(
        lambda most: [gr.update(maximum=most, value=value) for _ in found for value in (0, most)], steps, ends, api_name=False,
        show_progress="hidden",
    )  # fmt: skip
    return found


def parts_of(steps: int, values: tuple[Any, ...]) -> list[Part]:
    """The adapters that the fields of `_slots` say."""
    rows = [values[start : start + 4] for start in range(0, 4 * SLOTS, 4)]
    every = [Part.of(name, scale, first, last, steps) for name, scale, first, last in rows]
    return [part for part in every if part]


def _picture(label: str) -> gr.Image:
    return gr.Image(
        label=label, format="png", interactive=False, elem_classes="shown", height=400, buttons=["download", "fullscreen"]
    )


def _adapters(desk: Desk, asked: Fields) -> tuple[list[Fields], gr.Markdown]:
    with gr.Row():
        with gr.Column(scale=1, min_width=340):
            button = gr.Button("Sample", variant="primary")
            slots = _slots(asked[3])
        with gr.Column(scale=3):
            with gr.Row():
                base, shown = _picture("without adapters"), _picture("with them")
            with gr.Row():
                with gr.Group():
                    cells = gr.Slider(1, MOST_CELLS, 4, step=1, label="Grid, from 0 to the scales in so many steps")
                    draw = gr.Button("Draw the grid")
                with gr.Group():
                    name = gr.Textbox(label="Name of the mix", placeholder="pick-and-symmetry")
                    save = gr.Button("Save the mix")
            saved = gr.Markdown()
            sheet = gr.Image(label="grid of scales", format="png", visible=False, buttons=["download", "fullscreen"])

    def sample(name: str, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008  gradio's way
        wanted = Asked.of(*values[:4])
        parts = parts_of(wanted.steps, values[4:])
        return desk.pictures(name, wanted, parts, counting(progress, (1 + bool(parts)) * wanted.steps, "sampling"))

    def grid(name: str, *values: Any, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        wanted, count = Asked.of(*values[:4]), whole("cells", values[-1])
        parts = parts_of(wanted.steps, values[4:-1])
        total = (count + 1) ** len(parts) * wanted.steps
        return gr.update(value=desk.grid(name, wanted, parts, count, counting(progress, total, "drawing")), visible=True)

    def mix(steps: int, *values: Any) -> str:
        return f"saved: `{desk.save(parts_of(whole('steps', steps), values[:-1]), values[-1])}`; it is among the adapters now"

    fields = [*asked, *[field for slot in slots for field in slot]]
    answers: dict[str, Any] = {"fn": safe(sample), "inputs": fields, "outputs": [base, shown], "concurrency_id": ONE}
    button.click(api_name="sample", **answers)
    asked[1].submit(api_name=False, **answers)
    gr.on([slot[1].release for slot in slots], api_name=False, trigger_mode="always_last", **answers)
    draw.click(safe(grid), [*fields, cells], sheet, api_name="grid", concurrency_id=ONE)
    save.click(safe(mix), [asked[3], *fields[5:], name], saved, api_name="mix", concurrency_id=ONE)
    return slots, saved


# Steering


def _wish() -> Fields:
    """The fields of a `Wish`."""
    reward = gr.Dropdown(list(OFFERED), value=OFFERED[0], label="Reward, or a sum of rewards", allow_custom_value=True)
    with gr.Row():
        over = gr.Dropdown(list(VARIABLES), value="latent", label="Variable", allow_custom_value=True, min_width=130)
        gradient = gr.Dropdown(list(WAYS), value="sdo", label="Gradient", min_width=130)
    with gr.Row():
        updates = gr.Number(20, label="Updates", precision=0, minimum=1, min_width=80)
        lr = gr.Number(0.05, label="Rate", min_width=80)
        bound = gr.Textbox(label="Bound", placeholder="none", min_width=80)
    return [reward, over, gradient, updates, lr, bound]


def _steering(desk: Desk, asked: Fields, slots: list[Fields]) -> gr.HTML:
    fields, stop = [*asked, *[field for slot in slots for field in slot]], threading.Event()
    with gr.Row():
        with gr.Column(scale=1, min_width=340):
            wish = _wish()
            keep = gr.Textbox(label="Keep as a run, under the name", placeholder="empty: do not keep it")
            with gr.Row():
                start = gr.Button("Steer", variant="primary", min_width=100)
                end = gr.Button("Stop", min_width=100)
            told = gr.HTML("<p>The adapters of the first tab are on.</p>", elem_classes="told")
        with gr.Column(scale=3):
            with gr.Row():
                before, image = _picture("before"), _picture("best so far")
            curve = gr.HTML(elem_classes="curve")
    kept = gr.HTML(visible=False)

    def steer(name: str, *values: Any) -> Iterator[Any]:
        try:
            wanted, wish = Asked.of(*values[:4]), Wish.of(Asked.of(*values[:4]), *values[-7:-1])
            for moment in steered(desk, name, wanted, parts_of(wanted.steps, values[4:-7]), wish, stop, values[-1]):
                done = (values[-1] or "") if moment.over else ""
                yield moment.before, moment.image, showing.curve(moment.curve), escape(moment.about), done
        except UserError as error:
            raise gr.Error(_line(error), print_exception=False) from error

    outputs = [before, image, curve, told, kept]
    start.click(steer, [*fields, *wish, keep], outputs, api_name="steer", concurrency_id=ONE, show_progress_on=told)
    end.click(stop.set, None, None, queue=False, api_name="stop")
    return kept


# Reports and votes


def _report(desk: Desk) -> gr.Dropdown:
    with gr.Row():
        runs = gr.Dropdown([], label="Run", allow_custom_value=True, value=None, scale=3)
        follow = gr.Checkbox(label="Follow a run under way", container=False)
    frame, timer = gr.HTML(), gr.Timer(FOLLOWED, active=False)
    seen = gr.State("")

    def again(name: str | None, before: str) -> Any:
        """The report if it says something new: a page that is put in anew begins at its top."""
        now = showing.report(desk.shelf, name) if name else ""
        return (gr.skip(), gr.skip()) if now == before else (now, now)

    runs.input(safe(lambda name: [showing.report(desk.shelf, name)] * 2), runs, [frame, seen], api_name="report")
    timer.tick(safe(again), [runs, seen], [frame, seen], api_name=False, show_progress="hidden")
    follow.change(lambda on: gr.Timer(active=on), follow, timer, api_name=False)
    return runs


def _votes(desk: Desk, asked: Fields) -> tuple[gr.Dropdown, gr.Dropdown]:
    with gr.Accordion("Make a study", open=False):
        with gr.Row():
            who = gr.Dropdown([showing.BASE], label="Contestants", multiselect=True, allow_custom_value=True)
            count = gr.Number(1, label="Images per prompt", precision=0, minimum=1, min_width=80)
            name = gr.Textbox(label="Name of the study", placeholder="pick-or-not")
        prompts = gr.Textbox(label="Prompts, one a line", lines=4, placeholder="a painting of a fox\na photo of two bees")
        make = gr.Button("Sample the pairs", variant="primary")
    with gr.Row():
        with gr.Column(scale=3):
            studies = gr.Dropdown([], label="Study", allow_custom_value=True, value=None)
            tally = gr.Button("Count the saved votes")
        files = gr.File(label="Saved votes", file_count="multiple", file_types=[".json"], height=150)
    told, frame = gr.HTML(elem_classes="told"), gr.HTML()

    def study(
        model: str, seed: Any, steps: Any, guidance: str, who: list[str], count: Any, name: str, text: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:  # fmt: skip
        wanted, each = Asked.of("", seed, steps, guidance), whole("images per prompt", count)
        said = [line.strip() for line in (text or "").splitlines() if line.strip()]
        total = -(-len(said) * each // 16) * len(who or ()) * wanted.steps
        made = showing.make_study(desk, model, wanted, said, each, who or [], name, counting(progress, total, "sampling"))
        return gr.update(choices=list(desk.shelf.studies()), value=made), showing.pairs(desk.shelf, made)

    make.click(
        safe(study), [asked[0], *asked[2:], who, count, name, prompts], [studies, frame], api_name="study", concurrency_id=ONE
    )  # fmt: skip
    studies.input(safe(lambda name: showing.pairs(desk.shelf, name)), studies, frame, api_name="pairs")
    tally.click(
        safe(lambda name, files: escape(showing.result(desk.shelf, name, files or []))), [studies, files], told, api_name="count"
    )  # fmt: skip
    return who, studies


LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", radius_size="sm", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ),
    "css": STYLE,
}  # fmt: skip
"""How the page looks, with fonts that the reader has: nothing is fetched from elsewhere."""
