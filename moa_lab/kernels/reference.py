"""Masked attention in plain PyTorch: the reference, and the backend that masks but saves no memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from moa_lab.masks import KeyMask, visible

QUERY_BLOCK = 512
"""Queries per block: larger blocks read keys that most of their queries do not see, smaller ones launch more kernels."""


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that `shown` allows: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim); key, value: (batch, kv_heads, key_tokens, head_dim), where query
    head h reads KV head h // group. shown: bool, broadcastable to (batch, query_heads, query_tokens, key_tokens).
    softcap: scores become `softcap * tanh(score / softcap)` before masking (Gemma 2). sink_logits:
    broadcastable to (batch, query_heads, query_tokens, 1), the score of a key that all queries see and whose value is 0, so that a
    row's weights sum to less than 1 (gpt-oss); not capped.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    if softcap is None and sink_logits is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=scale)
    scores = query @ key.transpose(-1, -2) * (scale if softcap is None else scale / softcap)
    if softcap is not None:
        scores = softcap * torch.tanh(scores)
    scores = scores.masked_fill(~shown, float("-inf"))
    if sink_logits is None:
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    weights, _ = softmax_with_sink(scores, sink_logits)
    return weights.to(query.dtype) @ value


def softmax_with_sink(scores: torch.Tensor, sink_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys and one more key of score `sink_logits`: the weights of the keys, and of that one (..., queries, 1).

    At least float32. Source: gpt-oss (OpenAI, 2025), after StreamingLLM's sink of zero (Xiao et al., 2023).
    """
    last = sink_logits.to(scores.dtype).expand(*scores.shape[:-1], 1)
    weights = torch.cat([scores, last], dim=-1).softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights[..., :-1], weights[..., -1:]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyMask,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`masked_attention` over all that a model's own `mask` shows; the future is skipped, not masked, where nothing else is hidden."""
    if softcap is not None or sink_logits is not None or not mask.is_causal:
        return masked_attention(query, key, value, mask.positions >= 0, scale, softcap, sink_logits)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_positions: torch.Tensor,
    positions: torch.Tensor,
    sink_tokens: int,
    windows: np.ndarray,
    scale: float,
    softcap: float | None = None,
    gaps: bool = False,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`masked_attention` in which KV head g sees the sink and its own `windows[g]` tokens: int (kv_heads,).

    query_positions: int32 (batch or 1, 1, query_tokens, 1); positions: int32 (batch or 1, 1, query_tokens, key_tokens), the
    key's position, -1 where the model itself hides the key. In a row, keys and their positions are in the same order and, but for
    padding between tokens (gaps), equally far apart. Heads of one window share a mask, and without gaps a block of queries reads the
    sink and the window's keys alone, so work and memory fall with the windows. sink_logits: (query_heads, 1, 1).
    """
    group = query.shape[1] // key.shape[1]
    tokens, keys = query.shape[2], key.shape[2]
    offset = keys - tokens
    # The newest key's position tells where position 0 is: after the padding, or before the first column if a cache dropped it.
    sink_end = max(keys - 1 - int(positions[:, 0, -1, -1].min()) + sink_tokens, 0)
    output = torch.empty_like(query)
    for window in np.unique(windows):
        kv_heads = torch.from_numpy(np.flatnonzero(windows == window)).to(query.device)
        query_heads = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        asked, known, values = query[:, query_heads], key[:, kv_heads], value[:, kv_heads]
        sinks = None if sink_logits is None else sink_logits[query_heads]
        blocks = []
        for start in range(0, tokens, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, tokens)
            read = [slice(0, offset + stop)] if gaps else _reached(offset + start, offset + stop, sink_end, int(window))
            rows = positions[:, :, start:stop]
            at = torch.cat([rows[..., part] for part in read], dim=-1)
            shown = visible(query_positions[:, :, start:stop], at, sink_tokens, int(window)) & (at >= 0)
            near_keys, near_values = (torch.cat([x[:, :, part] for part in read], dim=2) for x in (known, values))
            blocks.append(masked_attention(asked[:, :, start:stop], near_keys, near_values, shown, scale, softcap, sinks))
        output[:, query_heads] = torch.cat(blocks, dim=2)
    return output


def _reached(first: int, stop: int, sink_end: int, window: int) -> list[slice]:
    """The keys that queries at columns `first` to `stop` may see: the sink, and all from the first query's window on."""
    near = max(first - window + 1, 0)
    return [slice(0, stop)] if near <= sink_end else [slice(0, sink_end), slice(near, stop)]
