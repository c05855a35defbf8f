"""The figures of a desk page, with what its script moves left empty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from moa_lab import figures
from moa_lab.evaluate.options import TEXTS, Option
from moa_lab.evaluate.over_bytes import measured_at, scores_over_bytes
from moa_lab.figures.front import axes
from moa_lab.figures.theme import MAIN_STYLE, OUTLINE, figure
from moa_lab.report.desk.data import BEYOND_TOKENS, goal_names
from moa_lab.report.desk.stops import MEAN, Stop
from moa_lab.report.page import Section, panel

if TYPE_CHECKING:
    from moa_lab.report.desk import DeskRecords

ORDERS = {"number": "number", "span": "span, longest first", "influence": "influence, most first"}

WHERE = "layer %{customdata[0]} · KV head %{customdata[1]}"
LOW_MAP = 16
"""KV heads of a map that is lower than what stands beside it."""


def figure_sections(records: DeskRecords, stops: Sequence[Stop], lengths: Sequence[int], main: int) -> list[Section]:
    """Every section with something to show. main: the length at which predicted losses are drawn over density."""
    budget = Section("budget", "What every head keeps", _controls(lengths, records) + _budget(records, stops, main))
    return [budget, *_measured(records), *_front(records, stops)]


def curves(options: Sequence[Option]) -> list[dict[str, Any]]:
    """Measured scores over density, a figure as JSON for every task and length that all plans were measured at."""
    found = []
    for task, length in measured_at(options):
        fig = figures.score_by_density(scores_over_bytes(options, task, length), task, length)
        drawn = json.loads(fig.to_json())
        axis = {name: drawn["layout"][name] for name in ("xaxis", "yaxis")}
        found.append({"label": f"{TEXTS.get(task, task)}, {length:,} tokens", "length": length, "data": drawn["data"], "axes": axis})
    return found


def _controls(lengths: Sequence[int], records: DeskRecords) -> str:
    orders = {key: text for key, text in ORDERS.items() if key != "influence" or records.profile is not None}
    tasks = [f"{task}, {length:,} tokens" for task, length in records.profile.keys] if records.profile else []
    return (
        '<div class="controls"><label class="wide">density <input type="range" id="density" min="0" value="0" step="1"></label>'
        '<output id="plan" for="density"></output>'
        f"{_select('length', 'at', [f'{n:,} tokens' for n in lengths])}"
        f"{_select('order', 'heads by', list(orders.values()), list(orders))}"
        f"{_select('task', 'influence on', tasks) if tasks else ''}"
        '<label>head <input id="head" size="9" placeholder="L12 H3" autocomplete="off" spellcheck="false"></label>'
        '<span id="head-error" role="alert"></span></div>'
    )


def _select(name: str, label: str, texts: Sequence[str], values: Sequence[str] | None = None) -> str:
    chosen = values or [str(index) for index in range(len(texts))]
    options = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in zip(chosen, texts, strict=True))
    return f'<label>{label} <select id="{name}">{options}</select></label>'


def _budget(records: DeskRecords, stops: Sequence[Stop], length: int) -> str:
    plan = stops[0].plan
    spans = figures.span_map(plan, length)
    spans.update_traces(customdata=None, z=None, hovertemplate=f"{WHERE}<br><b>%{{z:,}} tokens</b><extra></extra>")
    parts = [panel(_with_ring(spans), "Span of every KV head", "Heat-map of spans, which the density slider changes.", name="spans")]
    if records.profile is not None:
        task, profiled = records.profile.keys[0]
        influence = figures.influence_map(records.profile, task, profiled, min(BEYOND_TOKENS, profiled - 1), "sum")
        influence.update_traces(customdata=None, z=None, hovertemplate=f"{WHERE}<br><b>%{{z:.3g}} nats</b><extra></extra>")
        alt = "Heat-map of the long-range influence of every KV head, on the task that is chosen above."
        parts.append(panel(_with_ring(influence), f"Influence beyond {BEYOND_TOKENS} tokens", alt, name="influence"))
    facts = '<div class="card"><h3>This plan</h3><dl id="facts"></dl></div>'
    head = '<div class="card"><h3 id="head-name">Head</h3><dl id="head-facts"></dl></div>'
    # Low maps leave room below them.
    left, right = (_losses(stops, length), "") if plan.geometry.kv_heads <= LOW_MAP else ("", _losses(stops, length))
    return f'<div class="desk"><div>{"".join(parts)}{left}</div><div>{facts}{head}{_head()}{right}</div></div>'


def _with_ring(fig: go.Figure) -> go.Figure:
    marker = {"symbol": "square-open", "size": 15, "color": OUTLINE, "line": {"width": 2.5, "color": OUTLINE}}
    return fig.add_scatter(x=[0], y=[0], mode="markers", marker=marker, hoverinfo="skip", showlegend=False).update_layout(showlegend=False)


def _head() -> str:
    line = go.Scatter(x=[], y=[], mode="lines+markers", line={"color": MAIN_STYLE.color, "shape": "hv"})
    line.hovertemplate = "%{y:,} tokens at %{x:.1f}%<extra></extra>"
    fig = figure(
        [line], "", 300, xaxis={"title": "density of the plan (%)", "range": [0, 103]},
        yaxis={"title": "span of this head (tokens)", "rangemode": "tozero"}, showlegend=False,
    )  # fmt: skip
    return panel(fig, "What this head keeps, by density", "Span of the selected head in the plans of the slider.", name="head")


def _losses(stops: Sequence[Stop], length: int) -> str:
    budget = [stop for stop in stops if stop.kind in ("budget", "dense") and stop.predicted]
    if len(budget) < 2:
        return ""
    shown = [name for name in goal_names(stops) if "@" not in name]
    losses = {name: [stop.predicted[name] for stop in budget] for name in shown}
    fig = figures.loss_by_density([stop.plan.density(length) for stop in budget], losses, length)
    caption = f"Of the best plan for each density, by the {MEAN} of the goals."
    return panel(fig, "Predicted loss by density", "Predicted loss per goal over density.", caption, name="loss")


def _measured(records: DeskRecords) -> list[Section]:
    found = curves(records.measured)
    if not found:
        return []
    fig = go.Figure(found[0]["data"], found[0]["axes"]).update_layout(height=440, showlegend=True)
    alt = "A measured score over density with 95% intervals, and the density of the slider."
    body = _select("curve", "measured", [one["label"] for one in found]) + panel(fig, "Measured score by density", alt, name="measured")
    return [Section("measured", "What was measured", f'<div class="controls-inline">{body}</div>')]


def _front(records: DeskRecords, stops: Sequence[Stop]) -> list[Section]:
    front = records.front
    shared = set(goal_names(stops))
    names = [name for name in axes(front) if name in shared or name == "density"] if front is not None and len(front) else []
    if front is None or len(names) < 2:
        return []
    names.sort(key=lambda name: ("@" in name, name == "density"))
    fig = figures.front_scatter(front, names[0], names[1])
    marker = {"symbol": "circle-open", "size": 20, "color": OUTLINE, "line": {"width": 2.5, "color": OUTLINE}}
    fig.add_scatter(x=[], y=[], mode="markers", marker=marker, name="the plan above", hoverinfo="skip")
    alt = f"{len(front)} plans of the front over two goals; a click shows a plan above."
    caption = "Lower left is better. The ring is the plan that is shown above; a click on a marker shows that one."
    across = _select("front-x", "across", names, names) + _select("front-y", "up", names, names)
    drawn = panel(fig, f"{len(front)} plans of the front", alt, caption, name="front")
    return [Section("front", "Plans that the search found", f'<div class="controls-inline">{across}{drawn}</div>')]
