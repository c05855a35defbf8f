"""Roofline of the kernels: measured rates under the limits of memory and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.plan import UNTOUCHED, read_mixes
from moa_lab.plan.bits import vector_bytes

if TYPE_CHECKING:
    from moa_lab.bench.record import BenchRecord, BenchRow

OURS = "ours"
_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Point:
    """A kernel at a shape: FLOP per byte that must move, and TFLOP/s."""

    who: str
    intensity: float
    rate: float
    told: str


def kernel_roofline(*records: BenchRecord) -> go.Figure:
    """TFLOP/s against FLOP per byte, both logarithmic: every kernel of the records under the roof measured in the same process.

    A roof is min(GB/s x FLOP per byte, matrix product TFLOP/s), with the GB/s of a pure read, or of a copy in a record that has no read.
    Only visible pairs count as FLOP. Bytes are those that must move: kept K and V in decoding, as they are stored, Q, K, V and output once
    in prefill. A copy writes as much as it reads, so a kernel that only reads can pass its slope.

    Raises ValueError for a record without ceilings, without such rows, or of unknown dtype.
    """
    points = [point for record in records for point in roofline_points(record)]
    if not points:
        raise ValueError("records must hold at least one record with rows of decoding (GB/s) or prefill (useful FLOP)")
    edges = (min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2)
    traces = [_roof(record, edges, first=index == 0) for index, record in enumerate(records)]
    names = list(dict.fromkeys((OURS, *(point.who for point in points))))
    styles = theme.series_styles(names)
    # Ours last, so that it is drawn on top.
    traces += [_markers([point for point in points if point.who == who], styles[who]) for who in reversed(names)]
    devices = dict.fromkeys(str(record.settings.get("device", "unknown device")) for record in records)
    return theme.figure(
        traces,
        f"Kernels and their roof, {theme.plain(', '.join(devices))}",
        xaxis={"title": "arithmetic intensity (FLOP per byte that must move)", "type": "log", "dtick": 1, "tickformat": ",~g"},
        yaxis={"title": "of visible pairs (TFLOP/s)", "type": "log", "dtick": 1, "tickformat": ",~g"},
        height=460,
        margin={"t": theme.TITLE_HEIGHT + theme.LEGEND_HEIGHT},
        showlegend=True,
        legend_traceorder="reversed",
    )


def roofline_points(record: BenchRecord) -> list[Point]:
    """Every kernel of a record at every shape, once. Raises ValueError for an unknown dtype."""
    dtype = str(record.settings.get("dtype"))
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"the record's dtype must be one of {', '.join(_ITEM_BYTES)}, got {dtype!r}")
    found: dict[tuple[str, str], Point] = {}
    for row in record:
        # Rows of one measurement (P1 against each peer, P2) share its points.
        for point in _row_points(row, _ITEM_BYTES[dtype]):
            found.setdefault((point.told, point.who), point)
    return list(found.values())


def _row_points(row: BenchRow, item_bytes: int) -> Iterable[Point]:
    detail, shape = row.detail, row.shape
    told = f"{shape.get('query_heads')}/{shape.get('kv_heads')} heads of {shape.get('head_dim')}, {shape.get('n_tokens', 0):,} tokens"
    told += f", batch {shape.get('batch')}, {theme.percent(shape.get('density', 1.0))} kept"
    told += f" in {shape['bits']} bits" if "bits" in shape else ""
    peers = {name: peer for name, peer in detail.get("peers", {}).items() if "rate" in peer}
    if "useful_flops" in detail:
        moved = 2 * (shape["query_heads"] + shape["kv_heads"]) * shape["batch"] * shape["n_tokens"] * shape["head_dim"] * item_bytes
        for who, side in {OURS: detail, **peers}.items():
            # TFLOP/s times ms: the FLOP that this side counts as useful (all pairs where it is dense).
            yield Point(who, side["rate"] * side["ms"] * 1e9 / moved, side["rate"], f"prefill, {told}")
    elif "useful_bytes" in detail and row.unit == "GB/s":
        # Per kept token and KV head: K and V are read, and each query head of the group does 4 head_dim FLOP.
        (mix,) = read_mixes(shape.get("bits", UNTOUCHED))
        of_token = sum(vector_bytes(shape["head_dim"], width, item_bytes) for width in mix)
        intensity = 4 * shape["head_dim"] * shape["query_heads"] / shape["kv_heads"] / of_token
        for who, rate in {OURS: row.ours, **{name: peer["rate"] for name, peer in peers.items()}}.items():
            yield Point(who, intensity, rate * intensity / 1e3, f"decoding, {told}")


def _roof(record: BenchRecord, edges: tuple[float, float], first: bool) -> go.Scatter:
    ceilings: dict[str, Any] = record.settings.get("ceilings", {})
    if not {"copy_GB/s", "matmul_TFLOP/s"} <= set(ceilings):
        raise ValueError("the record must hold the ceilings copy_GB/s and matmul_TFLOP/s: those of `moa-lab bench kernels` do")
    moved = "read" if "read_GB/s" in ceilings else "copy"
    slope, flat = ceilings[f"{moved}_GB/s"] / 1e3, ceilings["matmul_TFLOP/s"]
    x = np.array([edges[0], flat / slope, edges[1]])
    return go.Scatter(
        x=x,
        y=np.minimum(slope * x, flat),
        mode="lines",
        line={"color": theme.DENSE_STYLE.color, "width": 2},
        name=f"roof: {moved}, matrix product",
        legendgroup="roof",
        showlegend=first,
        hovertemplate=f"{moved} {ceilings[f'{moved}_GB/s']:,.0f} GB/s, matrix product {flat:,.0f} TFLOP/s<extra></extra>",
    )


def _markers(points: list[Point], style: theme.Style) -> go.Scatter:
    # Open markers: in decoding, points share few intensities, and peers must show through ours.
    look = (
        {"symbol": f"{style.symbol}-open", "size": 12, "line": {"width": 2}}
        if points[0].who == OURS
        else {"symbol": style.symbol, "size": 8}
    )
    return go.Scatter(
        x=[point.intensity for point in points],
        y=[point.rate for point in points],
        mode="markers",
        name=theme.plain(points[0].who),
        marker={"color": style.color, **look},
        customdata=[theme.plain(point.told) for point in points],
        hovertemplate=(
            f"<b>{theme.plain(points[0].who)}</b>: %{{y:.3~g}} TFLOP/s at %{{x:,.3~g}} FLOP per byte<br>%{{customdata}}<extra></extra>"
        ),
    )
