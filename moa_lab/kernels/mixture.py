"""Attention that is a weighted mean over several windows at once, in one pass, with a slope for every weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 64
"""Tokens per block; windows are whole blocks."""
LEAST = 1e-20


def mixed_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shown: torch.Tensor,
    weights: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`sum over n of weights[..., n - 1] * (attention to the sink and the last n blocks)`: as `query`.

    query: (batch, query_heads, tokens, head_dim); key, value: (batch, kv_heads, tokens, head_dim); shown: bool, broadcastable to
    (batch, query_heads, tokens, tokens), what the model itself shows. weights: (batch, kv_heads, blocks), with
    blocks = ceil(tokens / 64). A block of queries sees the same blocks of keys, so a window of n blocks holds 64 (n - 1) to 64 n
    tokens; the sink is rounded up to whole blocks. sink_logits: (query_heads, 1, 1), as in `masked_attention`.

    A query's softmax over its last n blocks is `exp(score) / Z_n`, so the mean over n weighs a key d blocks away by
    `exp(score) * sum over n > d of weights[n] / Z_n`: the scores are computed once for all windows.
    """
    batch, query_heads, tokens, _ = query.shape
    blocks = weights.shape[-1]
    padding = blocks * BLOCK - tokens
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, padding)) for x in (query, key, value))
        shown = F.pad(shown, (0, padding, 0, padding))
    group = query_heads // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~shown, torch.finfo(scores.dtype).min)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    if sink_logits is not None:
        highest = highest.maximum(sink_logits.detach().to(highest.dtype))
    mass = (scores - highest).exp().masked_fill(~shown, 0).unflatten(-1, (blocks, BLOCK))
    per_block = mass.sum(dim=-1, dtype=torch.float32)

    # Blocks of keys, ordered by their distance from the query's own block.
    index = torch.arange(blocks, device=query.device)
    back = (index[:, None] - index).repeat_interleave(BLOCK, dim=0)
    sink = index < -(-sink_tokens // BLOCK)
    distance = torch.where(back >= 0, back, blocks)
    far = torch.where(sink, 0.0, per_block)
    by_distance = F.pad(far, (0, 1)).gather(-1, distance.clamp(max=blocks).expand(batch, query_heads, -1, -1))
    held = torch.where(sink, per_block, 0.0).sum(dim=-1, keepdim=True) + by_distance.cumsum(dim=-1)
    if sink_logits is not None:
        # The sink logit is part of every window's sum.
        held = held + (sink_logits - highest).exp().float()
    share = weights.float().repeat_interleave(group, dim=1)[:, :, None] / held.clamp(min=LEAST)
    beyond = F.pad(share.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
    nearest = torch.where(sink, 0, distance)
    factor = beyond.gather(-1, nearest.expand(batch, query_heads, -1, -1))
    mixed = (mass * factor[..., None].to(mass.dtype)).flatten(-2)
    return (mixed @ value)[:, :, :tokens]
