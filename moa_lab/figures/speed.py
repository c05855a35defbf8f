"""Speed against accuracy: tokens per second over retrieval, a marker per density."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.densities import family
from moa_lab.figures.intervals import error_bars, told
from moa_lab.records import Measurement

SAME_MODEL = {"transformers dense": "dense"}
"""Plans that are another plan run by other code, and share its retrieval score."""


def speed_by_accuracy(
    rows: Iterable[Measurement], length: int | None = None, *, speed: str = "decode", score: str = "needles"
) -> go.Figure:
    """Tokens/s against a retrieval score at one length, both with 95% intervals: a line per family of plans, a marker per density.

    Reads rows of the metric "tokens_per_s" and the task `speed`, and of the metric "retrieval" and the task `score`; plans that lack
    either are left out. Up and to the right is better. length: None for the longest. Raises ValueError where no plan has both.
    """
    rows = list(rows)
    rates = {(row.plan, row.length): row for row in rows if (row.metric, row.task) == ("tokens_per_s", speed)}
    scores = {(row.plan, row.length): row for row in rows if (row.metric, row.task) == ("retrieval", score)}
    scores |= {(plan, n): scores[other, n] for plan, other in SAME_MODEL.items() for name, n in list(scores) if name == other}
    both = [key for key in rates if key in scores and length in (None, key[1])]
    if not both:
        raise ValueError(f"no plan has both tokens_per_s of {speed!r} and retrieval of {score!r}{f' at {length} tokens' if length else ''}")
    longest = max(n for _, n in both)
    families: dict[str, list[tuple[Measurement, Measurement]]] = {}
    for key in sorted((key for key in both if key[1] == longest), key=lambda key: rates[key].density):
        families.setdefault(family(rates[key]), []).append((scores[key], rates[key]))
    styles = theme.series_styles(families)
    return theme.figure(
        [_line(name, pairs, styles[name]) for name, pairs in families.items()],
        f"Speed and what is found, {longest:,} tokens",
        xaxis={"title": f"{theme.plain(score)} retrieved (%)", "range": [-4, 106]},
        yaxis={"title": f"{theme.plain(speed)}, all rows together (tokens/s)", "rangemode": "tozero"},
        height=440,
        showlegend=True,
    )


def _line(name: str, pairs: list[tuple[Measurement, Measurement]], style: theme.Style) -> go.Scatter:
    return go.Scatter(
        x=[100 * score.value for score, _ in pairs],
        y=[rate.value for _, rate in pairs],
        error_x=error_bars([score for score, _ in pairs], 100, thickness=1),
        error_y=error_bars([rate for _, rate in pairs], 1, thickness=1),
        mode="lines+markers+text",
        text=[theme.percent(rate.density) for _, rate in pairs],
        # Off the error bars, which extend to all four sides of the marker.
        textposition="top right",
        name=theme.plain(name),
        line={"color": style.color, "dash": style.dash, "width": 1.5},
        marker={"color": style.color, "symbol": style.symbol, "size": 11},
        customdata=[_said(score, rate) for score, rate in pairs],
        hovertemplate="%{customdata}<extra></extra>",
        cliponaxis=False,
    )


def _said(score: Measurement, rate: Measurement) -> str:
    batch = f", {rate.detail['batch']:,} rows" if "batch" in rate.detail else ""
    return (
        f"<b>{theme.plain(rate.plan)}</b>, density {theme.percent(rate.density, 1)}<br>{rate.value:,.0f} tokens/s{batch}<br>"
        f"{theme.percent(score.value)} found ({told(score, theme.percent)}), n = {score.n:,}"
    )
