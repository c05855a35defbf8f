"""Lifelike small profiles, and tables of them small enough to try every choice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from moa_lab.geometry import ModelGeometry
from moa_lab.plan import DENSE, SpanRule
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile, LossTable
from moa_lab.search import loss_table

SINK = 64
# Their order by span differs between short and long inputs.
RULES = (SpanRule(128.0, 0.0), SpanRule(0.0, 0.5), SpanRule(320.0, 0.0), DENSE)


def skewed_profile(
    layers: int = 2,
    query_heads: int = 4,
    kv_heads: int = 2,
    lengths: Sequence[int] = (256, 512),
    tasks: Sequence[str] = ("questions", "summaries"),
    seed: int = 0,
    windows: tuple[int | None, ...] = (),
) -> InfluenceProfile:
    """Single-value influence in which few heads look far: heavy-tailed heads, most mass nearby, a bump somewhere behind."""
    random = np.random.default_rng(seed)
    geometry = ModelGeometry(layers, query_heads, kv_heads, 16, 8192, windows)
    heads = (layers, query_heads)
    blocks, distances = {}, {}
    for task in tasks:
        strength, far = random.lognormal(0.0, 1.0, heads), random.lognormal(-2.0, 1.2, heads)
        place, width = random.random(heads), 0.05 + 0.3 * random.random(heads)
        for length in lengths:
            bins = length // BLOCK_TOKENS
            back = np.arange(bins)
            bump = np.exp(-(((back / bins - place[..., None]) / width[..., None]) ** 2)) / bins
            curve = strength[..., None] * (np.exp(-back) + 0.05 / (1 + back)) + far[..., None] * bump
            reach = np.array([geometry.dense_span_tokens(layer, length) for layer in range(layers)])
            seen = (BLOCK_TOKENS * back < reach[:, None])[:, None, :]
            distances[task, length] = (curve * seen * random.lognormal(0.0, 0.3, (3, *heads, bins))).astype(np.float32)
            blocks[task, length] = np.zeros((*heads, bins, bins), dtype=np.float32)
    return InfluenceProfile(geometry, SINK, blocks, distances)


@st.composite
def small_tables(draw: st.DrawFn, rules: Sequence[SpanRule] | None = RULES) -> LossTable:
    """Tables of 2 or 3 layers of at most 2 KV heads with all forms; `rules=None` takes the default grid."""
    layers, kv_heads = draw(st.sampled_from([(2, 2), (3, 1), (2, 1)]))
    window = draw(st.sampled_from([None, 256]))
    profile = skewed_profile(
        layers, 2 * kv_heads, kv_heads, (256, 512), seed=draw(st.integers(0, 10_000)), windows=(window, *(None,) * (layers - 1))
    )
    return loss_table(profile, rules)
