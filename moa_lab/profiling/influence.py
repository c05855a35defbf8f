"""The mathematics of influence: masking one attention value renormalises its row (arXiv 2406.14909, eq. 5 and appendix).

With A the softmax weights of a head and L the loss,
    E[i, j] = A[i, j] / (1 - A[i, j]) * (sum_n dL/dA[i, n] A[i, n] - dL/dA[i, j]),
the first-order change of L when the logit (i, j) goes to minus infinity.

A sink logit (gpt-oss) is one more key n of value 0, which masking never takes away: dL/dA is 0 there, so the sum over n stays one over
the keys, and all that it changes is that A sums to less than 1. A row's only key can then be masked as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moa_lab.records import BLOCK_TOKENS


@dataclass
class LayerInfluence:
    """Reduced |influence| of one layer, per sample of the batch and query head.

    blocks: (batch, query_heads, N/64, N/64), sums over 64 x 64 blocks; distances: (batch, query_heads, N/64), sums over
    distance bins of 64 for the keys beyond the sink. span_effects: (batch, query_heads, N/64), see `span_effect`.
    """

    blocks: torch.Tensor
    distances: torch.Tensor
    span_effects: torch.Tensor


def influence(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Influence E of masking each attention value; `weights` A and `gradient` dL/dA are (..., queries, keys).

    0 where A is 0 (already hidden) and where A is 1 (a row with one key and no sink logit has nothing to renormalise to).
    """
    expected = (weights * gradient).sum(dim=-1, keepdim=True)
    rest = (1 - weights).clamp_(min=torch.finfo(weights.dtype).eps)
    return (expected - gradient).mul_(weights).div_(rest)


def reduce_rows(result: LayerInfluence, rows: torch.Tensor, first_row: int, sink_tokens: int) -> None:
    """Add |E| of some rows to `result`, and use `rows` up. rows: (batch, query_heads, n, keys); n, keys, first_row multiples of 64."""
    batch, heads, n, keys = rows.shape
    tiles = rows.reshape(batch, heads, n // BLOCK_TOKENS, BLOCK_TOKENS, keys // BLOCK_TOKENS, BLOCK_TOKENS)
    first = first_row // BLOCK_TOKENS
    result.blocks[:, :, first : first + n // BLOCK_TOKENS, : keys // BLOCK_TOKENS] += tiles.sum(dim=(3, 5))

    beyond_sink = (torch.arange(keys, device=rows.device) >= sink_tokens).to(rows.dtype)
    tiles *= beyond_sink.reshape(keys // BLOCK_TOKENS, BLOCK_TOKENS)[None, None, None, None]
    # In tile (r, k) an entry lies at distance 64 (r - k) + (row - column): bin r - k on and below the tile's diagonal, r - k - 1 above it.
    below = torch.ones(BLOCK_TOKENS, BLOCK_TOKENS, device=rows.device, dtype=rows.dtype).tril()
    near = torch.einsum("bhrikj,ij->bhrk", tiles, below)
    far = tiles.sum(dim=(3, 5)) - near
    for row in range(n // BLOCK_TOKENS):
        count = min(first + row + 1, keys // BLOCK_TOKENS)
        # Key tiles 0 .. first + row lie at tile distances first + row .. 0.
        distance = first + row - torch.arange(count, device=rows.device)
        result.distances.index_add_(2, distance, near[:, :, row, :count])
        result.distances.index_add_(2, (distance - 1).clamp(min=0), far[:, :, row, :count])


def span_effect(
    weights: torch.Tensor, gradient: torch.Tensor, first_row: int, sink_tokens: int, steps: int, rest: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss change when a head that sees everything gets a window of 64 b tokens, for b = 0 .. steps - 1: (..., steps).

    With the keys beyond a window lost, a row renormalises: o = sum_kept A v / sum_kept A, so to first order in the output the
    loss changes by dL/do . (o - o_dense). Rows add up with their signs: unlike in a sum of |E| over the masked values, a row's
    many small values cancel here as they do in the output, which leaves the heads that carry something.
    weights A and gradient dL/dA = dL/do . v: (..., rows, keys), the dense causal ones of the rows from `first_row` on; dL/do
    may be that of a model under a plan. rest: (..., rows, 1), the weight of a sink logit, which no window loses.
    """
    pairs = weights * gradient
    expected = pairs.sum(dim=-1, keepdim=True)
    row = torch.arange(first_row, first_row + weights.shape[-2], device=weights.device)[:, None]
    # Row i loses the keys sink <= j <= i - 64 b: that many, counted from the sink.
    lost = (row - BLOCK_TOKENS * torch.arange(steps, device=row.device) + 1 - sink_tokens).clamp(0, max(weights.shape[-1] - sink_tokens, 0))
    # Kept sums are added up, never taken as 1 - lost: a head with nearly all its weight on one far key is the one to measure best.
    kept_weight, kept_pairs = (_kept(x, lost, sink_tokens) for x in (weights, pairs))
    kept_weight = kept_weight if rest is None else kept_weight + rest
    change = kept_pairs / kept_weight.clamp(min=torch.finfo(weights.dtype).tiny) - expected
    return torch.where(lost > 0, change, 0.0).sum(dim=-2)


def _kept(values: torch.Tensor, lost: torch.Tensor, sink_tokens: int) -> torch.Tensor:
    """Sum of the sink's values and of those from the `lost`-th key beyond the sink on: (..., rows, steps)."""
    beyond = values[..., sink_tokens:].flip(-1).cumsum(dim=-1).flip(-1)
    beyond = torch.nn.functional.pad(beyond, (0, 1)).gather(-1, lost.expand(*values.shape[:-1], lost.shape[-1]))
    return beyond + values[..., :sink_tokens].sum(dim=-1, keepdim=True)


def naive_influence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_gradient: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """E of all entries at once, (batch, query_heads, N, N): the twin that tests hold the block-wise path against."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~shown, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return influence(weights, output_gradient @ value.transpose(-1, -2))
