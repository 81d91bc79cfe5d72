"""The look of a report: one page, one accent color, light or dark as the reader's system is."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #16181c; --soft: #5d636d; --faint: #868c96; --line: #e6e8eb; --wash: #f5f6f8;
  --accent: #2450d6; --alarm: #b3261e; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #0e7490; --c5: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121316; --ink: #eceef1; --soft: #a4aab4; --faint: #7d838d; --line: #2a2d33; --wash: #1b1d21;
    --accent: #8fabff; --alarm: #ff8a80; --c1: #fb923c; --c2: #4ade80; --c3: #c084fc; --c4: #22d3ee; --c5: #facc15;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3.5rem 2rem 6rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
header { margin-bottom: 2rem; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
header .over { font-size: .8125rem; color: var(--faint); margin-bottom: .75rem; }
h1 {
  margin: 0 0 .6rem; font-size: clamp(1.6rem, 4vw, 2.5rem); line-height: 1.15; font-weight: 600;
  letter-spacing: -.025em; overflow-wrap: anywhere;
}
.answers { margin: 0 0 3rem; max-width: 56rem; }
.answers div { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .25rem 2.5rem; padding: .55rem 0; }
.answers dt { font-weight: 600; font-size: .9375rem; }
.answers dd { margin: 0; overflow-wrap: anywhere; }
.answers pre { margin-top: .6rem; padding: .7rem 1rem; }
.alarm { margin: 0 0 1.5rem; padding: .8rem 1rem; border-left: 4px solid var(--alarm); background: var(--wash); max-width: 56rem; }
.alarm strong { color: var(--alarm); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: 1.5rem; margin: 0 0 3.5rem; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .8rem; }
.tiles div:first-child { border-color: var(--accent); }
.tiles dt { font-size: .8125rem; color: var(--soft); overflow-wrap: anywhere; }
.tiles dd { margin: 0; }
.tiles .before { color: var(--faint); font-size: .9375rem; margin-top: .5rem; min-height: 1.45rem; }
.tiles .after { font-size: 1.625rem; line-height: 1.2; font-weight: 500; letter-spacing: -.015em; }
.tiles .after small { font-size: .9375rem; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.tiles div:first-child .after { color: var(--accent); }
.tiles .note { margin-top: .35rem; font-size: .8125rem; color: var(--soft); }
section {
  display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 2.5rem;
  padding: 1.6rem 0 3.4rem; border-top: 1px solid var(--line);
}
h2 { margin: 0; font-size: .9375rem; font-weight: 600; line-height: 1.4; }
h3 { margin: 0 0 .5rem; font-size: .8125rem; font-weight: 500; color: var(--soft); }
section p { margin: 0 0 1rem; color: var(--soft); font-size: .875rem; max-width: 40rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .tick { fill: var(--faint); }
svg .value { font-weight: 600; fill: var(--accent); }
svg .name { font-weight: 600; font-size: 13px; }
svg .grid, svg .track { stroke: var(--line); }
svg .reference { stroke: var(--faint); stroke-dasharray: 3 4; }
svg path { fill: none; stroke: var(--accent); stroke-linejoin: round; }
svg circle { fill: var(--accent); }
svg .band { stroke: none; fill: var(--accent); opacity: .16; }
svg path:not(.band):not(.raw) { stroke-width: 2; }
svg path.c1 { stroke: var(--c1); } svg path.c2 { stroke: var(--c2); } svg path.c3 { stroke: var(--c3); }
svg path.c4 { stroke: var(--c4); } svg path.c5 { stroke: var(--c5); }
svg .band.c1, svg circle.c1, svg text.c1 { fill: var(--c1); } svg .band.c2, svg circle.c2, svg text.c2 { fill: var(--c2); }
svg .band.c3, svg circle.c3, svg text.c3 { fill: var(--c3); } svg .band.c4, svg circle.c4, svg text.c4 { fill: var(--c4); }
svg .band.c5, svg circle.c5, svg text.c5 { fill: var(--c5); }
svg .band.c1, svg .band.c2, svg .band.c3, svg .band.c4, svg .band.c5 { stroke: none; }
svg .raw { stroke-width: 1; opacity: .28; }
svg .mean { stroke-width: 2; }
svg .end { fill: var(--accent); }
svg .bar { stroke-width: 6; stroke-linecap: round; opacity: .3; }
svg .before { stroke: var(--faint); }
svg .after { stroke: var(--accent); }
svg .dot { stroke: none; }
svg .dot.before { fill: var(--faint); }
svg .dot.after { fill: var(--accent); }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 2rem 2.5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin: 0 0 2rem; padding: 0; list-style: none; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .5rem; background: var(--accent); }
.legend .c1 { background: var(--c1); } .legend .c2 { background: var(--c2); } .legend .c3 { background: var(--c3); }
.legend .c4 { background: var(--c4); } .legend .c5 { background: var(--c5); }
.wide { overflow-x: auto; }
figure { margin: 0; overflow-x: auto; }
section > div > * + figure { margin-top: 2rem; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: #ffffff; }
figcaption { margin-top: .45rem; font-size: .8125rem; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem; }
.strip { display: flex; gap: 1rem; overflow-x: auto; padding-bottom: .75rem; scroll-snap-type: x proximity; }
.strip figure { flex: 0 0 13rem; scroll-snap-align: start; }
* + .strip { margin-top: 2rem; }
pre {
  margin: 0; padding: 1.1rem 1.25rem; overflow-x: auto; border-radius: 6px; background: var(--wash);
  font: .8125rem/1.6 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
pre + h3 { margin-top: 1.75rem; }
svg + h3.terms { margin-top: 2.5rem; }
details { margin-top: 1.75rem; font-size: .875rem; color: var(--soft); }
summary { cursor: pointer; }
ol { margin: .75rem 0 0; padding-left: 1.75rem; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
td, th { padding: .42rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { width: 13rem; padding-right: 1.5rem; font-weight: 400; color: var(--soft); overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
.numbers { width: auto; min-width: 100%; font-size: .8125rem; }
.numbers td, .numbers thead th { padding-left: .75rem; text-align: right; white-space: nowrap; }
.numbers th { width: auto; padding-right: 0; overflow-wrap: normal; }
.numbers th:first-child { min-width: 7rem; padding-right: .25rem; }
.numbers thead th { font-weight: 600; color: var(--ink); text-align: right; white-space: normal; }
.numbers thead th:not(:first-child) { vertical-align: bottom; }
.wide + h3 { margin-top: 2rem; }
@media (max-width: 60rem) {
  section { grid-template-columns: minmax(0, 1fr); gap: 1.1rem; }
}
@media (max-width: 44rem) {
  .answers div { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.5rem; }
  .tiles .after { font-size: 1.25rem; }
  figure:not(.strip figure) img { min-width: 38rem; }
  body { padding: 2.5rem 1.25rem 4rem; }
  th { width: 9rem; }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #ffffff; --ink: #16181c; --soft: #5d636d; --faint: #868c96; --line: #e6e8eb; --wash: #f5f6f8; --accent: #2450d6;
    --alarm: #b3261e; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #0e7490; --c5: #a16207;
  }
  body { padding: 0; max-width: none; font-size: 12px; }
  section { grid-template-columns: minmax(0, 1fr); gap: .8rem; padding-bottom: 1.5rem; }
  figure, tr, .small div, .tiles div, svg { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .strip { flex-wrap: wrap; }
  pre { white-space: pre-wrap; }
  .wide, figure { overflow: visible; }
  .numbers { width: 100%; font-size: 9px; }
  .numbers td, .numbers thead th { padding-left: .3rem; white-space: normal; }
}
"""
