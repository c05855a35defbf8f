"""How much a head's rank varies between calibration sets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from scipy.stats import rankdata

from moa_lab.figures import theme


def percentile_ranks(influence: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each head's rank among the heads of its set: float64 (sets, layers, query_heads), 0 the weakest, 100 the strongest, ties shared.

    `influence[set]` is (layers, query_heads), for instance `long_range_influence` of a task and length.
    Raises ValueError for fewer than two sets, and for sets of different shape or with numbers that are not finite.
    """
    if len(influence) < 2:
        raise ValueError(f"influence must hold at least two sets to compare, got {len(influence)}")
    shape = np.shape(next(iter(influence.values())))
    for name, values in influence.items():
        if np.ndim(values) != 2 or np.shape(values) != shape or not np.isfinite(values).all():
            raise ValueError(f"influence[{name!r}] must be finite numbers (layers, query_heads) as in the first set, {shape}")
    ranks = [rankdata(values).reshape(shape) - 1 for values in influence.values()]
    return 100 * np.stack(ranks) / max(int(np.prod(shape)) - 1, 1)


def rank_confidence(influence: Mapping[str, np.ndarray], top: float = 0.1, group_size: int = 1) -> go.Figure:
    """Heat-map of how far a head's percentile rank moves between calibration sets: `z[query_head, layer]`, largest minus smallest.

    Dark heads have stable ranks. A filled marker: among the strongest `top` (a fraction) in every set; an open one: in some. The hover
    shows the rank in each set. Lines separate the groups of `group_size` query heads that share a KV head.
    Raises ValueError as `percentile_ranks` does, and for a `top` that is not between 0 and 1.
    """
    if not 0 < top < 1:
        raise ValueError(f"top must be between 0 and 1, got {top}")
    ranks = percentile_ranks(influence)
    _, layers, heads = ranks.shape
    spread = np.ptp(ranks, axis=0)
    heat = go.Heatmap(
        z=spread.T,
        zmin=0,
        zmax=max(float(spread.max()), 1.0),
        colorscale=theme.SPAN_SCALE,
        xgap=1,
        ygap=1,
        customdata=ranks.transpose(2, 1, 0),
        colorbar=theme.bar_above("rank moves by (percentile points)", nticks=6),
        hovertemplate=(
            "layer %{x} · query head %{y}<br>rank moves by <b>%{z:.0f} points</b>"
            + "".join(f"<br>{theme.plain(name)}: %{{customdata[{index}]:.0f}}" for index, name in enumerate(influence))
            + "<extra>100 = strongest</extra>"
        ),
    )
    fig = theme.figure(
        [heat, *_strongest(ranks >= 100 * (1 - top), top)],
        f"Heads' ranks in {len(influence)} sets",
        xaxis={"title": "layer", **theme.head_ticks(layers)},
        yaxis={"title": "query head", **theme.head_ticks(heads), "range": [heads - 0.5, -0.5]},
        height=theme.grid_height(heads) + theme.LEGEND_HEIGHT,
        showlegend=True,
        margin={"b": 48 + theme.LEGEND_HEIGHT},
        legend={"yref": "container", "y": 0, "yanchor": "bottom"},
    )
    for edge in range(group_size, heads, group_size) if group_size > 1 else ():
        fig.add_hline(y=edge - 0.5, line_width=2)
    return fig


def _strongest(hit: np.ndarray, top: float) -> list[go.Scatter]:
    """Markers on the strongest heads, in all sets and in some. hit: bool (sets, layers, query_heads)."""
    kinds = {"every": ("diamond", hit.all(axis=0)), "some": ("diamond-open", hit.any(axis=0) & ~hit.all(axis=0))}
    traces = []
    for kind, (symbol, where) in kinds.items():
        layer, head = np.nonzero(where)
        marker = {"symbol": symbol, "size": 9, "color": theme.OUTLINE, "line": {"width": 1.5, "color": theme.OUTLINE}}
        name = f"top {theme.percent(top)} in {kind} set{'s' if kind == 'some' else ''}"
        # The hover of the cell beneath shows the numbers.
        traces.append(go.Scatter(x=layer, y=head, mode="markers", marker=marker, name=name, hoverinfo="skip"))
    return traces
