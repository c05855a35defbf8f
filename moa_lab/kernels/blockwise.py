"""Windowed attention over a sequence without padding, in plain PyTorch: what a mask would hide is not computed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from moa_lab.masks import visible

QUERY_BLOCK = 128
"""Queries that read their keys together: each reads as many keys too many, and fewer start more passes."""


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, windows: np.ndarray, scale: float
) -> torch.Tensor:
    """`windowed_attention` where key i is at position i, the queries are the last ones, and nothing but the future is hidden.

    query: (batch, query_heads, n, head_dim); key, value: (batch, kv_heads, N, head_dim), N at least n; windows: int (kv_heads,), tokens.
    """
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for window in np.unique(windows):
        kv_heads = torch.from_numpy(np.flatnonzero(windows == window)).to(query.device)
        query_heads = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        output[:, query_heads] = _one_window(query[:, query_heads], key[:, kv_heads], value[:, kv_heads], sink_tokens, int(window), scale)
    return output


def _one_window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, window: int, scale: float) -> torch.Tensor:
    """KV heads of one window, and the query heads that read them: (batch, query_heads, n, head_dim)."""
    n, offset = key.shape[2], key.shape[2] - query.shape[2]
    # The first `span` tokens see all that came before them.
    whole = min(n, sink_tokens + window)
    parts = []
    if offset < whole:
        # Rows for the tokens that ask nothing, so that the future can be skipped and need not be masked.
        asked = F.pad(query[:, :, : whole - offset], (0, 0, offset, 0))
        known, values = (x[:, :, :whole].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        first = F.scaled_dot_product_attention(asked, known, values, is_causal=True, scale=scale)
        parts.append(first[:, :, offset:])
    begin = max(whole, offset)
    blocks = (n - begin) // QUERY_BLOCK
    start = n - blocks * QUERY_BLOCK
    if start > begin:
        parts.append(_blocks(query, key, value, sink_tokens, window, scale, begin, start - begin, 1))
    if blocks:
        parts.append(_blocks(query, key, value, sink_tokens, window, scale, start, QUERY_BLOCK, blocks))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_tokens: int, window: int, scale: float,
    start: int, size: int, count: int,
) -> torch.Tensor:  # fmt: skip
    """Queries from position `start` on in `count` blocks of `size`, all at once: each reads the sink and the keys within its window's
    reach."""
    batch, kv_heads, _, width = key.shape
    group = query.shape[1] // kv_heads
    stop, reach, offset = start + count * size, window - 1 + size, key.shape[2] - query.shape[2]

    def read(x: torch.Tensor) -> torch.Tensor:
        near = x[:, :, start - window + 1 : stop].unfold(2, reach, size).transpose(-1, -2)
        sink = x[:, :, None, :sink_tokens].expand(-1, -1, count, -1, -1)
        return torch.cat([sink, near], dim=3).reshape(batch, kv_heads * count, sink_tokens + reach, width)

    # The query heads of a group one below the other: a block's keys are read once for all of them.
    asked = query[:, :, start - offset : stop - offset].reshape(batch, kv_heads, group, count, size, width)
    asked = asked.transpose(2, 3).reshape(batch, kv_heads * count, group * size, width)
    shown = _shown(size, window, sink_tokens, query.device).repeat(group, 1)
    found = F.scaled_dot_product_attention(asked, read(key), read(value), attn_mask=shown, scale=scale)
    return found.reshape(batch, kv_heads, count, group, size, width).transpose(2, 3).reshape(batch, kv_heads * group, count * size, width)


@lru_cache(maxsize=256)
def _shown(size: int, window: int, sink_tokens: int, device: torch.device) -> torch.Tensor:
    """What a block sees of the keys that it reads, bool (size, sink + window - 1 + size): the same for every block, as none begins
    before its window has left the sink."""
    first = sink_tokens + window
    queries = torch.arange(first, first + size, device=device)[:, None]
    keys = torch.cat([torch.arange(sink_tokens, device=device), torch.arange(first - window + 1, first + size, device=device)])
    return visible(queries, keys, sink_tokens, window)
