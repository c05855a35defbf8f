"""Decoding end to end: tokens per second against the KV bytes of each side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from moa_lab.figures import theme

if TYPE_CHECKING:
    from moa_lab.bench.record import BenchRecord

COMPILED = " compiled"
_STYLED_AS = {"ours dense": "dense"}
_TICKS = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
_LOG_AXIS = {"type": "log", "tickvals": _TICKS, "ticktext": [f"{value:,g}" for value in _TICKS]}


def throughput_by_kv_bytes(record: BenchRecord, model: str | None = None) -> go.Figure:
    """Tokens/s of the whole batch against the KV bytes of one sequence (GiB), both logarithmic: a line per side through its prompt lengths.

    Reads `record.settings["sides"]`, which `moa-lab bench generate` writes: each side with as many sequences as fit. A side that was
    measured both compiled and not is drawn compiled; one that failed is left out. model: None for the first of the record.
    Raises ValueError when nothing was measured, or nothing for `model`.
    """
    measured = [entry for entry in record.settings.get("sides", ()) if "failed" not in entry["found"]]
    models = list(dict.fromkeys(entry["model"] for entry in measured))
    if not models or model not in (None, *models):
        raise ValueError(f"no side was measured{f' for {model!r}' if model else ''}; the record has {', '.join(models) or 'none'}")
    model = model or models[0]
    sides = _sides(entry for entry in measured if entry["model"] == model)
    styles = theme.series_styles(_STYLED_AS.get(side, side) for side in sides)
    prompts = sorted({entry["prompt"] for found in sides.values() for entry in found})
    device = theme.plain(record.settings.get("device", "unknown device"))
    return theme.figure(
        [_line(side, found, styles[_STYLED_AS.get(side, side)]) for side, found in sides.items()],
        f"Decoding {theme.plain(model)}, {device}",
        xaxis={"title": f"KV bytes of one sequence (GiB); along a line, {_listed(prompts)} tokens", **_LOG_AXIS},
        yaxis={"title": "as many sequences as fit (tokens/s)", **_LOG_AXIS},
        height=440,
        margin={"t": theme.TITLE_HEIGHT + 3 * theme.LEGEND_HEIGHT},
        showlegend=True,
    )


def kv_gib(found: dict[str, Any]) -> float:
    """GiB of K and V that one sequence keeps. found: the measurement of a side."""
    return float(found["kept_bytes"] / found["batch"] / 2**30)


def _sides(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Entries by side, shortest prompt first; the compiled one where a prompt has both."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry["found"].get("compiled", False)):
        best[entry["side"].removesuffix(COMPILED), entry["prompt"]] = entry
    sides: dict[str, list[dict[str, Any]]] = {}
    for (side, _), entry in sorted(best.items()):
        sides.setdefault(side, []).append(entry)
    return sides


def _line(side: str, entries: list[dict[str, Any]], style: theme.Style) -> go.Scatter:
    told = [
        f"<b>{theme.plain(entry['side'])}</b>, prompt of {entry['prompt']:,} tokens<br>{entry['found']['rate']:,.0f} tokens/s, "
        f"{entry['found']['ms']:.1f} ms a step<br>{entry['found']['batch']:,} sequences of {kv_gib(entry['found']):.2f} GiB"
        for entry in entries
    ]
    return go.Scatter(
        x=[kv_gib(entry["found"]) for entry in entries],
        y=[entry["found"]["rate"] for entry in entries],
        mode="lines+markers",
        name=theme.plain(entries[0]["side"]),
        line={"color": style.color, "width": 1.5, "dash": style.dash},
        # Open markers: sides with equal bytes are equally fast and overlap.
        marker={"color": style.color, "symbol": f"{style.symbol}-open", "size": 12, "line": {"width": 2.5}},
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
        cliponaxis=False,
    )


def _listed(prompts: list[int]) -> str:
    return "prompts of " + ", ".join(f"{prompt:,}" for prompt in prompts)
