"""The frame of the page: HTML skeleton, style, and the script that draws the figures in the reader's theme."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moa_lab.figures.theme import CONFIG, FONT, SCALE_HEIGHT, TITLE_HEIGHT, template

TOP_BARE, TOP_LEGEND = 14, 56


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, its anchor, and HTML that is already escaped."""

    anchor: str
    heading: str
    body: str


def panel(fig: go.Figure, heading: str, alt: str, caption: str = "", name: str = "") -> str:
    """A figure with its heading, its text for screen readers, and a caption (HTML). name: by which a script of the page finds it."""
    data = json.loads(fig.to_json())
    layout = data["layout"]
    # The page supplies the template (light or dark) and the heading.
    layout.pop("template", None)
    layout.pop("title", None)
    scales = [trace["colorbar"] for trace in data["data"] if trace["type"] == "heatmap" and trace.get("showscale", True)]
    has_legend = fig.layout.showlegend is not False and (fig.layout.showlegend or sum(trace.type != "heatmap" for trace in fig.data) > 1)
    for scale in scales:
        scale["y"] = 1
    # No margin for a legend: plotly moves the plot down by as many lines as it needs.
    top = SCALE_HEIGHT if scales else TOP_BARE
    layout["margin"] = {"t": top, "r": 8}
    layout["height"] = height = fig.layout.height - TITLE_HEIGHT - SCALE_HEIGHT + (TOP_LEGEND if has_legend else top)
    # Scrolling on a touch screen must not draw a zoom box; the mode bar still offers zoom.
    layout["dragmode"] = False
    note = f"<figcaption>{caption}</figcaption>" if caption else ""
    drawing = script_safe({"data": data["data"], "layout": layout})
    found_by = f' data-name="{escape(name)}"' if name else ""
    return (
        f'<figure class="panel"><h3>{escape(heading)}</h3>'
        f'<div class="plot"{found_by} role="img" aria-label="{escape(alt)}" style="height:{height}px"></div>'
        f'<script type="application/json" class="plot-data">{drawing}</script>{note}</figure>'
    )


def columns(panels: Iterable[str]) -> str:
    """Panels side by side, below one another where the screen is narrow."""
    return f'<div class="columns">{"".join(panels)}</div>'


def page(title: str, opening: str, sections: Sequence[Section], warnings: Sequence[str] = (), *, style: str = "", script: str = "") -> str:
    """The whole document; `warnings` are its first lines. style: more CSS. script: JavaScript that runs before the figures are drawn."""
    warned = f'<div class="warning" role="note">{"".join(f"<p>{escape(line)}</p>" for line in warnings)}</div>' if warnings else ""
    links = "".join(f'<li><a href="#{section.anchor}">{escape(section.heading)}</a></li>' for section in sections)
    body = "".join(
        f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-heading"><h2 id="{section.anchor}-heading">'
        f"{escape(section.heading)}</h2>{section.body}</section>"
        for section in sections
    )
    themes = script_safe({"light": template(dark=False).to_plotly_json(), "dark": template(dark=True).to_plotly_json(), "config": CONFIG})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{style}</style>
</head>
<body>
<header>{warned}<h1>{escape(title)}</h1>{opening}</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>{body}</main>
<noscript><p class="note">The figures of this page are drawn by the script inside it; the tables need none.</p></noscript>
<script type="application/octet-stream" id="plotly">{packed_plotly()}</script>
<script type="application/json" id="themes">{themes}</script>
<script>{SCRIPT}{script}
moaPage.start();</script>
</body>
</html>
"""


@cache
def packed_plotly() -> str:
    """plotly's JavaScript, gzipped, in base64: two of its five megabytes."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def script_safe(value: Any) -> str:
    """JSON that cannot end the script element around it, whatever the strings hold."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# No network access: the browser enforces it, whatever the inlined scripts do.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)

SCRIPT = """
const moaPage = (() => {
  const { light, dark, config } = JSON.parse(document.getElementById("themes").textContent);
  const plots = [...document.querySelectorAll(".plot")].map(box => ({ box, ...JSON.parse(box.nextElementSibling.textContent) }));
  const wish = matchMedia("(prefers-color-scheme: dark)");
  const draw = ({ box, data, layout }) => Plotly.react(box, data, { ...layout, template: wish.matches ? dark : light }, config);
  const load = async () => {
    const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), letter => letter.charCodeAt(0));
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
  };
  let begin;
  const drawn = new Promise(resolve => { begin = resolve; });
  const start = async () => {
    await load();
    const all = () => Promise.all(plots.map(draw));
    wish.addEventListener("change", all);
    await all();
    document.documentElement.dataset.drawn = plots.length;
    begin();
  };
  return { plots, draw, start, drawn, named: name => plots.find(plot => plot.box.dataset.name === name) };
})();
"""

STYLE = (
    """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2328; --muted: #59616b; --line: #e3e6ea; --accent: #0072b2;
  --bar: #0072b280; --warn: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --page: #15181d; --card: #1c2027; --ink: #e8eaed; --muted: #a9b0ba; --line: #343a43;
  --accent: #5cb3e8; --bar: #5cb3e899; --warn: #f08040; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 """
    + FONT
    + """; }
header, nav, main, .note { max-width: 68rem; margin-inline: auto; padding-inline: clamp(1rem, 4vw, 2rem); }
header { padding-block: clamp(1.75rem, 5vw, 3.5rem) 1.25rem; }
h1 { margin: 0 0 .75rem; font-size: .95rem; font-weight: 600; color: var(--muted); }
h1, h2, h3, p, li, dd { overflow-wrap: anywhere; }
td, th { overflow-wrap: break-word; }
.warning { margin: 0 0 1.5rem; padding: .7rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-left: .3rem solid var(--warn); border-radius: .5rem; }
.warning p { margin: 0; max-width: 52rem; }
.warning p + p { margin-top: .4rem; }
.answer { margin: 0; max-width: 48rem; font-size: clamp(1.4rem, 1rem + 2vw, 2.15rem); line-height: 1.25; font-weight: 400;
  letter-spacing: -.01em; text-wrap: balance; }
.answer strong { font-weight: 650; color: var(--accent); }
.second { max-width: 44rem; margin: 1rem 0 0; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .75rem;
  margin: 1.75rem 0 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: .8rem 1rem .9rem; }
.tiles b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles .who { font-weight: 600; }
.meter { position: relative; display: block; height: .45rem; margin: .5rem 0 .4rem; border-radius: 1rem; background: var(--line); }
.meter i, .meter u { position: absolute; top: 0; bottom: 0; left: 0; border-radius: 1rem; background: var(--of); }
.meter u { top: 50%; bottom: auto; height: 2px; margin-top: -1px; background: var(--ink); opacity: .75; }
small, .small { font-size: .8rem; color: var(--muted); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.25rem; margin: 0; padding: .75rem 0; list-style: none;
  border-block: 1px solid var(--line); font-size: .9rem; }
a { color: var(--accent); text-underline-offset: .2em; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: .2rem; }
main { padding-bottom: 3rem; }
section { padding-top: 2.25rem; }
h2 { margin: 0 0 .35rem; font-size: 1.35rem; font-weight: 620; letter-spacing: -.01em; }
h3 { margin: 0 0 .15rem; font-size: 1rem; font-weight: 620; }
section > p { max-width: 44rem; margin: 0 0 1rem; color: var(--muted); }
.panel, .card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1rem; margin: 0 0 1rem;
  min-width: 0; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1rem; }
.plot { width: 100%; }
figcaption { margin-top: .35rem; font-size: .875rem; color: var(--muted); max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .875rem; color: var(--muted); padding-bottom: .5rem; }
th, td { text-align: left; padding: .4rem .6rem; vertical-align: top; font-weight: 400; }
thead th { font-size: .85rem; color: var(--muted); white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
.short { white-space: nowrap; }
tbody th[scope=rowgroup] { font-weight: 620; padding-top: 1.1rem; }
tbody tr:has(th[scope=rowgroup]) { border-top: 0; }
tbody tr.main th, tbody tr.main b { font-weight: 650; }
td b { margin-right: .6rem; font-weight: 500; }
td.share { background: linear-gradient(var(--bar), var(--bar)) .6rem 100% / calc(var(--of) * (100% - 1.2rem)) 3px no-repeat; }
td small { display: inline-block; line-height: 1.35; }
td small span { margin-right: .6em; white-space: nowrap; }
.narrow table { width: auto; }
.mark { display: inline-block; width: 1.1em; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1.25rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; }
code, pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { overflow: auto; max-height: 24rem; margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: .75rem; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 34rem) {
  .panel, .card { padding: .8rem .65rem; border-radius: .6rem; }
  .tiles { grid-template-columns: 1fr; gap: .5rem; }
  table { font-size: .875rem; }
  th, td { padding: .35rem .25rem; }
  .small, small { font-size: .72rem; }
  thead th { white-space: normal; }
  td b, td small, td small span, .unit { display: block; margin: 0; }
  .wide-label dl { grid-template-columns: 1fr; gap: 0; }
  .wide-label dd { margin-bottom: .5rem; }
}
@media print { body { background: none; } .panel, .card { break-inside: avoid; } nav { display: none; } }
"""
)
