"""Windowed attention over one whole sequence without padding, in plain PyTorch: what a mask would hide is not computed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from moa_lab.masks import visible

QUERY_BLOCK = 384
"""Queries that read their keys together: each reads as many keys too many, and fewer start more passes."""


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, windows: np.ndarray, scale: float
) -> torch.Tensor:
    """`windowed_attention` where query i is at position i and nothing but the future is hidden.

    query: (batch, query_heads, N, head_dim); key, value: (batch, kv_heads, N, head_dim); windows: int (kv_heads,), tokens.
    """
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for window in np.unique(windows):
        kv_heads = torch.from_numpy(np.flatnonzero(windows == window)).to(query.device)
        query_heads = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        known, values = (x[:, kv_heads].repeat_interleave(group, dim=1) for x in (key, value))
        output[:, query_heads] = _one_window(query[:, query_heads], known, values, sink_tokens, int(window), scale)
    return output


def _one_window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, window: int, scale: float) -> torch.Tensor:
    """Heads of one window, K and V a head each: (batch, heads, N, head_dim)."""
    n, span = query.shape[2], sink_tokens + window
    # The first `span` queries see all that came before them.
    whole = min(n, span)
    first = F.scaled_dot_product_attention(query[:, :, :whole], key[:, :, :whole], value[:, :, :whole], is_causal=True, scale=scale)
    if whole == n:
        return first
    blocks = (n - whole) // QUERY_BLOCK
    start = n - blocks * QUERY_BLOCK
    parts = [first]
    if start > whole:
        parts.append(_blocks(query, key, value, sink_tokens, window, scale, whole, start - whole, 1))
    if blocks:
        parts.append(_blocks(query, key, value, sink_tokens, window, scale, start, QUERY_BLOCK, blocks))
    return torch.cat(parts, dim=2)


def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, window: int, scale: float,
    start: int, size: int, count: int,
) -> torch.Tensor:  # fmt: skip
    """Queries from `start` on in `count` blocks of `size`, all at once: each reads the sink and the keys within its window's reach."""
    batch, heads, _, width = query.shape
    stop, reach = start + count * size, window - 1 + size

    def read(x: torch.Tensor) -> torch.Tensor:
        near = x[:, :, start - window + 1 : stop].unfold(2, reach, size).transpose(-1, -2)
        sink = x[:, :, None, :sink_tokens].expand(-1, -1, count, -1, -1)
        return torch.cat([sink, near], dim=3).reshape(batch, heads * count, sink_tokens + reach, width)

    asked = query[:, :, start:stop].reshape(batch, heads * count, size, width)
    shown = _shown(size, window, sink_tokens, query.device)
    found = F.scaled_dot_product_attention(asked, read(key), read(value), attn_mask=shown, scale=scale)
    return found.reshape(batch, heads, count * size, width)


@lru_cache(maxsize=256)
def _shown(size: int, window: int, sink_tokens: int, device: torch.device) -> torch.Tensor:
    """What a block sees of the keys that it reads, bool (size, sink + window - 1 + size): the same for every block, as none begins
    before its window has left the sink."""
    first = sink_tokens + window
    queries = torch.arange(first, first + size, device=device)[:, None]
    keys = torch.cat([torch.arange(sink_tokens, device=device), torch.arange(first - window + 1, first + size, device=device)])
    return visible(queries, keys, sink_tokens, window)
