"""Speed and quality of every mix of bits and share of the cache: tokens per second against needles and against perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.intervals import error_bars, told

if TYPE_CHECKING:
    from moa_lab.bench.beside import Kept, Session, Speed

_SYMBOLS = ("circle", "diamond", "triangle-up", "star", "cross", "pentagon")
_UNMEASURED = "vLLM fp8"
"""The peer whose quality no record of this project holds."""
_PANELS = (("needles", "needles found (% of the dense model's)"), ("documents", "perplexity of documents over dense (%)"))
_GAP = 0.12


def speed_and_quality(session: Session, found: Sequence[tuple[Speed, Kept]]) -> go.Figure:
    """Tokens/s over needles (left, up is better) and over perplexity (right, down is better): a marker for each plan, with 95% intervals.

    Colours are bits, symbols are models, the text of a marker is the share of bytes that the plan keeps. Peers stand where the dense model
    does, which they run; so does one whose bits were not measured, with an open marker. The subtitle says what was measured on which model.
    Raises ValueError where there are no plans, or plans of several lengths.
    """
    lengths = sorted({kept.length for _, kept in found})
    if len(lengths) != 1:
        raise ValueError(f"plans must be measured at one length, got {', '.join(map(str, lengths)) or 'none'}")
    bits = list(dict.fromkeys(kept.bits for _, kept in sorted(found, key=lambda pair: pair[1].bits)))
    models = list(dict.fromkeys(kept.model for _, kept in found))
    # "moa" has the main colour.
    colors = {one: style.color for one, style in zip(bits, theme.series_styles(["moa", *bits[1:]]).values(), strict=True)}
    symbols = {model: _SYMBOLS[at % len(_SYMBOLS)] for at, model in enumerate(models)}
    traces = [
        _points(session, [pair for pair in found if (pair[1].model, pair[1].bits) == (model, one)], panel, colors[one], symbols[model])
        for panel, model, one in product(range(len(_PANELS)), models, bits)
    ]
    traces += [_peers(session, panel) for panel in range(len(_PANELS))]
    traces += [_key(f"{one} bits" if one.replace("+", "").isdecimal() else f"bits {one}", colors[one], "circle") for one in bits]
    traces += [_key(model, theme.DENSE_STYLE.color, symbols[model]) for model in models if len(models) > 1]
    half = (1 - _GAP) / 2
    axes = {
        "title": "decoding, all rows together (tokens/s)", "rangemode": "tozero", "range": [0, 1.12 * max(_rates(session, found))],
    }  # fmt: skip
    lines = _subtitle(session, models, lengths[0])
    fig = theme.figure(
        [trace for trace in traces if trace is not None],
        "Speed, and what is kept" + "".join(f"<br><span style='font-size:11px'>{line}</span>" for line in lines),
        xaxis={**axes, "domain": [0, half], "anchor": "y"},
        xaxis2={**axes, "domain": [half + _GAP, 1], "anchor": "y2"},
        yaxis={"title": _PANELS[0][1], "anchor": "x"},
        yaxis2={"title": _PANELS[1][1], "anchor": "x2"},
        height=470,
        margin={"t": theme.TITLE_HEIGHT + 15 * len(lines) + 2 * theme.LEGEND_HEIGHT},
        showlegend=True,
    )
    for axis, dense in (("", 100), ("2", 0)):
        fig.add_shape(
            type="line", x0=0, x1=1, xref=f"x{axis} domain", y0=dense, y1=dense, yref=f"y{axis}", line={"dash": "dot", "width": 1}
        )
    return fig


def _rates(session: Session, found: Sequence[tuple[Speed, Kept]]) -> list[float]:
    return [*session.peers.values(), *(speed.rate for speed, _ in found)]


def _subtitle(session: Session, models: Sequence[str], length: int) -> list[str]:
    """What was measured on which model: speed on one, quality on others."""
    lines = [
        f"Speed: geometry of {theme.plain(session.model)}, random weights, {theme.plain(session.device)}, prompts of "
        f"{session.prompt:,} tokens, the largest batch that fits",
        f"Quality: {theme.plain(', '.join(models))}, {length:,} tokens; small models, not the one whose speed is shown",
    ]
    if _UNMEASURED in session.peers:
        lines.append(f"{_UNMEASURED}: quality not measured, drawn (open) as if it lost nothing")
    return lines


def _axes(panel: int) -> dict[str, str]:
    return {"xaxis": "x2", "yaxis": "y2"} if panel else {}


def _points(session: Session, pairs: Sequence[tuple[Speed, Kept]], panel: int, color: str, symbol: str) -> go.Scatter | None:
    if not pairs:
        return None
    name = _PANELS[panel][0]
    bounds = [getattr(kept, name) for _, kept in pairs]
    return go.Scatter(
        x=[speed.rate for speed, _ in pairs],
        y=[100 * one.value for one in bounds],
        error_y=error_bars(bounds, 100, thickness=1, width=3),
        mode="markers+text",
        text=[_share(kept.share) for _, kept in pairs],
        textposition="middle right",
        name=f"{theme.plain(pairs[0][1].model)}, {pairs[0][1].bits}",
        showlegend=False,
        marker={"color": color, "symbol": symbol, "size": 10},
        customdata=[_said(session, *pair) for pair in pairs],
        hovertemplate="%{customdata}<extra></extra>",
        cliponaxis=False,
        **_axes(panel),
    )


def _peers(session: Session, panel: int) -> go.Scatter | None:
    if not session.peers:
        return None
    names = list(session.peers)
    style = theme.DENSE_STYLE
    return go.Scatter(
        x=list(session.peers.values()),
        y=[0 if panel else 100] * len(names),
        mode="markers+text",
        text=[theme.plain(name) for name in names],
        textposition=["top center" if at % 2 else "bottom center" for at in range(len(names))],
        name="peers",
        showlegend=False,
        marker={
            "color": style.color,
            "symbol": [f"{style.symbol}-open" if name == _UNMEASURED else style.symbol for name in names],
            "size": 11,
        },
        customdata=[
            f"<b>{theme.plain(name)}</b><br>{rate:,.0f} tokens/s<br>"
            + ("quality not measured" if name == _UNMEASURED else "the dense model")
            for name, rate in session.peers.items()
        ],
        hovertemplate="%{customdata}<extra></extra>",
        cliponaxis=False,
        **_axes(panel),
    )


def _key(name: str, color: str, symbol: str) -> go.Scatter:
    """An entry of the legend."""
    return go.Scatter(x=[None], y=[None], mode="markers", name=theme.plain(name), marker={"color": color, "symbol": symbol, "size": 10})


def _share(share: float) -> str:
    """To half a per cent."""
    return f"{round(200 * share) / 2:g}%"


def _said(session: Session, speed: Speed, kept: Kept) -> str:
    batch = "" if speed.batch is None else f", {speed.batch:,} rows"
    needles, documents = kept.needles, kept.documents
    return (
        f"<b>{theme.plain(kept.model)}</b>, {theme.percent(kept.share, 1)} of the bytes, bits {theme.plain(kept.bits)}<br>"
        f"{theme.percent(needles.value)} of the dense model's needles ({told(needles, theme.percent)}), n = {needles.n:,}<br>"
        f"perplexity {theme.percent(documents.value, 1)} over dense ({told(documents, _tenths)}), n = {documents.n:,}<br>"
        f"{theme.plain(session.model)}: {speed.rate:,.0f} tokens/s{batch}, {theme.percent(speed.share, 1)} of the bytes"
    )


def _tenths(share: float) -> str:
    return theme.percent(share, 1)
