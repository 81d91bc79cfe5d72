"""The page of a study: one file, no network, mouse, touch or keyboard."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LOSSLESS = 320  # pixels of a side up to which a picture is a PNG; larger ones are JPEGs of quality 95
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one prompt, side by side."""

    prompt: str
    left: Image.Image
    right: Image.Image


def render(pairs: Sequence[Pair], study: str, question: str) -> str:
    """The whole page as one string. It says nowhere which picture is whose."""
    told = [{"prompt": pair.prompt, "left": _embedded(pair.left), "right": _embedded(pair.right)} for pair in pairs]
    data = json.dumps({"study": study, "pairs": told}, ensure_ascii=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(question)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(question)}</h1><p id="prompt"></p></header>
<main id="pair">
<button id="left" aria-label="The left picture"><img alt="left"><kbd>←</kbd></button>
<button id="right" aria-label="The right picture"><img alt="right"><kbd>→</kbd></button>
</main>
<main id="end" hidden><p>That was the last pair. Thank you.</p></main>
<footer>
<button id="none">Neither <kbd>↓</kbd></button>
<button id="back">Back <kbd>⌫</kbd></button>
<button id="save">Save votes <kbd>S</kbd></button>
<p id="progress" role="status"></p>
</footer>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _embedded(picture: Image.Image) -> str:
    held, kind = io.BytesIO(), "PNG" if max(picture.size) <= LOSSLESS else "JPEG"
    picture.convert("RGB").save(held, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode()}"


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #16181c; --soft: #5d636d; --line: #d9dce1; --wash: #f5f6f8; --accent: #2450d6;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #121316; --ink: #eceef1; --soft: #a4aab4; --line: #34373e; --wash: #1b1d21; --accent: #8fabff; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem; max-width: 72rem; min-height: 100vh; display: flex; flex-direction: column; gap: 1rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 1.25rem; font-weight: 600; }
header p { margin: .2rem 0 0; color: var(--soft); overflow-wrap: anywhere; min-height: 1.5em; }
[hidden] { display: none !important; }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; flex: 1; align-content: center; }
#pair button {
  padding: 0; border: 2px solid var(--line); border-radius: .6rem; background: var(--wash); overflow: hidden; cursor: pointer;
}
#pair button:hover, #pair button:focus-visible, #pair button.chosen { border-color: var(--accent); outline: none; }
#pair img { display: block; width: 100%; height: min(66vh, 46vw); object-fit: contain; }
#end { flex: 1; display: grid; place-content: center; font-size: 1.25rem; }
footer { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; }
footer button {
  font: inherit; font-size: .9375rem; color: var(--ink); background: var(--wash); cursor: pointer;
  border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem;
}
footer button:hover, footer button:focus-visible { border-color: var(--accent); outline: none; }
footer p { margin: 0 0 0 auto; color: var(--soft); font-size: .9375rem; }
kbd { font: inherit; font-size: .8125rem; color: var(--soft); }
#pair kbd { display: block; padding: .3rem; }
@media (max-width: 30rem) {
  body { padding: .8rem; }
  #pair { gap: .5rem; grid-template-columns: 1fr; }
  #pair img { height: 36vh; }
  kbd, #pair kbd { display: none; }
}
"""

SCRIPT = """
"use strict";
const { study, pairs } = JSON.parse(document.getElementById("data").textContent);
const part = (id) => document.getElementById(id);
const place = "chainrule-vote-" + study;
let kept = {};
try { kept = JSON.parse(localStorage.getItem(place)) || {}; } catch { /* private windows keep nothing */ }
const voter = kept.voter || Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
const votes = kept.votes || {};
let at = 0;
while (at < pairs.length && String(at) in votes) at += 1;

function show() {
  const over = at >= pairs.length;
  part("pair").hidden = over;
  part("end").hidden = !over;
  part("none").hidden = over;
  part("prompt").textContent = over ? "" : pairs[at].prompt;
  part("progress").textContent = Object.keys(votes).length + " of " + pairs.length + " pairs voted on";
  if (over) { part("save").focus(); return; }
  for (const side of ["left", "right"]) {
    part(side).firstElementChild.src = pairs[at][side];
    part(side).classList.toggle("chosen", votes[at] === side);
  }
}
function vote(side) {
  if (at >= pairs.length) return;
  votes[at] = side;
  try { localStorage.setItem(place, JSON.stringify({ voter, votes })); } catch { /* as above */ }
  at += 1;
  document.activeElement.blur();
  show();
}
function back() { if (at > 0) { at -= 1; show(); } }
function save() {
  const text = JSON.stringify({ study, voter, votes }, null, 1) + "\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "votes-" + voter + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
const keys = {
  ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("none"), Backspace: back, s: save, S: save,
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
for (const side of ["left", "right", "none"]) part(side).addEventListener("click", () => vote(side));
part("back").addEventListener("click", back);
part("save").addEventListener("click", save);
show();
"""
