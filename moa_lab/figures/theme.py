"""The common look of all figures: templates for light, dark or either background, colour-blind-safe colours, and shapes beside colours."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "showSendToCloud": False,
    # No upload address, even if an embedding page turns the upload button on.
    "plotlyServerURL": "",
    "responsive": True,
    # Names come from files: a dollar sign in them must not start LaTeX.
    "typesetMath": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    "toImageButtonOptions": {"format": "png", "scale": 2},
}
"""Pass to `fig.show(config=CONFIG)`: no logo, no upload."""

SPAN_SCALE = "Cividis"
"""Spans, scores, shares: magnitudes with a natural maximum."""
INFLUENCE_SCALE = "Viridis"
"""Influence: magnitudes without one."""
DIFFERENCE_SCALE = "PuOr"
"""Differences, always with a symmetric range around 0."""

OUTLINE = "#ff5c39"
"""Lines over a heat-map: visible on every colour of cividis and viridis, on black and on white."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
MIN_HEIGHT = 220
TITLE_HEIGHT = 34
"""Pixels that a figure's title takes; a page that brings its own heading can take them back."""
SCALE_HEIGHT = 58
"""Pixels of a colour bar above the plot."""
LEGEND_HEIGHT = 26
"""Pixels of one line of a legend above the plot."""


@dataclass(frozen=True)
class Ink:
    """Colours for a background: text, quieter text, grid lines, edges of markers; and the box of a hover with its text."""

    text: str
    quiet: str
    grid: str
    edge: str
    box: str
    box_text: str


_LIGHT = Ink("#1f2328", "#59616b", "#e3e6ea", "#ffffff", "#ffffff", "#1f2328")
_DARK = Ink("#e8eaed", "#a9b0ba", "#343a43", "#22262d", "#22262d", "#e8eaed")
# The grey with equal contrast to white and to JupyterLab's #111111: 4.3:1, the best possible for both.
_EITHER = Ink("#797979", "#797979", "rgba(128,128,128,0.28)", "rgba(128,128,128,0)", "#22262d", "#e8eaed")


@dataclass(frozen=True)
class Style:
    """The look of one series in every figure: a colour, and shapes that identify it without colour."""

    color: str
    symbol: str
    dash: str
    pattern: str


# Okabe and Ito's colours with at least 3:1 contrast on both backgrounds; the light ones of the set are left out.
_STYLES = (
    Style("#1a80c4", "circle", "solid", ""),
    Style("#d55e00", "diamond", "dash", "/"),
    Style("#009e73", "triangle-up", "dot", "\\"),
    Style("#b8609a", "star", "dashdot", "x"),
    Style("#a07800", "cross", "longdash", "-"),
    Style("#3f8fbf", "pentagon", "longdashdot", "|"),
)
DENSE_STYLE = Style("#7a808a", "square", "dot", ".")
MAIN_STYLE, UNIFORM_STYLE = _STYLES[:2]
_OTHER_STYLES = _STYLES[2:]


def series_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style per name; "dense", "uniform" and "moa" look the same in every figure, whatever else is drawn."""
    fixed = {"dense": DENSE_STYLE, "uniform": UNIFORM_STYLE, "moa": MAIN_STYLE}
    unique = list(dict.fromkeys(names))
    # Without "moa", the first other name is the subject of the figure and gets the main colour.
    free = (*_OTHER_STYLES,) if "moa" in unique else (MAIN_STYLE, *_OTHER_STYLES)
    others = [name for name in unique if name not in fixed]
    return {**{name: fixed[name] for name in unique if name in fixed}, **{name: _style_of(free, i) for i, name in enumerate(others)}}


def _style_of(free: tuple[Style, ...], index: int) -> Style:
    """The styles in turn; when all are taken they come again with open symbols."""
    style = free[index % len(free)]
    return replace(style, symbol=f"{style.symbol}-open") if index // len(free) % 2 else style


def template(dark: bool | None = None) -> go.layout.Template:
    """The plotly template: transparent, quiet grid, text in the ink of the theme.

    None: unknown, as in a saved notebook, which JupyterLab shows on white or on black; the greys are readable on both.
    """
    ink = _EITHER if dark is None else _DARK if dark else _LIGHT
    quiet = {"color": ink.quiet, "size": 11}
    axis = {
        "gridcolor": ink.grid,
        "linecolor": ink.grid,
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "tickfont": quiet,
        "title": {"font": {**quiet, "size": 12}, "standoff": 8},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "color": ink.text, "size": 12},
            "title": {"font": {"size": 15, "color": ink.text}, "x": 0, "xref": "paper", "y": 0.97, "yref": "container", "yanchor": "top"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": [style.color for style in _STYLES],
            "margin": {"l": 56, "r": 16, "t": TITLE_HEIGHT + SCALE_HEIGHT, "b": 48},
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": ink.box, "bordercolor": ink.quiet, "font": {"color": ink.box_text, "family": FONT}, "align": "left"},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
            "annotationdefaults": {"font": {"color": ink.text, "size": 12}, "showarrow": False},
            "shapedefaults": {"line": {"color": ink.quiet, "width": 1}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": ink.quiet, "activecolor": ink.text},
        },
        data={
            "heatmap": [{"colorbar": {"outlinewidth": 0, "tickfont": quiet, "title": {"font": {**quiet, "size": 12}}}}],
            "scatter": [{"marker": {"line": {"color": ink.edge, "width": 1}}, "error_y": {"color": ink.quiet}}],
            "bar": [{"marker": {"line": {"width": 0}}, "error_y": {"color": ink.text, "thickness": 1.4, "width": 4}}],
        },
    )


def with_theme(fig: go.Figure, dark: bool) -> go.Figure:
    """A copy of `fig` in the dark or light theme; only text and grid colours change."""
    return go.Figure(fig).update_layout(template=template(dark))


def figure(traces: Any, title: str, height: int, **layout: Any) -> go.Figure:
    """A figure readable on white and on black, `height` pixels tall; a colour bar goes between title and plot."""
    fig = go.Figure(traces).update_layout(template=template(), title_text=title, height=height, **layout)
    return fig.update_traces(colorbar_y=1 - TITLE_HEIGHT / height, selector={"type": "heatmap"})


def bar_above(title: str, **options: Any) -> dict[str, Any]:
    """A horizontal colour bar above the plot, which leaves the full width to the cells."""
    place = {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 1.0, "yanchor": "top", "len": 0.6, "thickness": 8}
    return {**place, "xpad": 0, "ypad": 0, "title": {"text": title, "side": "bottom"}, **options}


def plain(text: object) -> str:
    """Text escaped for plotly, whose labels interpret a subset of HTML, links included."""
    return html.escape(str(text), quote=False)


def percent(share: float, digits: int = 0) -> str:
    """`0.5` as `50%`."""
    return f"{100 * share:.{digits}f}%"


def byte_size(count: float) -> str:
    """Bytes with a unit: `23_592_960` as `22.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def bar_marker(style: Style) -> dict[str, Any]:
    """A bar's colour with its pattern drawn over it."""
    pattern = {"shape": style.pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "fgopacity": 0.55, "solidity": 0.18, "size": 7}
    return {"color": style.color, "pattern": pattern}


def head_ticks(count: int) -> dict[str, Any]:
    """Axis settings for an index from 0 to `count` - 1: whole numbers, at most about a dozen."""
    step = next((size for size in (1, 2, 4, 5, 8, 10, 16, 20, 32) if count / size <= 12), 64)
    return {"tick0": 0, "dtick": step, "range": [-0.5, count - 0.5], "showgrid": False}


def cell_gap(rows: int, columns: int) -> int:
    """Pixels between the cells of a heat-map: none where cells are so small that a gap would hide them, and slow the page."""
    return 1 if max(rows, columns) <= 48 else 0


def grid_height(rows: int) -> int:
    """Height in pixels of a heat-map with `rows` rows: cells large enough to point at, at most 720 in all."""
    cell = 28 if rows <= 4 else 20 if rows <= 12 else 13
    return min(max(rows * cell + 140, MIN_HEIGHT), 720)
