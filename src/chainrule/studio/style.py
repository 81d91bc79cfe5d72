"""The page's style, beside gradio's own."""

STYLE = """
#title h1 { margin: 0; font-size: 1.35rem; font-weight: 650; line-height: 1.1; }
#title span { font-weight: 350; color: var(--body-text-color-subdued); display: block; font-size: 1rem; }
#about, .told { color: var(--body-text-color); opacity: .75; font-size: .875rem; min-height: 1.3em; white-space: pre-line; }
.shown img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.studio-frame {
  width: 100%; height: max(34rem, 78vh); border: 1px solid var(--border-color-primary); border-radius: 6px; background: #fff;
}
.curve svg { width: 100%; max-width: 60rem; height: auto; font: 12px system-ui, sans-serif; }
.curve svg text { fill: var(--body-text-color-subdued); stroke: none; font-size: 11px; }
.curve svg .value { fill: var(--body-text-color); font-weight: 600; }
.curve svg line { stroke: var(--border-color-primary); }
.curve svg .reference { stroke: var(--body-text-color-subdued); stroke-dasharray: 3 4; }
.curve svg path { fill: none; stroke: var(--color-accent); stroke-width: 2; stroke-linejoin: round; }
.curve svg .raw { stroke-width: 1; opacity: .3; }
.curve svg .end { fill: var(--color-accent); }
"""
