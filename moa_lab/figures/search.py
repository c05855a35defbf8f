"""A search while it runs: hypervolume and archive by generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme


def hypervolume_curve(
    volumes: Mapping[str, Sequence[float]],
    seconds: Mapping[str, Sequence[float]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> go.Figure:
    """Hypervolume after each generation, one line per search: `volumes[name][0]` is that of generation 1.

    All use one reference point; the unit is the product of the goals' units. `seconds`: from the start of a search to the end of each
    generation, shown on hover, the total in the legend. `levels`: hypervolumes of finished fronts, drawn as horizontal lines.
    Raises ValueError for a search without generations, with numbers that are not finite, or with seconds of another length.
    """
    times = {name: seconds.get(name) if seconds else None for name in volumes}
    _check(volumes, times)
    styles = theme.series_styles([*volumes, *(levels or {})])
    traces = [_search(name, values, times[name], styles[name]) for name, values in volumes.items()]
    last = max(len(values) for values in volumes.values())
    traces += [_level(name, value, last, styles[name]) for name, value in (levels or {}).items()]
    return theme.figure(
        traces,
        "Hypervolume of the front, by generation",
        xaxis={"title": "generation", "range": [0.5 - 0.02 * last, last + 0.5 + 0.02 * last]},
        yaxis={"title": "hypervolume (product of the goals,<br>more is better)", "tickformat": "~g"},
        height=360,
        margin={"t": theme.TITLE_HEIGHT + theme.LEGEND_HEIGHT},
        showlegend=True,
    )


def archive_scatter(values: np.ndarray, goals: Sequence[str], generation: int) -> go.Figure:
    """The non-dominated plans of a search after a generation: values (plans, goals), drawn in the first two goals.

    Smaller is better in both. Raises ValueError for fewer than two goals, and for values without one column per goal.
    """
    if len(goals) < 2 or values.ndim != 2 or values.shape[1] != len(goals):
        raise ValueError(f"values must be (plans, goals) of at least two goals, got {values.shape} for {', '.join(goals) or 'none'}")
    style = theme.MAIN_STYLE
    points = go.Scatter(
        x=values[:, 0], y=values[:, 1], mode="markers", marker={"color": style.color, "symbol": style.symbol, "size": 8},
        hovertemplate="%{x:.3~g}, %{y:.3~g}<extra></extra>", cliponaxis=False,
    )  # fmt: skip
    across, up = (f"predicted loss (dense = 0)<br>{theme.plain(name)}" for name in goals[:2])
    return theme.figure(
        points, f"Generation {generation:,}: {len(values):,} plans", xaxis={"title": across}, yaxis={"title": up}, height=360,
        margin={"t": theme.TITLE_HEIGHT + theme.LEGEND_HEIGHT},
    )  # fmt: skip


def _search(name: str, values: Sequence[float], seconds: Sequence[float] | None, style: theme.Style) -> go.Scatter:
    after = "" if seconds is None else "<br>after %{customdata:.3~g} s"
    return go.Scatter(
        x=np.arange(1, len(values) + 1),
        y=list(values),
        # A step curve: nothing is found between two generations.
        line={"color": style.color, "dash": style.dash, "width": 2, "shape": "hv"},
        marker={"color": style.color, "symbol": style.symbol, "size": 6},
        mode="lines+markers",
        name=theme.plain(name) + ("" if seconds is None else f", {seconds[-1]:.2g} s"),
        customdata=None if seconds is None else list(seconds),
        hovertemplate=f"<b>{theme.plain(name)}</b>, generation %{{x}}{after}<br>hypervolume %{{y:.4~g}}<extra></extra>",
    )


def _level(name: str, value: float, last: int, style: theme.Style) -> go.Scatter:
    return go.Scatter(
        x=[1, last],
        y=[value, value],
        mode="lines+markers",
        line={"color": style.color, "dash": style.dash, "width": 2},
        marker={"color": style.color, "symbol": style.symbol, "size": 9},
        name=theme.plain(name),
        hovertemplate=f"<b>{theme.plain(name)}</b><br>hypervolume %{{y:.4~g}}<extra></extra>",
    )


def _check(volumes: Mapping[str, Sequence[float]], times: Mapping[str, Sequence[float] | None]) -> None:
    if not volumes:
        raise ValueError("volumes must hold at least one search")
    for name, values in volumes.items():
        if not len(values) or not np.isfinite(values).all():
            raise ValueError(f"volumes[{name!r}] must hold a finite number per generation, got {list(values)[:5]}")
        seconds = times[name]
        if seconds is not None and len(seconds) != len(values):
            raise ValueError(f"seconds[{name!r}] holds {len(seconds)} times for {len(values)} generations")
