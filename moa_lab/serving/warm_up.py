"""Compiling all that passes launch before an engine answers: in the midst of answers it takes a second here and there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moa_lab.serving.paged import LayerHeads, layer_attention
from moa_lab.serving.step import Scoring, Step

NEW, PAST = 20, 40
"""Tokens of a prompt, and of what came before one that comes in chunks; fewer where requests are shorter."""
OWN_PAGE = 1
"""Of two. Page 0 is never written."""


def warm_up(
    kinds: Sequence[LayerHeads], page_bytes: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, scoring: Scoring,
    device: torch.device,
) -> None:  # fmt: skip
    """A pass of each sort of request through a layer: a prompt, one that goes on, one new token; all zeros, on pages of its own.

    page_bytes: of a page of the engine's pool. heads: of queries and KV heads.
    """
    query_heads, kv_heads = heads
    most = min(alike.capacity for alike in kinds)
    new = min(NEW, most)
    past = min(PAST, most - new)
    counts = (new, new, 1)
    # As a layer that makes them together gives them.
    made = torch.zeros(sum(counts), query_heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    query, key, value = made.split([query_heads, kv_heads, kv_heads], dim=1)
    raw = torch.zeros(1 + OWN_PAGE, page_bytes, dtype=torch.int8, device=device)
    columns = max(alike.columns for alike in kinds)
    table = torch.full((len(counts), columns), OWN_PAGE, dtype=torch.int32, device=device)
    lengths, firsts = [new, past + new, past + 1], [0, new, 2 * new, 2 * new + 1]
    buckets, lengths_there, firsts_there = (torch.tensor(told, device=device) for told in ([0] * len(counts), lengths, firsts))
    step = Step(table, buckets, lengths_there, firsts_there, (firsts, lengths))
    layer_attention(kinds, raw, query, key, value, step, scoring)
