"""A score over a number that was varied: a density, whole heads, bits, tokens of a floor, calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.intervals import error_bars, told
from moa_lab.figures.measurements import metric_label
from moa_lab.records import Measurement

Of = str | Callable[[Measurement], object]
"""A value of a row: the name of a field or of an entry of its detail, or a function of the row."""


def family(row: Measurement) -> str:
    """The family of a row's plan: `moa` of `moa-25`, `moa-50`, ...; a name without a number is its own."""
    return row.plan.rpartition("-")[0] or row.plan


def score_by_density(rows: Iterable[Measurement], task: str, length: int) -> go.Figure:
    """One score at one length over the density there, a line per family of plans with 95% intervals; dense is a horizontal line.

    Plans named `moa-25`, `moa-50`, ... are the family `moa`. Raises ValueError when nothing was measured.
    """
    chosen = [row for row in rows if row.task == task and row.length == length]
    if not chosen:
        raise ValueError(f"no rows of task {task!r} at {length} tokens")
    alone = {name for name in map(family, chosen) if sum(family(row) == name for row in chosen) == 1}

    def kept(row: Measurement) -> float | None:
        # The dense model is drawn as a horizontal line to compare with.
        return None if row.density >= 1 and family(row) in alone else 100 * row.density

    title = f"density at {length:,} tokens (% of the dense KV cache)"
    fig = score_by(chosen, kept, title, what=f"{task}, {length:,} tokens")
    return fig.update_traces(x=[0, 100], selector={"mode": "lines"}).update_xaxes(range=[0, 103])


def loss_by_density(densities: Sequence[float], losses: Mapping[str, Sequence[float]], n_tokens: int) -> go.Figure:
    """Predicted loss of the best plan for every density, a line per goal (0 dense, 1 with every head at the shortest rule).

    densities: as shares, at length `n_tokens`, ascending. Raises ValueError for a goal with more or fewer losses than densities.
    """
    for name, values in losses.items():
        if len(values) != len(densities):
            raise ValueError(f"goal {name!r} has {len(values)} losses for {len(densities)} densities")
    styles = theme.series_styles(losses)
    traces = [
        go.Scatter(
            x=[100 * density for density in densities],
            y=list(values),
            mode="lines",
            name=theme.plain(name),
            line={"color": styles[name].color, "dash": styles[name].dash, "width": 2},
            hovertemplate="%{y:.3f} at %{x:.1f}%",
        )
        for name, values in losses.items()
    ]
    return theme.figure(
        traces,
        "Predicted loss by density",
        xaxis={"title": f"density at {n_tokens:,} tokens (% of the dense KV cache)", "range": [0, 103]},
        yaxis={"title": "predicted loss (dense = 0)", "rangemode": "tozero"},
        height=400,
        showlegend=True,
    )


def score_by(rows: Iterable[Measurement], x: Of, x_title: str, *, series: Of = family, what: str = "", log: bool = False) -> go.Figure:
    """One score over a number, a line per series with 95% intervals; a row without the number is a horizontal line.

    x: the number of a row, for instance "density", "whole_heads" of its detail, or a function. x_title: with the unit. series: the line
    of a row. what: what was scored, for the title (empty: the tasks and lengths of `rows`). log: logarithmic x axis.
    Raises ValueError for rows of several metrics, and where no row has the number.
    """
    rows = list(rows)
    metrics = {row.metric for row in rows}
    if len(metrics) != 1:
        raise ValueError(f"rows must be of one metric, got {', '.join(sorted(metrics)) or 'none'}")
    placed = [(row, _number(_of(row, x))) for row in rows]
    across = [at for _, at in placed if at is not None]
    if not across:
        raise ValueError(f"no row has the number that x names: {x!r}")
    label, unit = metric_label(metrics.pop())
    lines: dict[str, list[tuple[Measurement, float | None]]] = {}
    for row, at in placed:
        lines.setdefault(str(_of(row, series)), []).append((row, at))
    styles = theme.series_styles(lines)
    traces: list[go.Scatter] = []
    for name, found in lines.items():
        on_line = sorted(((row, at) for row, at in found if at is not None), key=lambda pair: pair[1])
        if on_line:
            traces.append(_line(name, on_line, styles[name], unit))
        traces += [_level(name, row, (min(across), max(across)), styles[name], unit) for row, at in found if at is None]
    return theme.figure(
        traces,
        f"{label.capitalize()}: {theme.plain(what or _said(rows))}",
        xaxis={"title": theme.plain(x_title), "type": "log" if log else "linear"},
        yaxis={"title": f"{label} ({unit})"},
        height=400,
        showlegend=True,
    )


def _line(name: str, found: list[tuple[Measurement, float]], style: theme.Style, unit: str) -> go.Scatter:
    scale = _scale(unit)
    rows = [row for row, _ in found]
    return go.Scatter(
        x=[at for _, at in found],
        y=[scale * row.value for row in rows],
        error_y=error_bars(rows, scale, thickness=1),
        mode="lines+markers",
        marker={"color": style.color, "symbol": style.symbol, "size": 9},
        hovertemplate=_HOVER + "<br>at %{x:.4g}<extra></extra>",
        **_common(name, rows, style, scale),
    )  # fmt: skip


def _level(name: str, row: Measurement, ends: tuple[float, float], style: theme.Style, unit: str) -> go.Scatter:
    scale = _scale(unit)
    return go.Scatter(
        x=list(ends),
        y=[scale * row.value] * 2,
        mode="lines",
        marker={"color": style.color, "symbol": style.symbol, "size": 9},
        hovertemplate=_HOVER + "<extra></extra>",
        **_common(name, [row, row], style, scale),
    )


_HOVER = "%{customdata[0]}: <b>%{y:.3g}</b> [%{customdata[2]}], n = %{customdata[1]}"


def _common(name: str, rows: list[Measurement], style: theme.Style, scale: int) -> dict[str, object]:
    return {
        "name": theme.plain(name),
        "line": {"color": style.color, "dash": style.dash},
        "customdata": [[theme.plain(row.plan), row.n, told(row, lambda end: f"{scale * end:.3g}", ", ")] for row in rows],
    }


def _scale(unit: str) -> int:
    return 100 if unit == "%" else 1


def _of(row: Measurement, name: Of) -> object:
    if callable(name):
        return name(row)
    return getattr(row, name) if hasattr(row, name) else row.detail.get(name)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _said(rows: list[Measurement]) -> str:
    tasks, lengths = dict.fromkeys(row.task for row in rows), sorted({row.length for row in rows if row.length})
    return ", ".join(tasks) + (f", {', '.join(f'{n:,}' for n in lengths)} tokens" if lengths else "")
