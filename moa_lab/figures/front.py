"""The Pareto front of a search: predicted losses, and whether measurements agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.comparisons import with_rank_correlation
from moa_lab.figures.intervals import error_bars, told
from moa_lab.figures.measurements import Score, metric_label, pooled, shown
from moa_lab.figures.plan_kinds import origin_styles
from moa_lab.plan import Plan
from moa_lab.records import Front, FrontPoint, Measurements
from moa_lab.records.candidates import origin_text


def front_scatter(front: Front, x: str, y: str, chosen: Plan | str | None = None, reference: Iterable[FrontPoint] = ()) -> go.Figure:
    """Scatter of the front over two goals, smaller is better in both; a line joins the points that are non-dominated in these two.

    `x` and `y` are objective names, "density" (at the longest length) or "density@2048". `chosen` is a plan, or its name;
    `reference` holds points of plans outside the front (uniform, dense). Points without one of the goals are left out.
    Raises ValueError when no point has both.
    """
    points = [point for point in front if goal(point, x) is not None and goal(point, y) is not None]
    if not points:
        raise ValueError(f"no point of the front has both {x!r} and {y!r}; it has {', '.join(goals(front)) or 'no points'}")
    traces = [front_line((float(goal(point, x) or 0), float(goal(point, y) or 0)) for point in points)] if len(points) > 1 else []
    for origin, style in origin_styles(point.origin for point in points).items():
        group = [point for point in points if point.origin == origin]
        traces.append(_markers(group, x, y, origin_text(origin), {"color": style.color, "symbol": style.symbol, "size": 10}))
    outside = [point for point in reference if goal(point, x) is not None and goal(point, y) is not None]
    picked = [point for point in (*points, *outside) if _is(point, chosen)]
    if picked:
        ring = {"symbol": "circle-open", "size": 22, "color": theme.OUTLINE, "line": {"width": 2.5, "color": theme.OUTLINE}}
        traces.append(_markers(picked[:1], x, y, f"chosen: {picked[0].plan.name}", ring))
    styles = theme.series_styles(point.plan.name for point in outside)
    for point in outside:
        style = styles[point.plan.name]
        marker = {"color": style.color, "symbol": f"{style.symbol}-open", "size": 12, "line": {"width": 2, "color": style.color}}
        traces.append(_markers([point], x, y, point.plan.name, marker))
    return theme.figure(
        traces,
        f"The front: {len(front)} plans",
        xaxis={"title": goal_label(front, x), **goal_axis(x, [goal(point, x) for point in (*points, *outside)])},
        yaxis={"title": goal_label(front, y), **goal_axis(y, [goal(point, y) for point in (*points, *outside)])},
        height=440,
    )


def predicted_against_measured(
    front: Front, measurements: Measurements, objective: str | None = None, metric: str | None = None
) -> go.Figure:
    """Predicted loss against a measured score with its 95% interval, one marker per plan of the front, at the longest measured length.

    Left out, `objective` is the front's first and `metric` is retrieval, or else the first that was measured. Tasks are pooled.
    With at least three plans, `layout.meta["rank_correlation"]` is Spearman's coefficient.
    Raises ValueError when nothing was measured for a plan of the front.
    """
    objective = objective or next((name for name in goals(front) if not _is_density(name)), "density")
    points = [point for point in front if goal(point, objective) is not None]
    names = {point.plan.name for point in points}
    rows = [row for row in measurements if row.plan in names and metric in (None, row.metric)]
    if not rows:
        raise ValueError(f"no plan of the front was measured{f' with {metric!r}' if metric else ''}: validate the front first")
    metric = metric or next((row.metric for row in rows if row.metric == "retrieval"), rows[0].metric)
    length = max(row.length for row in rows if row.metric == metric)
    scored = [(point, score) for point in points if (score := pooled(measurements, point.plan.name, metric, length)) is not None]
    traces = []
    for origin, style in origin_styles(point.origin for point, _ in scored).items():
        group = [(point, score) for point, score in scored if point.origin == origin]
        value = np.array([score.value for _, score in group])
        traces.append(
            go.Scatter(
                x=[goal(point, objective) for point, _ in group],
                y=value,
                mode="markers",
                name=theme.plain(origin_text(origin)),
                error_y=error_bars((score for _, score in group), thickness=1),
                marker={"color": style.color, "symbol": style.symbol, "size": 10},
                text=[_measured(point, metric, score) for point, score in group],
                hovertemplate="%{text}<br>predicted %{x:.3g}<extra></extra>",
            )
        )
    label, unit = metric_label(metric)
    fig = theme.figure(
        traces,
        f"Promised and measured: {len(scored)} plans at {length:,} tokens",
        xaxis={"title": goal_label(front, objective), **_goal_format(objective)},
        yaxis={"title": f"{label} ({unit})", "tickformat": ".0%" if unit == "%" else ".3~f"},
        height=420,
        showlegend=True,
    )
    promised = [found for point, _ in scored if (found := goal(point, objective)) is not None]
    measured = [score.value for _, score in scored]
    return with_rank_correlation(fig, promised, measured)


def goals(front: Front) -> tuple[str, ...]:
    """Names of goals that can be drawn: the front's objectives first, then the others that every point predicts."""
    predicted = [name for point in front.points[:1] for name in point.predicted if all(name in other.predicted for other in front)]
    return tuple(dict.fromkeys((*front.objectives, *predicted)))


def axes(front: Front) -> tuple[str, ...]:
    """`goals`, and the density where it is not among them."""
    return tuple(dict.fromkeys((*goals(front), "density")))


def goal(point: FrontPoint, name: str) -> float | None:
    """The value of a goal; None where the point does not have it."""
    if not _is_density(name):
        return point.predicted.get(name)
    length = name.partition("@")[2] or max(point.density, key=int, default="")
    return point.density.get(length)


def goal_text(name: str) -> str:
    """A goal in words: `questions@1024/all_or_nothing` as "questions, 1,024 tokens, all or nothing"."""
    task, _, rest = name.partition("@")
    length, _, form = rest.partition("/")
    parts = [task, f"{int(length):,} tokens" if length.isdigit() else length, form.replace("_", " ")]
    return ", ".join(part for part in parts if part)


def goal_label(front: Front, name: str) -> str:
    """An axis title, with the unit, in two lines."""
    if _is_density(name):
        length = name.partition("@")[2] or max((n for point in front for n in point.density), key=int, default="0")
        return f"density at {int(length):,} tokens<br>(% of the dense KV cache)"
    return f"predicted loss (dense = 0)<br>{theme.plain(goal_text(name))}"


def _steps(styles: Mapping[str, theme.Style]) -> list[list[Any]]:
    """A colour scale of as many equal steps as there are styles."""
    count = len(styles)
    return [[end / count, style.color] for number, style in enumerate(styles.values()) for end in (number, number + 1)]


def _measured(point: FrontPoint, metric: str, score: Score) -> str:
    interval = f"{told(score, lambda end: shown(metric, end))}, n = {score.n:,}"
    return f"<b>{theme.plain(point.plan.name)}</b><br>{shown(metric, score.value)} ({interval})"


def _is_density(name: str) -> bool:
    return name == "density" or name.startswith("density@")


def _goal_format(name: str, loss: str = "~g") -> dict[str, str]:
    return {"tickformat": ".0%" if _is_density(name) else loss}


def goal_axis(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """The marks of a goal's axis; where all densities are almost one, an axis of a twentieth, whose marks can be told apart."""
    low, high = _ends(values)
    known = [value for value in values if value is not None]
    narrow = _is_density(name) and (low, high) != (min(known), max(known))
    return {**_goal_format(name), **({"range": [low, high]} if narrow else {})}


def _ends(values: Sequence[float | None]) -> list[float]:
    """The ends of an axis; where all values are almost one, an axis of a twentieth, whose marks can be told apart."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    return [low, high] if high - low > 0.01 * max(abs(low), abs(high)) else [low - 0.025, high + 0.025]


def _is(point: FrontPoint, chosen: Plan | str | None) -> bool:
    # The chosen plan is usually renamed ("moa") after validation, so plans are compared by identity.
    return point.plan.identity() == chosen.identity() if isinstance(chosen, Plan) else point.plan.name == chosen


def _markers(points: list[FrontPoint], x: str, y: str, name: str, marker: dict[str, object]) -> go.Scatter:
    return go.Scatter(
        x=[goal(point, x) for point in points],
        y=[goal(point, y) for point in points],
        mode="markers",
        marker=marker,
        name=theme.plain(name),
        text=[_hover(point) for point in points],
        customdata=[point.plan.name for point in points],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def front_line(corners: Iterable[tuple[float, float]]) -> go.Scatter:
    """The steps through those (across, up) that none beats in both."""
    best = np.inf
    line = []
    for corner in sorted(set(corners)):
        if corner[1] < best:
            line.append(corner)
            best = corner[1]
    style = {"color": theme.DENSE_STYLE.color, "width": 1, "shape": "hv"}
    across, up = zip(*line, strict=True)
    return go.Scatter(x=across, y=up, mode="lines", line=style, hoverinfo="skip", showlegend=False)


def _hover(point: FrontPoint) -> str:
    lines = [f"<b>{theme.plain(point.plan.name)}</b>, {theme.plain(origin_text(point.origin))}"]
    lines += [f"{theme.plain(goal_text(name))}: {value:.3g}" for name, value in list(point.predicted.items())[:8]]
    densities = sorted((int(length), value) for length, value in point.density.items())
    lines += [f"density at {length:,}: {theme.percent(value, 1)}" for length, value in densities]
    if point.gap is not None:
        lines.append(f"within {theme.percent(point.gap, 2)} of the optimum")
    return "<br>".join(lines)


def parallel_goals(front: Front, names: Sequence[str] | None = None) -> go.Figure:
    """Every plan as a line through its goals and its density, in the colour of its kind: drag along an axis to keep those that pass there.

    names: the axes, in order; None: all that `axes` gives.
    `dimensions[i].name` is the goal of an axis. A goal that some plan lacks is left out: plotly would draw that plan at the end of the
    axis. Raises ValueError for a front without points, and where no goal is common to all.
    """
    if not len(front):
        raise ValueError("the front has no points")
    columns = {name: [goal(point, name) for point in front] for name in (axes(front) if names is None else names)}
    common = {name: values for name, values in columns.items() if None not in values}
    if not common:
        raise ValueError(f"no goal is common to all {len(front)} plans; there are {', '.join(columns)}")
    dimensions = [
        {"name": name, "label": theme.plain(goal_text(name)), "values": values, "range": _ends(values), **_goal_format(name, ".3~f")}
        for name, values in common.items()
    ]
    styles = origin_styles(point.origin for point in front)
    numbers = {origin: number for number, origin in enumerate(styles)}
    line = {"color": [numbers[point.origin] for point in front], "cmin": -0.5, "cmax": len(styles) - 0.5, "colorscale": _steps(styles)}
    left_out = ", ".join(theme.plain(name) for name in columns if name not in common)
    title = f"{len(front)} plans, by goal" + (f"; not every plan has {left_out}" if left_out else "")
    # Tilted labels: names are longer than the distance between axes.
    lines = go.Parcoords(dimensions=dimensions, line=line, labelangle=-30, labelfont={"size": 11}, rangefont={"size": 10})
    return theme.figure(lines, title, height=400, margin={"l": 60, "r": 140, "t": 160})
