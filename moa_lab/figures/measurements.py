"""Measured scores by depth and length, and by plan with intervals; KV bytes of plans."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.intervals import error_bars, told
from moa_lab.plan import PlanOrPath, as_plan
from moa_lab.records import Measurement, Measurements

_LABELS = {
    "retrieval": ("needles retrieved", "%"),
    "lines": ("lines retrieved", "%"),
    "line_retrieval": ("lines retrieved", "%"),
    "cross_entropy": ("cross-entropy", "nats per token"),
    "share_of_dense": ("needles found of the dense model's", "%"),
    "perplexity_excess": ("perplexity above the dense model's", "%"),
    "perplexity": ("perplexity", "lower is better"),
    "tokens_per_s": ("speed", "tokens/s"),
    "kv_bytes_allocated": ("KV cache of one sequence", "bytes"),
    "rank_correlation": ("rank correlation", "Spearman's, 1 is best"),
    "kl": ("divergence from the dense model", "nats per token"),
    "token_match": ("next tokens that the dense model also takes", "%"),
    "needles_gained": ("needles gained", "difference of shares"),
    "retrieval_difference": ("difference in needles retrieved", "difference of shares"),
    "nats_saved": ("cross-entropy saved", "nats per token"),
    "cross_entropy_difference": ("difference in cross-entropy", "nats per token"),
    "loss_change": ("change of the loss", "nats per token"),
    "hypervolume": ("hypervolume of the front", "1 is best"),
    "rank_interval_width": ("width of the interval of a head's rank", "percentiles"),
    "shared_top_heads": ("strongest heads that are so everywhere", "%"),
}


@dataclass(frozen=True)
class Score:
    """A value with its 95% interval over `n` observations."""

    value: float
    low: float
    high: float
    n: int


def metric_label(metric: str) -> tuple[str, str]:
    """A metric's label and unit; "%" marks shares between 0 and 1."""
    known = _LABELS.get(metric)
    if known is not None:
        return known
    return theme.plain(metric.replace("_", " ")), "%" if metric.endswith(("accuracy", "retrieval")) else "score"


def shown(metric: str, value: float) -> str:
    """The value as text: shares in percent, other scores with three decimals."""
    return theme.percent(value) if metric_label(metric)[1] == "%" else f"{value:.3f}"


def pooled(measurements: Measurements, plan: str, metric: str, length: int, task: str | None = None) -> Score | None:
    """One score over the tasks of a metric (or one task): the mean over all observations; None when nothing was measured.

    Of several rows of a task the one with the most observations counts (the last of equal ones), as they may share samples. For the
    same reason a group of tasks does not count beside its members. A single row keeps its interval. Several are pooled: a share gets
    Wilson's interval of the joint count, anything else the interval of a weighted mean of independent means.
    """
    rows = _evidence(row for row in measurements.select(plan=plan, metric=metric, length=length) if task in (None, row.task))
    total = sum(row.n for row in rows)
    if not rows or not total:
        return None
    if len(rows) == 1:
        return Score(rows[0].value, rows[0].low, rows[0].high, rows[0].n)
    value = sum(row.n * row.value for row in rows) / total
    if metric_label(metric)[1] == "%":
        low, high = _wilson(value, total)
    else:
        low = value - math.hypot(*(row.n * (row.value - row.low) for row in rows)) / total
        high = value + math.hypot(*(row.n * (row.high - row.value) for row in rows)) / total
    return Score(value, low, high, total)


def retrieval_heatmap(measurements: Measurements, plan: str, metric: str = "retrieval", task: str | None = None) -> go.Figure:
    """Heat-map of a share by needle depth (rows) and length (columns), read from every row's `detail["by_depth"]`; tasks are pooled.

    Raises ValueError when no row of the plan has depths.
    """
    rows = _evidence(
        row for row in measurements.select(plan=plan, metric=metric) if task in (None, row.task) and row.detail.get("by_depth")
    )
    if not rows:
        raise ValueError(f"no {metric!r} rows with detail['by_depth'] for plan {plan!r}: evaluate it with several depths")
    lengths = sorted({row.length for row in rows})
    depths = sorted({depth for row in rows for depth in row.detail["by_depth"]}, key=float)
    cells = [[_cell(rows, depth, length) for length in lengths] for depth in depths]
    label, _ = metric_label(metric)
    heat = go.Heatmap(
        z=[[None if cell is None else 100 * cell[0] for cell in row] for row in cells],
        customdata=[[0 if cell is None else cell[1] for cell in row] for row in cells],
        x=[f"{length:,}" for length in lengths],
        y=[theme.percent(float(depth)) for depth in depths],
        zmin=0,
        zmax=100,
        colorscale=theme.SPAN_SCALE,
        xgap=2,
        ygap=2,
        texttemplate="%{z:.0f}%",
        hoverongaps=False,
        colorbar=theme.bar_above(f"{label} (%)"),
        hovertemplate="%{x} tokens, depth %{y}<br><b>%{z:.0f}%</b> of %{customdata} needles<extra></extra>",
    )
    return theme.figure(
        heat,
        f"{label.capitalize()}: {theme.plain(plan)}",
        xaxis={"title": "length (tokens)", "type": "category", "showgrid": False},
        yaxis={"title": "depth (% of the text)", "type": "category", "autorange": "reversed", "showgrid": False},
        height=min(max(34 * len(depths) + 140, 240), 720),
    )


def score_bars(measurements: Measurements, metric: str, task: str | None = None, plans: Iterable[str] | None = None) -> go.Figure:
    """One value with its 95% interval per plan and length; shares as bars from 0, other scores as markers (their 0 has no meaning).

    Left out, `plans` are all that were measured and `task` pools the tasks. Raises ValueError when nothing was measured.
    """
    rows = [row for row in measurements.select(metric=metric) if task in (None, row.task)]
    names = list(plans) if plans is not None else list(dict.fromkeys(row.plan for row in rows))
    lengths = sorted({row.length for row in rows if row.plan in names})
    if not lengths:
        raise ValueError(f"no {metric!r} was measured{'' if plans is None else ' for these plans'}")
    label, unit = metric_label(metric)
    if metric == "retrieval" and task:
        label = f"{theme.plain(task)} retrieved"
    styles = theme.series_styles(names)
    fig = theme.figure(
        [_bars(measurements, name, metric, task, lengths, styles[name]) for name in names],
        f"{label.capitalize()}, with 95% intervals",
        xaxis={"title": "length (tokens)", "type": "category", "showgrid": False},
        yaxis={"title": f"{label} ({unit})"},
        height=360,
        bargap=0.25,
        bargroupgap=0.08,
        scattermode="group",
        scattergap=0.5,
        showlegend=True,
    )
    if unit == "%":
        return fig.update_yaxes(tickformat=".0%", range=[0, 1.04])
    seen = [row for row in rows if row.plan in names]
    ends = [end for row in seen for end in (row.value, row.low, row.high) if math.isfinite(end)]
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.1
    return fig.update_yaxes(range=[low - room, high + room])


def kv_bytes_bars(plans: Iterable[PlanOrPath], n_tokens: int) -> go.Figure:
    """KV bytes of one sequence per plan, predicted from the spans at two bytes a number; raises ValueError without plans."""
    shown = [as_plan(plan) for plan in plans]
    if not shown:
        raise ValueError("plans must hold at least one plan")
    styles = theme.series_styles(plan.name for plan in shown)
    bars = []
    # One trace per plan: plotly draws no pattern over bars with a list of colours.
    for plan in shown:
        size = plan.kv_bytes(n_tokens)
        label = f"{theme.plain(plan.name)}<br>{theme.byte_size(size)} = {theme.percent(plan.density(n_tokens))}"
        hover = "%{y} of the dense cache<extra></extra>"
        bar = go.Bar(x=[size / 2**20], y=[label], orientation="h", marker=theme.bar_marker(styles[plan.name]), hovertemplate=hover)
        bars.append(bar)
    return theme.figure(
        bars,
        f"KV cache of one sequence of {n_tokens:,} tokens",
        xaxis={"title": "predicted KV bytes (MiB)", "rangemode": "tozero"},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False},
        height=max(theme.MIN_HEIGHT, 140 + 46 * len(shown)),
        barmode="overlay",
        showlegend=False,
    )


def _bars(
    measurements: Measurements, plan: str, metric: str, task: str | None, lengths: list[int], style: theme.Style
) -> go.Bar | go.Scatter:
    found = [(length, pooled(measurements, plan, metric, length, task)) for length in lengths]
    scores = [(f"{length:,}", score) for length, score in found if score is not None]
    number = ".1%" if metric_label(metric)[1] == "%" else ".3f"
    common: dict[str, Any] = {
        "name": theme.plain(plan),
        "x": [length for length, _ in scores],
        "y": [score.value for _, score in scores],
        "error_y": error_bars(score for _, score in scores),
        "customdata": [[told(score, f"{{:{number}}}".format), score.n] for _, score in scores],
    }
    interval = "(95%: %{customdata[0]}), n = %{customdata[1]:,}"
    hover = f"%{{x}} tokens<br><b>%{{y:{number}}}</b> {interval}"
    if metric_label(metric)[1] == "%":
        return go.Bar(**common, marker=theme.bar_marker(style), offsetgroup=common["name"], hovertemplate=hover)
    dot = {"color": style.color, "symbol": style.symbol, "size": 11}
    return go.Scatter(**common, mode="markers", marker=dot, offsetgroup=common["name"], hovertemplate=hover)


def _evidence(rows: Iterable[Measurement]) -> list[Measurement]:
    """One row per task and length, chosen as in `pooled`."""
    best: dict[tuple[str, int], Measurement] = {}
    for row in rows:
        key = (row.task, row.length)
        if key not in best or row.n >= best[key].n:
            best[key] = row
    tasks = {task for task, _ in best}
    return [row for row in best.values() if not tasks & set(row.detail.get("members", ()))]


def _cell(rows: list[Measurement], depth: str, length: int) -> tuple[float, int] | None:
    found = [row.detail["by_depth"][depth] for row in rows if row.length == length and depth in row.detail["by_depth"]]
    total = sum(int(cell["n"]) for cell in found)
    return (sum(cell["value"] * cell["n"] for cell in found) / total, total) if total else None


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
