"""Fronts of several runs over each other."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.front import front_line, goal, goal_axis, goal_label
from moa_lab.records import Front


def fronts_over(fronts: Mapping[str, Front], x: str, y: str) -> go.Figure:
    """Scatter of several fronts, by name, over two goals that all have; a line joins the plans of each that none of it beats in both.

    Losses are scaled per model: 0 is its dense model, 1 all heads at the shortest rule. Raises ValueError without fronts, and for a
    front without a plan that has both goals.
    """
    if not fronts:
        raise ValueError("there is no front to draw")
    traces = []
    for name, style in theme.series_styles(fronts).items():
        points = [point for point in fronts[name] if goal(point, x) is not None and goal(point, y) is not None]
        if not points:
            raise ValueError(f"no plan of {name} has both {x!r} and {y!r}")
        across, up = ([float(goal(point, which) or 0) for point in points] for which in (x, y))
        line = front_line(zip(across, up, strict=True)).update(line_color=style.color, line_dash=style.dash, legendgroup=name)
        marker = {"color": style.color, "symbol": style.symbol, "size": 9}
        traces += [
            line,
            go.Scatter(
                x=across, y=up, mode="markers", marker=marker, name=theme.plain(name), legendgroup=name,
                text=[theme.plain(point.plan.name) for point in points],
                hovertemplate="<b>%{text}</b><br>%{x:.3g} across, %{y:.3g} up<extra>%{fullData.name}</extra>", cliponaxis=False,
            ),
        ]  # fmt: skip
    first = next(iter(fronts.values()))
    points = [point for front in fronts.values() for point in front]
    return theme.figure(
        traces,
        "1 front" if len(fronts) == 1 else f"{len(fronts)} fronts",
        xaxis={"title": goal_label(first, x), **goal_axis(x, [goal(point, x) for point in points])},
        yaxis={"title": goal_label(first, y), **goal_axis(y, [goal(point, y) for point in points])},
        height=440,
        showlegend=True,
    )
