"""Comparisons of studies: differences with intervals, predicted against measured losses, and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from scipy.stats import spearmanr

from moa_lab.figures import theme
from moa_lab.figures.intervals import Bounds, error_bars, told


def differences(found: Mapping[str, Bounds], title: str, unit: str, *, none: float = 0.0, goal: float | None = None) -> go.Figure:
    """A line per label with its value and 95% interval, and a line where there is no difference (a forest plot).

    Filled markers are decided: their interval leaves out `none`, which is 0 for differences and 1 for ratios; open ones are not.
    unit: the axis title; "%" at its end shows shares in percent. goal: a second line. Raises ValueError without labels, and for an
    interval that does not contain its value.
    """
    if not found:
        raise ValueError("found must hold at least one labelled interval")
    for label, bounds in found.items():
        if not bounds.low <= bounds.value <= bounds.high:
            raise ValueError(f"found[{label!r}] is no interval: {bounds.value} does not lie in {bounds.low} to {bounds.high}")
    scale = 100 if _is_percent(unit) else 1
    sides = {
        "decided": {label: bounds for label, bounds in found.items() if not bounds.low <= none <= bounds.high},
        "not decided": {label: bounds for label, bounds in found.items() if bounds.low <= none <= bounds.high},
    }
    traces = [_forest(name, side, scale, is_open=name != "decided") for name, side in sides.items() if side]
    fig = theme.figure(
        traces,
        theme.plain(title),
        xaxis={"title": theme.plain(unit)},
        yaxis={
            "type": "category", "categoryorder": "array", "categoryarray": [theme.plain(label) for label in found],
            "autorange": "reversed", "showgrid": False,
        },
        height=max(theme.MIN_HEIGHT, 140 + 30 * len(found)),
        showlegend=True,
    )  # fmt: skip
    fig.add_vline(x=scale * none, line={"color": theme.DENSE_STYLE.color, "width": 1.5})
    if goal is not None:
        line = {"color": theme.UNIFORM_STYLE.color, "width": 1.5, "dash": "dash"}
        fig.add_vline(x=scale * goal, line=line, name="goal", showlegend=True)
    return fig


def predicted_vs_measured(
    predicted: Sequence[float],
    measured: Sequence[float],
    labels: Sequence[str] | None = None,
    *,
    series: Sequence[str] | None = None,
    title: str = "Predicted and measured",
    x_title: str = "predicted loss (dense = 0)",
    y_title: str = "measured loss (nats per token)",
) -> go.Figure:
    """Two numbers of every plan as a scatter, their rank correlation in the title and in `layout.meta["rank_correlation"]`.

    labels: shown on hover. series: one name per plan, for colour and shape. Raises ValueError for lists of unequal length, or empty.
    """
    labels = [f"plan {index + 1}" for index in range(len(predicted))] if labels is None else labels
    series = ["plans"] * len(predicted) if series is None else series
    if not len(predicted) or len({len(predicted), len(measured), len(labels), len(series)}) > 1:
        sizes = ", ".join(str(len(values)) for values in (predicted, measured, labels, series))
        raise ValueError(f"predicted, measured, labels and series must be equally long and not empty, got {sizes}")
    styles = theme.series_styles(series)
    traces = []
    for name, style in styles.items():
        at = [index for index, other in enumerate(series) if other == name]
        traces.append(
            go.Scatter(
                x=[predicted[index] for index in at],
                y=[measured[index] for index in at],
                mode="markers",
                name=theme.plain(name),
                marker={"color": style.color, "symbol": style.symbol, "size": 8, "opacity": 0.85},
                text=[theme.plain(labels[index]) for index in at],
                hovertemplate="<b>%{text}</b><br>predicted %{x:.3g}, measured %{y:.4g}<extra></extra>",
            )
        )
    axes = {"xaxis": {"title": theme.plain(x_title)}, "yaxis": {"title": theme.plain(y_title)}}
    fig = theme.figure(traces, theme.plain(title), height=420, showlegend=len(styles) > 1, **axes)
    return with_rank_correlation(fig, predicted, measured)


def with_rank_correlation(fig: go.Figure, x: Sequence[float], y: Sequence[float]) -> go.Figure:
    """The figure with Spearman's coefficient in its title and meta; unchanged with too few distinct values (3 in `x`, 2 in `y`)."""
    if len(set(x)) < 3 or len(set(y)) < 2:
        return fig
    correlation = float(spearmanr(x, y).statistic)
    return fig.update_layout(
        meta={"rank_correlation": correlation}, title_text=f"{fig.layout.title.text}; rank correlation {correlation:+.2f}"
    )


def matrix(
    values: Sequence[Sequence[float]] | np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    unit: str,
    row_title: str,
    column_title: str,
    difference: bool = False,
    digits: int | None = None,
) -> go.Figure:
    """A small heat-map with its numbers: `values[row][column]`, NaN where nothing was measured.

    unit: title of the colour bar; "%" at its end shows shares in percent. difference: colours symmetric around 0. digits: decimals
    (None: 0 for percents, else 2). Raises ValueError where the labels do not fit the values, or all are NaN.
    """
    grid = np.asarray(values, dtype=np.float64)
    if grid.shape != (len(rows), len(columns)) or not np.isfinite(grid).any():
        raise ValueError(f"values must be {len(rows)} x {len(columns)} numbers, some of them finite, got shape {grid.shape}")
    if _is_percent(unit):
        grid = 100 * grid
    digits = (0 if _is_percent(unit) else 2) if digits is None else digits
    reach = float(np.nanmax(np.abs(grid))) or 1.0
    colours = {"colorscale": theme.DIFFERENCE_SCALE, "zmin": -reach, "zmax": reach} if difference else {"colorscale": theme.SPAN_SCALE}
    heat = go.Heatmap(
        z=[[None if np.isnan(value) else float(value) for value in row] for row in grid],
        x=[theme.plain(name) for name in columns],
        y=[theme.plain(name) for name in rows],
        xgap=2,
        ygap=2,
        texttemplate=f"%{{z:{'+' if difference else ''}.{digits}f}}",
        hoverongaps=False,
        colorbar=theme.bar_above(theme.plain(unit)),
        hovertemplate=f"%{{y}}, %{{x}}<br><b>%{{z:.{digits + 1}f}}</b><extra></extra>",
        **colours,
    )
    return theme.figure(
        heat,
        theme.plain(title),
        xaxis={"title": theme.plain(column_title), "type": "category", "showgrid": False},
        yaxis={"title": theme.plain(row_title), "type": "category", "autorange": "reversed", "showgrid": False},
        height=max(theme.MIN_HEIGHT, 44 * len(rows) + 160),
    )


def _is_percent(unit: str) -> bool:
    return unit.rstrip(")").endswith("%")


def _forest(name: str, found: Mapping[str, Bounds], scale: int, is_open: bool) -> go.Scatter:
    style = theme.MAIN_STYLE
    return go.Scatter(
        x=[scale * bounds.value for bounds in found.values()],
        y=[theme.plain(label) for label in found],
        error_x=error_bars(found.values(), scale, thickness=1.6, color=style.color),
        mode="markers",
        name=name,
        marker={"color": style.color, "symbol": f"{style.symbol}-open" if is_open else style.symbol, "size": 11, "line": {"width": 2}},
        customdata=[told(bounds, lambda end: f"{scale * end:.3g}", ", ") for bounds in found.values()],
        hovertemplate="%{y}<br><b>%{x:.3g}</b> [%{customdata}]<extra></extra>",
    )
