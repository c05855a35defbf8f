"""What a density costs: a score over the share of the KV cache that is kept."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.measurements import metric_label
from moa_lab.records import Measurement


def score_by_density(rows: Iterable[Measurement], task: str, length: int) -> go.Figure:
    """One score at one length over the density there, a line per family of plans with 95% intervals; dense is a level of its own.

    Plans named `moa-25`, `moa-50`, ... are the family `moa`. Raises ValueError when nothing was measured.
    """
    chosen = [row for row in rows if row.task == task and row.length == length]
    if not chosen:
        raise ValueError(f"no rows of task {task!r} at {length} tokens")
    metric = chosen[0].metric
    label, unit = metric_label(metric)
    scale = 100 if unit == "%" else 1
    families: dict[str, list[Measurement]] = {}
    for row in chosen:
        families.setdefault(row.plan.rpartition("-")[0] or row.plan, []).append(row)
    styles = theme.series_styles(families)
    fig = theme.figure(
        [],
        f"{label.capitalize()}: {theme.plain(task)}, {length:,} tokens",
        xaxis={"title": f"density at {length:,} tokens (% of the dense KV cache)", "range": [0, 103]},
        yaxis={"title": f"{label} ({unit})"},
        height=400,
    )
    for name, members in families.items():
        found = sorted(members, key=lambda row: row.density)
        level = len(found) == 1 and found[0].density >= 1
        if level:
            # The dense model as a level to hold the others against.
            found = [found[0], found[0]]
        style = styles[name]
        fig.add_scatter(
            x=[0, 100] if level else [100 * row.density for row in found],
            y=[scale * row.value for row in found],
            error_y=None if level else {
                "type": "data", "symmetric": False, "thickness": 1,
                "array": [scale * (row.high - row.value) for row in found],
                "arrayminus": [scale * (row.value - row.low) for row in found],
            },
            name=theme.plain(name),
            mode="lines" if level else "lines+markers",
            line={"color": style.color, "dash": style.dash},
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            customdata=[[theme.plain(row.plan), row.n, scale * row.low, scale * row.high] for row in found],
            hovertemplate="%{customdata[0]}: <b>%{y:.3g}</b> [%{customdata[2]:.3g}, %{customdata[3]:.3g}], n = %{customdata[1]}<br>"
            "%{x:.1f}% kept<extra></extra>",
        )  # fmt: skip
    return fig
