"""Masked attention in plain PyTorch: the reference, and the backend that masks but saves no memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from moa_lab.masks import visible


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that `shown` allows: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim); key, value: (batch, kv_heads, key_tokens, head_dim), where query
    head h reads KV head h // group. shown: bool, broadcastable to (batch, query_heads, query_tokens, key_tokens).
    softcap: scores become `softcap * tanh(score / softcap)` before masking (Gemma 2).
    """
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=shown, scale=scale)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    weights = scores.masked_fill(~shown, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


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
) -> torch.Tensor:
    """`masked_attention` in which KV head g sees the sink and its own `windows[g]` tokens: int (kv_heads,).

    query_positions: int32 (batch or 1, 1, query_tokens, 1); positions: int32 (batch or 1, 1, query_tokens, key_tokens), the
    key's position, -1 where the model itself hides the key. Heads of one window share a mask: no mask per head is ever held.
    """
    group = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for window in np.unique(windows):
        kv_heads = torch.from_numpy(np.flatnonzero(windows == window)).to(query.device)
        query_heads = (kv_heads[:, None] * group + torch.arange(group, device=kv_heads.device)).flatten()
        shown = visible(query_positions, positions, sink_tokens, int(window)) & (positions >= 0)
        output[:, query_heads] = masked_attention(query[:, query_heads], key[:, kv_heads], value[:, kv_heads], shown, scale, softcap)
    return output
