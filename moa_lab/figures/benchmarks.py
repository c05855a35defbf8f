"""Benchmarks: how far every row is above or below its goal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from moa_lab.figures import theme

if TYPE_CHECKING:
    from moa_lab.bench.record import BenchRecord, BenchRow

_MET = theme.MAIN_STYLE
_MISSED = theme.UNIFORM_STYLE


def goal_ratios(record: BenchRecord) -> go.Figure:
    """A dot per row that has a ratio: right of the line it is better than its goal; the hover shows both sides and the goal.

    Raises ValueError where no row has one.
    """
    rows = [(f"{index + 1}: {theme.plain(row.id)} {theme.plain(_what(row))}", row) for index, row in enumerate(record) if row.ratio]
    if not rows:
        raise ValueError("no row of this record has a ratio: nothing was measured against a peer")
    traces = []
    for style, met in ((_MET, True), (_MISSED, False)):
        found = [(label, row) for label, row in rows if row.meets == met]
        if found:
            traces.append(
                go.Scatter(
                    x=[_beyond(row) for _, row in found],
                    y=[label for label, _ in found],
                    mode="markers",
                    name="meets its goal" if met else "does not",
                    customdata=[_told(row) for _, row in found],
                    marker={"color": style.color, "symbol": style.symbol, "size": 11},
                    hovertemplate="%{y}<br>%{customdata}<extra></extra>",
                )
            )
    device = theme.plain(record.settings.get("device", "unknown device"))
    fig = theme.figure(
        traces,
        f"Measured against goals, {device}",
        xaxis={"title": "measured / goal (1 = the goal, more is better)", "type": "log"},
        yaxis={"type": "category", "categoryorder": "array", "categoryarray": [label for label, _ in rows], "autorange": "reversed"},
        height=max(theme.MIN_HEIGHT, 150 + 22 * len(rows)),
    )
    return fig.add_vline(x=1.0, line={"dash": "dash", "width": 1})


def _beyond(row: BenchRow) -> float:
    """Above 1 where the row is better than its goal."""
    assert row.ratio
    return row.goal / row.ratio if row.at_most else row.ratio / row.goal


def _what(row: BenchRow) -> str:
    """The shape in a few words, and the peer."""
    shape = row.shape
    heads = f"{shape['query_heads']}/{shape['kv_heads']} heads" if "query_heads" in shape else ""
    words = [
        str(shape.get("model") or heads),
        f"{shape['n_tokens']:,}" if "n_tokens" in shape else "",
        f"{shape['bits']} bits" if "bits" in shape else "",
        row.peer_name,
    ]
    return " ".join(word for word in words if word)


def _told(row: BenchRow) -> str:
    sign = "≤" if row.at_most else "≥"
    peer = "-" if row.peer is None else f"{row.peer:.4g}"
    both = f"<b>{row.ours:.4g}</b> {theme.plain(row.unit)}, {theme.plain(row.peer_name)} {peer}"
    return f"{both}<br>ratio {row.ratio:.3f}, goal {sign} {row.goal}"
