"""The spans of a plan's heads, the mask of one head, and the rules."""

from __future__ import annotations

from collections import Counter

import numpy as np
import plotly.graph_objects as go

from moa_lab.figures import theme
from moa_lab.figures.order import in_order
from moa_lab.plan import Plan, PlanOrPath, as_plan

MAX_BLOCKS = 128


def span_map(
    plan: PlanOrPath, n_tokens: int, compared_with: PlanOrPath | None = None, *, order: np.ndarray | None = None, by: str = "",
    detailed: bool = True,
) -> go.Figure:  # fmt: skip
    """Heat-map of spans in tokens: `z[row, layer]`, `customdata[row, layer]` = (layer, head, span, % of N, alpha, beta).

    With `compared_with` the colours show the difference in tokens to that plan, symmetric around 0. order: the heads of every layer from
    the first row to the last, int (layers, kv_heads), for instance `figures.largest_first(plan.spans(n_tokens))`; None: by number. by:
    names the order. detailed: False for `customdata[row, layer]` = head, a sixth of what a page is sent of a large model; its hover tells
    no rule. Raises ValueError when the two plans are for different geometries, and for an order that is no permutation.
    """
    plan, compared_with = as_plan(plan), None if compared_with is None else as_plan(compared_with)
    spans = plan.spans(n_tokens)
    layers, heads = spans.shape
    details = span_details(plan, spans, n_tokens, order) if detailed else in_order(np.indices(spans.shape)[1], order).T
    colours = {
        "z": in_order(spans, order).T,
        "zmin": 0,
        "zmax": n_tokens,
        "colorscale": theme.SPAN_SCALE,
        "colorbar": theme.bar_above("span (tokens)", tickformat=",d"),
    }
    title = f"Spans of {theme.plain(plan.name)} at {n_tokens:,} tokens"
    if compared_with is not None:
        plan.check_model(compared_with.geometry)
        change = in_order(spans - compared_with.spans(n_tokens), order).T
        reach = max(int(np.abs(change).max()), 1)
        colours = {"z": change, "zmin": -reach, "zmax": reach, "colorscale": theme.DIFFERENCE_SCALE}
        colours["colorbar"] = theme.bar_above("difference (tokens)")
        title = f"Spans of {theme.plain(plan.name)} less {theme.plain(compared_with.name)} at {n_tokens:,} tokens"
    heat = go.Heatmap(
        **colours,
        customdata=details,
        xgap=theme.cell_gap(heads, layers),
        ygap=theme.cell_gap(heads, layers),
        hovertemplate=(
            "layer %{customdata[0]} · KV head %{customdata[1]}<br><b>%{customdata[2]:,} tokens</b> = %{customdata[3]:.1f}% of N"
            "<br>rule: alpha %{customdata[4]:,}, beta %{customdata[5]:.4~f}<extra></extra>"
            if detailed
            else "layer %{x} · KV head %{customdata}<br><b>%{z:,} tokens</b><extra></extra>"
        ),
    )
    return theme.figure(
        heat,
        title,
        xaxis={"title": "layer", **theme.head_ticks(layers)},
        yaxis={"title": f"KV heads, {by}" if order is not None else "KV head", **theme.head_ticks(heads), "range": [heads - 0.5, -0.5]},
        height=theme.grid_height(heads),
    )


def span_details(plan: Plan, spans: np.ndarray, n_tokens: int, order: np.ndarray | None = None) -> np.ndarray:
    """`customdata` of a detailed `span_map`: float64 (rows, layers, 6). spans: of the plan at `n_tokens`, (layers, kv_heads)."""
    rules = np.array([[(rule.alpha, rule.beta) for rule in row] for row in plan.rules])
    numbers = np.moveaxis(np.indices(spans.shape), 0, -1)
    details = np.concatenate([numbers, spans[..., None], (100 * spans / n_tokens)[..., None], rules], axis=-1)
    return in_order(details, order).transpose(1, 0, 2)


def mask_preview(plan: PlanOrPath, layer: int, kv_head: int, n_tokens: int) -> go.Figure:
    """What one head sees in a prefill of `n_tokens`: share of visible (query, key) pairs per block, at most 128 x 128 blocks.

    Raises ValueError for a head that the plan does not have.
    """
    plan = as_plan(plan)
    check_head(plan.geometry.layers, plan.geometry.kv_heads, layer, kv_head, "kv_head")
    edges, share = visible_share(
        n_tokens, plan.sink_tokens, int(plan.windows(n_tokens)[layer, kv_head]), plan.geometry.layer_windows[layer]
    )
    centres = (edges[:-1] + edges[1:]) / 2
    span = int(plan.spans(n_tokens)[layer, kv_head])
    heat = go.Heatmap(
        z=100 * share,
        x=centres,
        y=centres,
        zmin=0,
        zmax=100,
        colorscale=theme.SPAN_SCALE,
        colorbar=theme.bar_above("pairs seen (% of the causal ones)"),
        hovertemplate="queries around %{y:,.0f}, keys around %{x:,.0f}<br>%{z:.0f}% seen<extra></extra>",
        hoverongaps=False,
    )
    return theme.figure(
        heat,
        f"Layer {layer}, KV head {kv_head} sees {span:,} of {n_tokens:,} tokens",
        xaxis={"title": "key position (tokens)", "range": [0, n_tokens], "showgrid": False, "constrain": "domain"},
        yaxis={"title": "query position (tokens)", "range": [n_tokens, 0], "showgrid": False, "scaleanchor": "x", "constrain": "domain"},
        height=440,
    )


def rule_curves(plan: PlanOrPath, longest: int) -> go.Figure:
    """Span against length for every rule of the plan, up to `longest` tokens; the wider a line, the more heads have the rule.

    Raises ValueError for a length below 1.
    """
    plan = as_plan(plan)
    if longest < 1:
        raise ValueError(f"longest must be at least 1 token, got {longest}")
    lengths = np.unique(np.linspace(1, longest, 65).astype(int))
    counts = Counter(rule for row in plan.rules for rule in row)
    traces = []
    for rule, heads in sorted(counts.items(), key=lambda item: item[0].span_tokens(longest, plan.min_span)):
        traces.append(
            go.Scatter(
                x=lengths,
                y=[rule.span_tokens(int(n), plan.min_span, plan.span_multiple) for n in lengths],
                mode="lines",
                line={"width": 1 + 5 * heads / max(counts.values())},
                name=f"{rule.alpha:,.0f} + {rule.beta:.3g} N",
                hovertemplate=f"{heads} of {plan.geometry.layers * plan.geometry.kv_heads} heads<br>%{{y:,}} of %{{x:,}} tokens",
            )
        )
    return theme.figure(
        traces,
        f"The rules of {theme.plain(plan.name)}",
        xaxis={"title": "length N (tokens)"},
        yaxis={"title": "span (tokens)"},
        height=420,
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
    )


def visible_share(n_tokens: int, sink_tokens: int, window_tokens: int, own_window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Block edges in tokens, and the share of causal pairs that are visible per (query block, key block); NaN where none is causal.

    Counted in closed form, so that the cost does not depend on the length. `own_window` is the layer's own sliding window, which
    hides the sink as well.
    """
    size = -(-n_tokens // MAX_BLOCKS)
    edges = np.minimum(np.arange(0, n_tokens + size, size), n_tokens)
    query, key = edges[:, None].astype(np.int64), edges[None, :].astype(np.int64)
    causal = _pairs_beyond(query, key, 0)
    hidden = np.zeros_like(causal)
    if own_window is not None:
        hidden += _pairs_beyond(query, key, own_window)
    if own_window is None or window_tokens < own_window:
        hidden += _beyond_sink(query, key, window_tokens, sink_tokens)
        if own_window is not None:
            hidden -= _beyond_sink(query, key, own_window, sink_tokens)
    total, seen = _per_block(causal), _per_block(causal - hidden)
    return edges, np.divide(seen, total, out=np.full(total.shape, np.nan), where=total > 0)


def check_head(layers: int, heads: int, layer: int, head: int, name: str) -> None:
    """Raise ValueError unless (layer, head) exists; `name` is the head argument's name."""
    if not (0 <= layer < layers and 0 <= head < heads):
        raise ValueError(f"layer and {name} must be below {layers} and {heads}, got {layer} and {head}")


def _pairs_beyond(queries: np.ndarray, keys: np.ndarray, distance: int) -> np.ndarray:
    """Number of pairs with query < `queries`, key < `keys` and query - key >= `distance`."""
    reach = np.maximum(queries - distance, 0)
    inside = np.minimum(reach, keys)
    return inside * (inside + 1) // 2 + (reach - inside) * keys


def _beyond_sink(queries: np.ndarray, keys: np.ndarray, distance: int, sink_tokens: int) -> np.ndarray:
    return _pairs_beyond(queries, keys, distance) - _pairs_beyond(queries, np.minimum(keys, sink_tokens), distance)


def _per_block(cumulated: np.ndarray) -> np.ndarray:
    return np.diff(np.diff(cumulated, axis=0), axis=1)
