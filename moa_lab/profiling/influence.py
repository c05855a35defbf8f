"""The mathematics of influence: masking one attention value renormalises its row (arXiv 2406.14909, eq. 5 and appendix).

With A the softmax weights of a head and L the loss,
    E[i, j] = A[i, j] / (1 - A[i, j]) * (sum_n dL/dA[i, n] A[i, n] - dL/dA[i, j]),
the first-order change of L when the logit (i, j) goes to minus infinity.

A sink logit (gpt-oss) is one more key n of value 0 that is never masked: dL/dA is 0 there, so the sum over n stays one over the keys,
and A sums to less than 1. A row's only key can then be masked as well.
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
    """Add |E| of some rows to `result`. rows: (batch, query_heads, n, keys); n, keys, first_row multiples of 64."""
    batch, heads, n, keys = rows.shape
    first, count = first_row // BLOCK_TOKENS, n // BLOCK_TOKENS
    sums = _tile_sums(rows)
    blocks = result.blocks[:, :, first : first + count, : keys // BLOCK_TOKENS]
    blocks += sums[..., 0].reshape(batch, heads, count, BLOCK_TOKENS, -1).sum(dim=3)
    every, later = _beyond(sums, rows, sink_tokens).reshape(batch, heads, count, BLOCK_TOKENS, -1, 2).sum(dim=3).unbind(-1)
    # In tile (r, k) an entry lies at distance 64 (r - k) + (row - column): bin r - k on and below the tile's diagonal, r - k - 1 above it.
    near, far = every - later, later
    for row in range(count):
        within = min(first + row + 1, keys // BLOCK_TOKENS)
        # Key tiles 0 .. first + row lie at tile distances first + row .. 0.
        distance = first + row - torch.arange(within, device=rows.device)
        result.distances.index_add_(2, distance, near[:, :, row, :within])
        result.distances.index_add_(2, (distance - 1).clamp(min=0), far[:, :, row, :within])


def span_effect(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first_row: int,
    sink_tokens: int,
    steps: int,
    pairs: torch.Tensor | None = None,
    rest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss change when a head that sees everything gets a window of 64 b tokens, for b = 0 .. steps - 1: (..., steps).

    With the keys beyond a window lost, a row renormalises: o = sum_kept A v / sum_kept A, so to first order in the output the
    loss changes by dL/do . (o - o_dense). Rows add up with their signs: unlike in a sum of |E| over the masked values, a row's
    many small values cancel here as they do in the output, so that heads which carry something far stand out.
    weights A and gradient dL/dA = dL/do . v: (..., rows, keys), the dense causal ones of the rows from `first_row` on, a multiple of
    64; dL/do may be that of a model under a plan. pairs: `weights * gradient` where it is known. rest: (..., rows, 1), the weight of
    a sink logit, which no window loses.
    """
    pairs = weights * gradient if pairs is None else pairs
    # Sum what is kept, instead of 1 - lost, which is inexact for the most important heads: nearly all weight on one far key.
    rows = weights.shape[-2]
    kept_weight, kept_pairs = (_kept(pad_to_tiles(x), first_row, sink_tokens, steps)[..., :rows, :] for x in (weights, pairs))
    kept_weight = kept_weight if rest is None else kept_weight + rest
    row = torch.arange(first_row, first_row + rows, device=weights.device)[:, None]
    loses = row - BLOCK_TOKENS * torch.arange(steps, device=row.device) >= sink_tokens
    expected = pairs.sum(dim=-1, keepdim=True)
    change = kept_pairs / kept_weight.clamp(min=torch.finfo(weights.dtype).tiny) - expected
    return torch.where(loses, change, 0.0).sum(dim=-2)


def pad_to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """`rows` (..., rows, keys) with zeros up to multiples of 64."""
    short_rows, short_keys = -rows.shape[-2] % BLOCK_TOKENS, -rows.shape[-1] % BLOCK_TOKENS
    return torch.nn.functional.pad(rows, (0, short_keys, 0, short_rows)) if short_rows or short_keys else rows


def _kept(values: torch.Tensor, first_row: int, sink_tokens: int, steps: int) -> torch.Tensor:
    """Sum of the sink's values and, for every window of 64 b tokens, of those in the window beyond it: (..., rows, steps).

    Row i's window ends in key tile i // 64 - b, where it holds what lies behind column i % 64, and holds all later tiles.
    """
    every, later = _beyond(_tile_sums(values), values, sink_tokens).unbind(-1)
    sums = torch.nn.functional.pad(every.flip(-1).cumsum(dim=-1).flip(-1), (0, 1))
    tile = torch.arange(first_row, first_row + values.shape[-2], device=values.device)[:, None] // BLOCK_TOKENS
    last = tile - torch.arange(steps, device=values.device)
    at = last.clamp(0, every.shape[-1] - 1).expand(*values.shape[:-1], steps)
    return later.gather(-1, at) + sums.gather(-1, at + 1) + values[..., :sink_tokens].sum(dim=-1, keepdim=True)


def _tile_sums(values: torch.Tensor) -> torch.Tensor:
    """Per row and tile of 64 keys: the sum, and the sum over columns behind the row's own number in its tile, (..., rows, keys / 64, 2).

    values: (..., rows, keys), both multiples of 64.
    """
    *lead, rows, keys = values.shape
    ones = values.new_ones(BLOCK_TOKENS, BLOCK_TOKENS)
    # Both sums in one reading: for every row of a tile a product with two columns of zeros and ones.
    columns = torch.stack([ones, ones.triu(1)], dim=-1)
    sums = torch.matmul(values.reshape(-1, BLOCK_TOKENS, keys // BLOCK_TOKENS, BLOCK_TOKENS), columns)
    return sums.reshape(*lead, rows, keys // BLOCK_TOKENS, 2)


def _beyond(sums: torch.Tensor, values: torch.Tensor, sink_tokens: int) -> torch.Tensor:
    """The `sums` of `_tile_sums(values)`, in place, without the keys of the sink: only the tiles that it reaches into change."""
    keys = min(-(-sink_tokens // BLOCK_TOKENS) * BLOCK_TOKENS, values.shape[-1])
    if keys:
        sink = torch.arange(keys, device=values.device) < sink_tokens
        sums[..., : keys // BLOCK_TOKENS, :] = _tile_sums(values[..., :keys].masked_fill(sink, 0.0))
    return sums


def naive_influence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_gradient: torch.Tensor,
    shown: torch.Tensor,
    scale: float,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """E of all entries at once, (batch, query_heads, N, N): the reference that tests compare the block-wise path with."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~shown, float("-inf"))
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return influence(weights, output_gradient @ value.transpose(-1, -2))
