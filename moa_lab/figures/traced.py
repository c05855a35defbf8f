"""What every KV head has to do with one token, as a map."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme


def token_map(values: np.ndarray, spans: np.ndarray, cut: np.ndarray, title: str, unit: str) -> go.Figure:
    """Heat-map of `values` (layers, kv_heads), symmetric around 0: `z[kv_head, layer]`, `customdata` = (layer, head, span, short by).

    spans: tokens that each head keeps. cut: tokens by which each misses its source, 0 where it sees it; such heads are crossed.
    Raises ValueError for arrays of different shapes.
    """
    if not values.shape == spans.shape == cut.shape or values.ndim != 2:
        raise ValueError(f"values, spans and cut must be of one shape (layers, kv_heads), got {values.shape}, {spans.shape}, {cut.shape}")
    layers, heads = values.shape
    reach = max(float(np.abs(values).max()), 1e-6)
    details = np.stack([*np.meshgrid(np.arange(layers), np.arange(heads)), spans.T, cut.T], axis=-1)
    heat = go.Heatmap(
        z=values.T,
        zmin=-reach,
        zmax=reach,
        colorscale=theme.DIFFERENCE_SCALE,
        reversescale=True,
        colorbar=theme.bar_above(unit),
        customdata=details,
        xgap=1,
        ygap=1,
        hovertemplate=(
            f"layer %{{customdata[0]}} · KV head %{{customdata[1]}}<br><b>%{{z:+.3f}}</b> {unit}<br>keeps %{{customdata[2]:,}} tokens, "
            "misses its source by %{customdata[3]:,}<extra></extra>"
        ),
    )
    layer, head = np.nonzero(cut > 0)
    crosses = go.Scatter(
        x=layer, y=head, mode="markers", name="cut", hoverinfo="skip",
        marker={"symbol": "x-thin-open", "size": 8, "color": theme.DENSE_STYLE.color, "line": {"width": 1.5, "color": "#7a808a"}},
    )  # fmt: skip
    return theme.figure(
        [heat, crosses],
        title,
        xaxis={"title": "layer", **theme.head_ticks(layers)},
        yaxis={"title": "KV head", **theme.head_ticks(heads), "range": [heads - 0.5, -0.5]},
        height=theme.grid_height(heads),
        showlegend=False,
    )
