"""Maps of what KV heads are: their kind by measured pattern, and scores that other methods give them; and two rankings of the heads."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from scipy.stats import rankdata

from moa_lab.figures import theme
from moa_lab.records import KINDS, UNKNOWN

_COLORS = (theme.MAIN_STYLE.color, theme.UNIFORM_STYLE.color, theme.DENSE_STYLE.color, "rgba(128,128,128,0.18)")
_NO_COLOR = "rgba(128,128,128,0.06)"
LETTERED = 2048
"""Heads up to which a cell bears the first letter of its kind."""


def kind_map(kinds: np.ndarray, title: str = "Kinds of heads") -> go.Figure:
    """Heat-map of kinds: `z[kv_head, layer]`, an index into `records.KINDS`, one further for `records.UNKNOWN`; `customdata` its name.

    kinds: (layers, kv_heads) of names. Raises ValueError for another name.
    """
    others = sorted(set(np.unique(kinds)) - {*KINDS, UNKNOWN})
    if others:
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {others[0]!r}")
    named, colors = ((*KINDS, UNKNOWN), (*_COLORS, _NO_COLOR)) if UNKNOWN in kinds else (KINDS, _COLORS)
    index = np.vectorize(named.index)(kinds)
    steps = [each for number, color in enumerate(colors) for each in ((number / len(named), color), ((number + 1) / len(named), color))]
    layers, heads = kinds.shape
    heat = go.Heatmap(
        z=index.T,
        zmin=-0.5,
        zmax=len(named) - 0.5,
        colorscale=steps,
        colorbar=theme.bar_above("kind of head", tickvals=list(range(len(named))), ticktext=list(named)),
        xgap=theme.cell_gap(heads, layers),
        ygap=theme.cell_gap(heads, layers),
        customdata=kinds.T,
        hovertemplate="layer %{x} · KV head %{y}<br><b>%{customdata}</b><extra></extra>",
    )
    if kinds.size <= LETTERED and layers <= 48:
        # Letters beside colours, for who does not tell these apart.
        heat.update(text=np.vectorize(lambda kind: kind[0].upper())(kinds).T, texttemplate="%{text}", textfont={"size": 10})
    return _kv_map(heat, title, layers, heads)


def score_map(values: np.ndarray, title: str, unit: str = "score") -> go.Figure:
    """Heat-map of one number a KV head: `z[kv_head, layer]`. values: (layers, kv_heads)."""
    layers, heads = values.shape
    ranks = rankdata(-values, method="min").reshape(values.shape)
    heat = go.Heatmap(
        z=values.T,
        zmin=min(0.0, float(values.min())),
        zmax=max(float(values.max()), 1e-12),
        colorscale=theme.INFLUENCE_SCALE,
        colorbar=theme.bar_above(unit, tickformat="~g", nticks=6),
        xgap=theme.cell_gap(heads, layers),
        ygap=theme.cell_gap(heads, layers),
        customdata=ranks.T,
        hovertemplate=f"layer %{{x}} · KV head %{{y}}<br><b>%{{z:.3g}}</b>, rank %{{customdata}} of {values.size:,}<extra></extra>",
    )
    return _kv_map(heat, title, layers, heads)


def ranks_compared(ours: np.ndarray, theirs: np.ndarray, ours_title: str, theirs_title: str, kinds: np.ndarray | None = None) -> go.Figure:
    """A marker for every KV head, by its rank in two rankings: lower left is first in both. `customdata[i]` = (layer, KV head).

    ours, theirs: (layers, kv_heads), the larger the earlier; equal ones share a rank. kinds: names of `records.KINDS`, or
    `records.UNKNOWN`, a series each.
    Raises ValueError for arrays of different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"both must be of the same heads, got {ours.shape} and {theirs.shape}")
    across, up = (rankdata(-values).reshape(values.shape) for values in (ours, theirs))
    shown = np.full(ours.shape, "") if kinds is None else kinds
    symbols = ("circle", "star", "square", "circle", "circle-open", "x-thin-open")
    traces = []
    for kind, color, symbol in zip(("", *KINDS, UNKNOWN), (theme.MAIN_STYLE.color, *_COLORS, _NO_COLOR), symbols, strict=True):
        where = shown == kind
        if where.any():
            solid = theme.DENSE_STYLE.color if kind in (KINDS[-1], UNKNOWN) else color
            traces.append(
                go.Scatter(
                    x=across[where],
                    y=up[where],
                    mode="markers",
                    name=kind,
                    marker={"color": solid, "symbol": symbol, "size": 9 if kind == KINDS[0] else 6, "line": {"width": 1, "color": solid}},
                    customdata=np.argwhere(where),
                    hovertemplate=(
                        "layer %{customdata[0]} · KV head %{customdata[1]}<br>rank %{x:.0f} across, %{y:.0f} up"
                        f"<extra>{theme.plain(kind)}</extra>"
                    ),
                )
            )
    end = ours.size + max(1, ours.size // 40)
    axis = {"range": [1 - (end - ours.size), end], "zeroline": False}
    return theme.figure(
        traces,
        f"Ranks of {ours.size:,} KV heads",
        xaxis={"title": f"rank of a KV head<br>{theme.plain(ours_title)}", **axis},
        yaxis={"title": f"rank of a KV head<br>{theme.plain(theirs_title)}", **axis},
        height=380,
        showlegend=kinds is not None,
        margin={"t": theme.TITLE_HEIGHT + theme.LEGEND_HEIGHT, "l": 64},
    )


def _kv_map(heat: go.Heatmap, title: str, layers: int, heads: int) -> go.Figure:
    return theme.figure(
        heat,
        title,
        xaxis={"title": "layer", **theme.head_ticks(layers)},
        yaxis={"title": "KV head", **theme.head_ticks(heads), "range": [heads - 0.5, -0.5]},
        height=theme.grid_height(heads),
    )
