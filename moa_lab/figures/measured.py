"""The measured front: what every candidate of a validation loses in needles and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.front import front_line
from moa_lab.figures.plan_kinds import KIND_ORDER, kind_styles
from moa_lab.records import Candidate, Measurements, candidates


def measured_front(validation: Measurements) -> go.Figure:
    """Needles lost against words lost, a marker per candidate by its kind; a line joins those that none beats in both.

    The dense model lies at the origin. Needles are the share of planted facts that the dense model finds and the candidate does not, or
    nats per answer token where no candidate loses a fact; words are nats per token. Smaller is better in both.
    Raises ValueError for a record without candidates that were measured by both.
    """
    found = [one for one in candidates(validation) if one.has_both]
    if not found:
        raise ValueError("the record has no candidates that were measured by needles and words: only a validation by both has")
    by_facts = any(one.facts for one in found)
    up: Callable[[Candidate], float] = (lambda one: one.facts) if by_facts else (lambda one: one.needles or 0.0)
    traces = [front_line([(one.words or 0.0, up(one)) for one in found])] if len(found) > 1 else []
    styles = kind_styles()
    for kind in KIND_ORDER:
        group = [one for one in found if one.kind == kind]
        if group:
            style = styles[kind]
            traces.append(_markers(group, up, kind, {"color": style.color, "symbol": style.symbol, "size": 10}))
    traces.append(_dense())
    chosen = [one for one in found if one.chosen]
    if chosen:
        traces.append(_ring(chosen[0], up))
    return theme.figure(
        traces,
        f"Measured: what {len(found)} candidates lose",
        xaxis={"title": "words lost<br>(nats per token over the dense model)", "tickformat": "~g"},
        yaxis=(
            {"title": "needles lost<br>(% of facts, against the dense model)", "tickformat": ".0%"}
            if by_facts
            else {"title": "needles lost<br>(nats per token over the dense model)", "tickformat": "~g"}
        ),
        height=460,
    )


def _markers(group: Sequence[Candidate], up: Callable[[Candidate], float], name: str, marker: dict[str, object]) -> go.Scatter:
    return go.Scatter(
        x=[one.words for one in group],
        y=[up(one) for one in group],
        mode="markers",
        marker=marker,
        name=name,
        text=[_hover(one) for one in group],
        customdata=[one.name for one in group],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def _dense() -> go.Scatter:
    style = theme.DENSE_STYLE
    marker = {"color": style.color, "symbol": f"{style.symbol}-open", "size": 11, "line": {"width": 2, "color": style.color}}
    hover = "dense: nothing is lost<extra></extra>"
    return go.Scatter(x=[0.0], y=[0.0], mode="markers", marker=marker, name="dense", hovertemplate=hover, cliponaxis=False)


def _ring(one: Candidate, up: Callable[[Candidate], float]) -> go.Scatter:
    marker = {"symbol": "circle-open", "size": 22, "color": theme.OUTLINE, "line": {"width": 2.5, "color": theme.OUTLINE}}
    ring = _markers([one], up, "chosen in validation", marker)
    return ring.update(mode="markers+text", textposition="top right", texttemplate=theme.plain(one.name))


def _hover(one: Candidate) -> str:
    return (
        f"<b>{theme.plain(one.name)}</b>, {one.kind}<br>needles: {theme.percent(one.facts, 1)} of facts, {one.needles:+.3f} nats"
        f"<br>words: {one.words:+.4f} nats per token<br>score {one.score:.3f}, the least was chosen"
    )
