"""Maps of all heads: their long-range influence, and how it differs between two lengths, tasks or profiles."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.influence import samples_of
from moa_lab.figures.order import in_order
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile, ProfileKey

HeadPool = Literal["max", "mean", "sum"]
"""How the query heads that share a KV head are reduced to one number."""


def influence_map(
    profile: InfluenceProfile, task: str, length: int, beyond_tokens: int = 128, pool: HeadPool | None = None, *,
    order: np.ndarray | None = None, by: str = "",
) -> go.Figure:  # fmt: skip
    """Heat-map of long-range influence in nats: `z[query_head, layer]`, with lines between the groups that share a KV head.

    With `pool`, a row per KV head: `z[kv_head, layer]`. order: the heads of every layer from the first row to the last, as of
    `span_map`; `customdata[row, layer]` = (KV head, % of the head's influence, rank, head). by: names the order. Raises ValueError for an
    order that is no permutation.
    """
    long_range = long_range_influence(profile, task, length, beyond_tokens, pool)
    # A share of the group's summed influence, whatever `pool` is: a ratio of maxima is no share.
    shared: HeadPool | None = "sum" if pool else None
    total = _pooled(profile.distance(task, length).sum(axis=2), profile.geometry.group_size, shared)
    part = long_range_influence(profile, task, length, beyond_tokens, shared)
    share = np.divide(part, total, out=np.zeros_like(total), where=total > 0)
    rank = (-long_range).ravel().argsort(kind="stable").argsort().reshape(long_range.shape) + 1
    details = np.stack([_kv_heads(profile, pool), 100 * share, rank, np.indices(rank.shape)[1]], axis=-1)
    heat = go.Heatmap(
        z=in_order(long_range, order).T,
        zmin=0,
        zmax=max(float(long_range.max()), 1e-12),
        colorscale=theme.INFLUENCE_SCALE,
        xgap=theme.cell_gap(*long_range.T.shape),
        ygap=theme.cell_gap(*long_range.T.shape),
        customdata=in_order(details, order).transpose(1, 0, 2),
        colorbar=theme.bar_above(f"influence beyond {beyond_tokens:,} tokens (nats)", tickformat="~g", nticks=6),
        hovertemplate=(
            f"{_row_name(pool, '%{customdata[3]}')}<br><b>%{{z:.3g}} nats</b> beyond {beyond_tokens:,} tokens"
            f"<br>%{{customdata[1]:.0f}}% of the head's influence<br>rank %{{customdata[2]}} of {long_range.size:,}<extra></extra>"
        ),
    )
    fig = _head_map(heat, profile, f"Long-range influence: {theme.plain(task)}, {length:,} tokens", pool, grouped=order is None)
    return fig if order is None else fig.update_yaxes(title_text=f"{'KV' if pool else 'query'} heads, {by}")


def difference_map(
    profile: InfluenceProfile,
    key: ProfileKey,
    other: InfluenceProfile,
    other_key: ProfileKey,
    beyond_tokens: int = 128,
    pool: HeadPool | None = None,
    against: str = "the other",
) -> go.Figure:
    """`influence_map` of (task, length) `key` minus that of `other`, in nats, symmetric around 0; `against` names the other.

    `other` may be the same profile, at another key. Raises ValueError for a profile of another model.
    """
    if not profile.geometry.fits(other.geometry):
        raise ValueError("the two profiles are of models of different geometry: their heads cannot be compared")
    here = long_range_influence(profile, *key, beyond_tokens, pool)
    there = long_range_influence(other, *other_key, beyond_tokens, pool)
    change = here - there
    reach = max(float(np.abs(change).max()), 1e-12)
    heat = go.Heatmap(
        z=change.T,
        zmin=-reach,
        zmax=reach,
        colorscale=theme.DIFFERENCE_SCALE,
        xgap=theme.cell_gap(*change.T.shape),
        ygap=theme.cell_gap(*change.T.shape),
        customdata=np.stack([_kv_heads(profile, pool), here, there], axis=-1).transpose(1, 0, 2),
        colorbar=theme.bar_above(f"difference of the influence beyond {beyond_tokens:,} tokens (nats)", tickformat="~g", nticks=6),
        hovertemplate=(f"{_row_name(pool)}<br><b>%{{z:+.3g}} nats</b> = %{{customdata[1]:.3g}} less %{{customdata[2]:.3g}}<extra></extra>"),
    )
    task, length = key
    return _head_map(heat, profile, f"{theme.plain(task)}, {length:,} tokens, less {theme.plain(against)}", pool)


def long_range_influence(
    profile: InfluenceProfile, task: str, length: int, beyond_tokens: int = 128, pool: HeadPool | None = None
) -> np.ndarray:
    """Influence in nats of keys at least `beyond_tokens` back, rounded up to whole bins: float64 (layers, query_heads).

    With `pool`, (layers, kv_heads): the largest, mean or sum of the query heads that share a KV head. Raises ValueError for what was
    not profiled, and for an unknown pool.
    """
    samples_of(profile, task, length)
    far = profile.distance(task, length)[:, :, -(-beyond_tokens // BLOCK_TOKENS) :].sum(axis=2)
    return _pooled(far, profile.geometry.group_size, pool)


def _pooled(values: np.ndarray, group: int, pool: HeadPool | None) -> np.ndarray:
    """values (layers, query_heads), with `pool` (layers, kv_heads)."""
    if pool is None:
        return values
    if pool not in get_args(HeadPool):
        raise ValueError(f"pool must be one of {', '.join(get_args(HeadPool))}, or None, got {pool!r}")
    groups = values.reshape(len(values), -1, group)
    return groups.max(axis=2) if pool == "max" else groups.mean(axis=2) if pool == "mean" else groups.sum(axis=2)


def _kv_heads(profile: InfluenceProfile, pool: HeadPool | None) -> np.ndarray:
    """The KV head of every cell: (layers, rows)."""
    geometry = profile.geometry
    rows = np.arange(geometry.kv_heads) if pool else np.arange(geometry.query_heads) // geometry.group_size
    return np.broadcast_to(rows, (geometry.layers, len(rows)))


def _row_name(pool: HeadPool | None, head: str = "%{y}") -> str:
    return f"layer %{{x}} · KV head {head}" if pool else f"layer %{{x}} · query head {head} (KV head %{{customdata[0]}})"


def _head_map(heat: go.Heatmap, profile: InfluenceProfile, title: str, pool: HeadPool | None, grouped: bool = True) -> go.Figure:
    """A figure of `z[head, layer]`; grouped: with lines between the groups that share a KV head."""
    geometry = profile.geometry
    heads = geometry.kv_heads if pool else geometry.query_heads
    fig = theme.figure(
        heat,
        title + (f"; {pool} of the query heads of a KV head" if pool else ""),
        xaxis={"title": "layer", **theme.head_ticks(geometry.layers)},
        yaxis={"title": "KV head" if pool else "query head", **theme.head_ticks(heads), "range": [heads - 0.5, -0.5]},
        height=theme.grid_height(heads),
    )
    if grouped and geometry.group_size > 1 and not pool:
        for edge in range(geometry.group_size, heads, geometry.group_size):
            fig.add_hline(y=edge - 0.5, line_width=2)
    return fig
