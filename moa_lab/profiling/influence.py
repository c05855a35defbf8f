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
    distance bins of 64 for the keys beyond the sink. span_effects: (batch, query_heads, N/64), see `span_effect`. rounding: (batch,
    kv_heads, widths, 2), see `rounding_losses`, of K and of V; None where nobody asked.
    """

    blocks: torch.Tensor
    distances: torch.Tensor
    span_effects: torch.Tensor
    rounding: torch.Tensor | None = None


def influence(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Influence E of masking each attention value; `weights` A and `gradient` dL/dA are (..., queries, keys).

    0 where A is 0 (already hidden) and where A is 1 (a row with one key and no sink logit has nothing to renormalise to).
    """
    expected = (weights * gradient).sum(dim=-1, keepdim=True)
    rest = (1 - weights).clamp_(min=torch.finfo(weights.dtype).eps)
    return (expected - gradient).mul_(weights).div_(rest)


def reduce_rows(result: LayerInfluence, rows: torch.Tensor, first_row: int, sink_tokens: int) -> None:
    """Add |E| of some rows to `result`. rows: (batch, query_heads, n, keys), causal; n, keys, first_row multiples of 64; the sink's
    columns are set to 0."""
    batch, heads, n, keys = rows.shape
    first, count = first_row // BLOCK_TOKENS, n // BLOCK_TOKENS
    tiles = rows.reshape(batch, heads, count, BLOCK_TOKENS, keys // BLOCK_TOKENS, BLOCK_TOKENS)
    result.blocks[:, :, first : first + count, : keys // BLOCK_TOKENS] += tiles.sum(dim=3).sum(dim=-1)
    rows[..., :sink_tokens] = 0.0
    runs = _runs(rows).unflatten(-2, (count, BLOCK_TOKENS)).sum(dim=3)
    for row in range(count):
        distances = result.distances[:, :, : first + row + 1]
        distances[..., :-1] += runs[:, :, row, : first + row].flip(-1)
        # The first row of the tile lies that far from the first key alone, the last from all keys of its tile.
        distances[..., -1] += rows[:, :, row * BLOCK_TOKENS : (row + 1) * BLOCK_TOKENS, :BLOCK_TOKENS].tril().sum(dim=(-1, -2))


def span_effect(
    weights: torch.Tensor,
    slopes: torch.Tensor,
    expected: torch.Tensor,
    first_row: int,
    sink_tokens: int,
    steps: int,
    rest: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss change when a head that sees everything gets a window of 64 b tokens, for b = 0 .. steps - 1: (..., steps).

    With the keys beyond a window lost, a row renormalises: o = sum_kept A v / sum_kept A, so to first order in the output the
    loss changes by dL/do . (o - o_dense), which is sum_kept dL/dlogit / sum_kept A. Rows add up with their signs: unlike in a sum of
    |E| over the masked values, a row's many small values cancel here as they do in the output, so that heads which carry something
    far stand out.
    weights A and the `logit_slopes` that belong to them: (..., rows, keys), the dense causal ones of the rows from `first_row` on, a
    multiple of 64, with `expected`; dL/do may be that of a model under a plan. Both lose their sink's columns, which are set to 0.
    rest: (..., rows, 1), the weight of a sink logit, which no window loses.
    """
    # Sum what is kept, instead of 1 - lost, which is inexact for the most important heads: nearly all weight on one far key.
    rows = weights.shape[-2]
    kept_weight, kept_slopes = (_kept(pad_to_tiles(x), first_row, sink_tokens, steps)[..., :rows, :] for x in (weights, slopes))
    if rest is not None:
        # One more key, whose value is 0.
        kept_weight, kept_slopes = kept_weight + rest, kept_slopes - rest * expected
    row = torch.arange(first_row, first_row + rows, device=weights.device)[:, None]
    loses = row - BLOCK_TOKENS * torch.arange(steps, device=row.device) >= sink_tokens
    return torch.where(loses, change_of_keeping(kept_weight, kept_slopes, expected), 0.0).sum(dim=-2)


def change_of_keeping(kept_weight: torch.Tensor, kept_slopes: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """First-order change of the loss when a row keeps some of its keys and renormalises: sum_kept dL/dlogit / sum_kept A.

    kept_weight, kept_slopes: sums of the row's weights and `logit_slopes` over what it keeps, (..., rows, anything); expected:
    (..., rows, 1). Where nothing is kept, the output is 0.
    """
    return torch.where(kept_weight > 0, kept_slopes / kept_weight, -expected)


def logit_slopes(weights: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dlogit = A (dL/dA - expected) of every entry, and expected = sum_n dL/dA A of every row, (..., rows, 1)."""
    pairs = torch.mul(weights, gradient, out=out)
    expected = pairs.sum(dim=-1, keepdim=True)
    return torch.addcmul(pairs, weights, expected, value=-1, out=pairs), expected


def pad_to_tiles(rows: torch.Tensor) -> torch.Tensor:
    """`rows` (..., rows, keys) with zeros up to multiples of 64."""
    short_rows, short_keys = -rows.shape[-2] % BLOCK_TOKENS, -rows.shape[-1] % BLOCK_TOKENS
    return torch.nn.functional.pad(rows, (0, short_keys, 0, short_rows)) if short_rows or short_keys else rows


def _kept(values: torch.Tensor, first_row: int, sink_tokens: int, steps: int) -> torch.Tensor:
    """Sum of the sink's values and, for every window of 64 b tokens that leaves out a key beyond the sink, of those in the window:
    (..., rows, steps). The sink's columns are set to 0."""
    sink = values[..., :sink_tokens].sum(dim=-1, keepdim=True)
    values[..., :sink_tokens] = 0.0
    runs = _runs(values)
    # Of every run and all later ones; 0 behind the last. A product, because a CPU is slow at cumulative sums.
    sums = runs @ runs.new_ones(runs.shape[-1], runs.shape[-1] + 1).tril()
    tile = torch.arange(first_row, first_row + values.shape[-2], device=values.device)[:, None] // BLOCK_TOKENS
    oldest = tile - torch.arange(steps, device=values.device)
    return sums.gather(-1, oldest.clamp(0, runs.shape[-1]).expand(*values.shape[:-1], steps)).add_(sink)


def _runs(values: torch.Tensor) -> torch.Tensor:
    """Per row, sums over runs of 64 keys that end 0, 64, 128 ... keys before the row's own: (..., rows, keys / 64 - 1).

    values: (..., rows, keys), causal, both multiples of 64, the last row's own key in the last tile. Run k of a row whose number in
    its tile is r holds the columns r + 1 + 64 k to r + 64 (k + 1); what is left of the first run is in none.
    """
    *lead, rows, keys = values.shape
    values = values.contiguous()
    shape = (values.numel() // (rows * keys), rows // BLOCK_TOKENS, BLOCK_TOKENS, keys // BLOCK_TOKENS - 1, BLOCK_TOKENS)
    # A row begins one column later than the row above it.
    strides = (rows * keys, BLOCK_TOKENS * keys, keys + 1, BLOCK_TOKENS, 1)
    return values.as_strided(shape, strides, values.storage_offset() + 1).sum(dim=-1).reshape(*lead, rows, shape[3])


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
