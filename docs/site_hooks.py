"""What the site has besides its pages: the Python reference, formulas as MathML, and a check that it fetches nothing."""

from __future__ import annotations

import importlib
import inspect
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import chainrule as cr

HOMES = {  # a page of the reference, and the modules whose public names it has
    "methods": ("chainrule.methods",),
    "rewards": ("chainrule.rewards",),
    "parts": (
        "chainrule.plan", "chainrule.guidance", "chainrule.learned", "chainrule.objective", "chainrule.denoise", "chainrule.cast",
        "chainrule.chain", "chainrule.solve", "chainrule.noise", "chainrule.loop", "chainrule.settings",
    ),
}  # fmt: skip
FETCHES = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*rel=\"?stylesheet[^>]*//|@import"
)
ROW = re.compile(r"^\|.*", re.MULTILINE)
CODE = re.compile(r"`[^`]*`")
OUT = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]*\)")  # a link to a file of the repository that is no page


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference: every public name, where it is defined."""
    pages = {"chainrule": [getattr(cr, name) for name in cr.__all__]}
    for page, modules in HOMES.items():
        pages[page] = [value for module in modules for value in public(importlib.import_module(module))]
    for page, values in pages.items():
        text = "\n\n".join(f"::: {value.__module__}.{value.__qualname__}" for value in dict.fromkeys(values))
        title = {"chainrule": "The main names", "parts": "The parts"}.get(page, page.capitalize())
        files.append(File.generated(config, f"api/{page}.md", content=f"# {title}\n\n{text}\n"))
    return files


def public(module: Any) -> list[Any]:
    """The classes and functions that a module offers: those of its `__all__`, or those it defines without an underscore."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    values = [getattr(module, name) for name in names]
    kinds = [value for value in values if inspect.isclass(value) or inspect.isfunction(value)]
    return [value for value in kinds if hasattr(module, "__all__") or value.__module__ == module.__name__]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file that is no page of the site becomes its text; bars in the code of tables need no backslash here."""
    lines = [
        CODE.sub(lambda code: code[0].replace(r"\|", "|"), line) if line.startswith("|") else line for line in markdown.split("\n")
    ]
    return OUT.sub(r"\1", "\n".join(lines))


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    for tag, left, right, display in (("span", r"\\\(", r"\\\)", "inline"), ("div", r"\\\[", r"\\\]", "block")):
        found = re.compile(rf'<{tag} class="arithmatex">{left}(.*?){right}</{tag}>', re.S)
        html = found.sub(lambda match, display=display: convert(unescape(match[1]), display=display), html)
    return html


def on_post_build(config: Any) -> None:
    """Every public name is on its page, and no page fetches anything from elsewhere."""
    place = Path(config.site_dir)
    told = (place / "api" / "chainrule.html").read_text(encoding="utf-8")
    if missing := [name for name in cr.__all__ if f'id="{getattr(cr, name).__module__}.{name}"' not in told]:
        raise PluginError(f"the reference does not have {', '.join(missing)}")
    for page in place.rglob("*.html"):
        if found := FETCHES.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page} fetches something from elsewhere: {found[0]}")
