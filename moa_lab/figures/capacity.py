"""How many requests fit in a given memory, over what a plan keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from moa_lab.figures import theme


def requests_by_density(found: Mapping[str, Sequence[tuple[float, float]]], dense: float, title: str) -> go.Figure:
    """Requests at once over the plan's density, by engine: pairs of both, in any order. dense: the requests of a dense cache.

    A dotted line shows what the density promises. Raises ValueError where there is no pair.
    """
    if not found or not all(found.values()):
        raise ValueError("there are no requests to draw")
    densities = sorted({density for pairs in found.values() for density, _ in pairs} | {1.0})
    promised = [dense / density for density in densities]
    traces = [
        go.Scatter(x=densities, y=promised, mode="lines", name="dense / density", line={"color": theme.DENSE_STYLE.color, "dash": "dot"})
    ]
    for name, style in theme.series_styles(found).items():
        pairs = sorted(found[name])
        traces.append(
            go.Scatter(
                x=[density for density, _ in pairs], y=[count for _, count in pairs], mode="lines+markers", name=theme.plain(name),
                line={"color": style.color, "dash": style.dash}, marker={"symbol": style.symbol, "size": 8}, cliponaxis=False,
                hovertemplate="<b>%{y:.1f} requests</b> at %{x:.1%}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    return theme.figure(
        traces, title, xaxis={"title": "density of the plan", "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"title": "requests at once", "rangemode": "tozero"}, height=420, showlegend=True,
    )  # fmt: skip
