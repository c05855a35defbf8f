"""The influence of one head in a profile: by distance, and by query and key position."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.plan import MAX_BLOCKS, check_head
from moa_lab.plan import Plan, PlanOrPath, as_plan
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile


def influence_by_distance(
    profile: InfluenceProfile, task: str, length: int, layer: int, head: int, plan: PlanOrPath | None = None
) -> go.Figure:
    """Influence of one query head per 64 tokens of distance (nats, log scale), with the 95% band over samples.

    With `plan`, the distances that its span cuts off are shaded and their share of the influence is written beside the cut.
    """
    plan = None if plan is None else as_plan(plan)
    samples = samples_of(profile, task, length)
    _check(profile, layer, head)
    values = samples[:, layer, head].astype(np.float64)
    mean = values.mean(axis=0)
    error = 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
    distance = (np.arange(len(mean)) + 0.5) * BLOCK_TOKENS
    top = max(float(mean.max()), 1e-12)
    floor = max(float(mean[mean > 0].min()) if (mean > 0).any() else top, top * 1e-6)
    # Below two decades plotly's own ticks (1, 2, 5) are better than powers of ten alone.
    decades = {"dtick": 1} if top / floor > 100 else {}
    style = theme.MAIN_STYLE
    traces = []
    if error.any():
        band = np.concatenate([np.maximum(mean + error, floor), np.maximum(mean - error, floor)[::-1]])
        traces.append(
            go.Scatter(
                x=np.concatenate([distance, distance[::-1]]),
                y=band,
                fill="toself",
                fillcolor="rgba(26,128,196,0.28)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                name=f"95% interval, {len(values)} samples",
            )
        )
    traces.append(
        go.Scatter(
            x=distance,
            y=np.where(mean > 0, np.maximum(mean, floor), np.nan),
            mode="lines+markers",
            line={"color": style.color, "width": 2},
            marker={"color": style.color, "symbol": style.symbol, "size": 5},
            customdata=np.stack([distance - BLOCK_TOKENS / 2, distance + BLOCK_TOKENS / 2 - 1], axis=1),
            name="mean influence",
            hovertemplate="%{customdata[0]:,.0f} to %{customdata[1]:,.0f} tokens back<br><b>%{y:.3g} nats</b><extra></extra>",
        )
    )
    fig = theme.figure(
        traces,
        f"Layer {layer}, query head {head}: {theme.plain(task)}, {length:,} tokens",
        xaxis={"title": "distance back (tokens)", "range": [0, length]},
        yaxis={"title": "influence per 64 tokens (nats)", "type": "log", "exponentformat": "power", **decades},
        height=340,
    )
    if plan is not None:
        _draw_cut(fig, plan, profile, mean, length, layer, head)
    return fig


def head_blocks(profile: InfluenceProfile, task: str, length: int, layer: int, head: int, plan: PlanOrPath | None = None) -> go.Figure:
    """Influence of one query head per block of (query, key) positions (nats, log colours), with what it sees under `plan` outlined.

    Raises ValueError for what was not profiled, for a head that there is not, and where the profile keeps no blocks.
    """
    plan = None if plan is None else as_plan(plan)
    samples_of(profile, task, length)
    if not profile.has_blocks(task, length):
        raise ValueError(f"the profile keeps no blocks of {task!r} at {length} tokens: where its heads look is not known")
    _check(profile, layer, head)
    blocks, tokens = _coarsened(profile.blocks[task, length][layer, head].astype(np.float64), BLOCK_TOKENS)
    top = float(blocks.max()) or 1e-12
    powers = np.log10(np.where(blocks > 0, np.maximum(blocks, top * 1e-5), np.nan))
    ticks = np.arange(np.floor(np.log10(top)) - 4, np.floor(np.log10(top)) + 1)
    centres = (np.arange(len(blocks)) + 0.5) * tokens
    traces: list[go.Heatmap | go.Scatter] = [
        go.Heatmap(
            z=powers,
            x=centres,
            y=centres,
            customdata=blocks,
            colorscale=theme.INFLUENCE_SCALE,
            hoverongaps=False,
            zmin=np.log10(top) - 5,
            zmax=np.log10(top),
            colorbar=theme.bar_above(
                "influence per block (nats, log scale)", tickvals=ticks, ticktext=[f"10<sup>{power:.0f}</sup>" for power in ticks]
            ),
            hovertemplate="queries around %{y:,.0f}, keys around %{x:,.0f}<br><b>%{customdata:.3g} nats</b><extra></extra>",
        )
    ]
    title = f"Layer {layer}, query head {head}: {theme.plain(task)}, {length:,} tokens"
    if plan is not None:
        plan.check_model(profile.geometry)
        keys, queries = _visible_outline(plan, length, layer, head // profile.geometry.group_size)
        traces.append(
            go.Scatter(
                x=keys,
                y=queries,
                mode="lines",
                line={"color": theme.OUTLINE, "width": 2},
                hoverinfo="skip",
                name=f"seen under {theme.plain(plan.name)}",
                showlegend=False,
            )
        )
        title += "; outlined: seen"
    return theme.figure(
        traces,
        title,
        xaxis={"title": "key position (tokens)", "range": [0, length], "showgrid": False, "constrain": "domain"},
        yaxis={"title": "query position (tokens)", "range": [length, 0], "showgrid": False, "scaleanchor": "x", "constrain": "domain"},
        height=440,
    )


def _draw_cut(fig: go.Figure, plan: Plan, profile: InfluenceProfile, mean: np.ndarray, length: int, layer: int, head: int) -> None:
    plan.check_model(profile.geometry)
    kv_head = head // profile.geometry.group_size
    window, seen = int(plan.windows(length)[layer, kv_head]), profile.geometry.dense_span_tokens(layer, length)
    span = int(plan.spans(length)[layer, kv_head])
    # Of the bin that contains the cut, the part beyond it counts as lost.
    lost_part = np.clip((np.arange(len(mean)) + 1) - window / BLOCK_TOKENS, 0, 1)
    total = float(mean.sum())
    kept = 1 - float((mean * lost_part).sum()) / total if total > 0 else 1.0
    # The sink counts where the layer's own window does not hide it.
    if window + (plan.sink_tokens if seen == length else 0) >= seen:
        note = f"span {span:,} tokens: nothing is cut"
    else:
        # Rounded down, so that a cut never reads as 100% kept.
        note = f"span {span:,} tokens keeps {np.floor(1000 * kept) / 10:.1f}%"
        fig.add_vrect(x0=window, x1=seen, fillcolor=theme.OUTLINE, opacity=0.12, line_width=0)
        fig.add_vline(x=window, line={"color": theme.OUTLINE, "width": 2, "dash": "dash"})
    fig.add_annotation(text=note, xref="paper", x=1, xanchor="right", yref="paper", y=1, yanchor="top")


def _visible_outline(plan: Plan, length: int, layer: int, kv_head: int) -> tuple[list[int], list[int]]:
    """Corners (key, query) of the region that the head sees, in tokens, closed."""
    own = plan.geometry.layer_windows[layer]
    window = int(plan.windows(length)[layer, kv_head])
    sink = plan.sink_tokens
    if own is not None and own <= window:
        window, sink = own, 0
    if window + sink >= length:
        corners = [(0, 0), (length, length), (0, length)]
    else:
        # The layer's own window also limits the strip of the sink.
        end = length if own is None else own
        strip = [(sink, window + sink), (sink, min(end + sink, length)), (0, min(end, length))]
        corners = [(0, 0), (length, length), (length - window, length), *(strip if sink else [(0, window)])]
    return [key for key, _ in [*corners, corners[0]]], [query for _, query in [*corners, corners[0]]]


def _coarsened(blocks: np.ndarray, tokens: int) -> tuple[np.ndarray, int]:
    """Blocks summed until there are at most MAX_BLOCKS a side, with the tokens per block."""
    factor = -(-len(blocks) // MAX_BLOCKS)
    if factor == 1:
        return blocks, tokens
    missing = -len(blocks) % factor
    padded = np.pad(blocks, (0, missing))
    side = len(padded) // factor
    return padded.reshape(side, factor, side, factor).sum(axis=(1, 3)), tokens * factor


def samples_of(profile: InfluenceProfile, task: str, length: int) -> np.ndarray:
    """Influence by distance of every sample. Raises ValueError, naming what was profiled, where this was not."""
    if (task, length) not in profile.distances:
        raise ValueError(_unknown(profile, task, length))
    return profile.distances[task, length]


def _check(profile: InfluenceProfile, layer: int, head: int) -> None:
    check_head(profile.geometry.layers, profile.geometry.query_heads, layer, head, "head")


def _unknown(profile: InfluenceProfile, task: str, length: int) -> str:
    known = ", ".join(f"{name!r} at {size}" for name, size in profile.keys) or "nothing"
    return f"the profile has no {task!r} at {length} tokens; it has {known}"
