"""Attention over a ring cache in plain PyTorch: the reference, and the backend without Triton."""

from __future__ import annotations

import torch

from moa_lab.cache import RingLayer
from moa_lab.kernels.reference import masked_attention
from moa_lab.masks import visible


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    padding: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens to the ring and to one another: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim), the last of the new tokens; key, value: (batch, kv_heads, tokens, head_dim),
    as the ring will store them, not yet written to it. lengths: int32 (batch,), tokens of each row with the new ones; padding: int32
    (batch,), number of leading padding columns, whose output has no meaning. sink_logits: (query_heads, 1, 1), as in `masked_attention`.
    """
    tokens, group = key.shape[2], query.shape[1] // key.shape[1]
    layout = ring.layout
    column = torch.arange(tokens, device=query.device, dtype=torch.int32)
    position = lengths[:, None] - tokens + column
    new = torch.where(column >= padding[:, None], position, -1)
    asked, real = (x[:, tokens - query.shape[2] :] for x in (position, new >= 0))
    past = ring.positions(lengths - tokens + padding)
    output = torch.empty_like(query)
    for head, window in enumerate(layout.windows):
        part = slice(int(layout.starts[head]), int(layout.starts[head + 1]))
        known = torch.cat([past[:, part], new], dim=1)[:, None, None]
        held_key, held_value = ring.held(head)
        near_key = torch.cat([held_key[:, None], key[:, head : head + 1]], dim=2)
        near_value = torch.cat([held_value[:, None], value[:, head : head + 1]], dim=2)
        heads = slice(head * group, (head + 1) * group)
        shown = _shown(asked[:, None, :, None], known, layout.sink_tokens, window, layout.reach)
        # A padding query may see all keys: with none its softmax would be 0/0.
        shown = shown | ~real[:, None, :, None]
        sinks = None if sink_logits is None else sink_logits[heads]
        output[:, heads] = masked_attention(query[:, heads], near_key, near_value, shown, scale, softcap, sinks)
    return output


def newest_attention(
    query: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every row's newest token, already in the ring: (batch, query_heads, 1, head_dim).

    query: (batch, query_heads, 1, head_dim); lengths: int32 (batch,), at least 1; sink_logits: (query_heads, 1, 1), as in
    `masked_attention`.
    """
    layout, heads = ring.layout, query.shape[1]
    group = heads // len(layout.windows)
    positions = None if layout.reach is None else ring.positions(lengths)
    output = torch.empty_like(query)
    for head, window in enumerate(layout.windows):
        part = slice(int(layout.starts[head]), int(layout.starts[head + 1]))
        if positions is None:
            # The ring holds exactly what its head sees.
            shown = torch.arange(part.stop - part.start, device=query.device) < lengths[:, None]
        else:
            shown = _shown(lengths[:, None] - 1, positions[:, part], layout.sink_tokens, window, layout.reach)
        rows = slice(head * group, (head + 1) * group)
        # One KV head: its query heads take the place of the query tokens.
        asked = query[:, rows].transpose(1, 2)
        sinks = None if sink_logits is None else sink_logits[rows].transpose(0, 1)
        held_key, held_value = ring.held(head)
        found = masked_attention(asked, held_key[:, None], held_value[:, None], shown[:, None, None], scale, softcap, sinks)
        output[:, rows] = found.transpose(1, 2)
    return output


def _shown(asked: torch.Tensor, known: torch.Tensor, sink_tokens: int, window: int, reach: int | None) -> torch.Tensor:
    shown = visible(asked, known, sink_tokens, window) & (known >= 0)
    return shown if reach is None else shown & (asked - known < reach)
