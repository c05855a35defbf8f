"""Attention's backward pass in Triton that also adds up the influence of every key, and what windows of 64, 128 .. tokens would lose.

One program has a block of 64 queries of a head and goes over the keys twice: the first time for each query's softmax and mean slope, the
second time, nearest keys first, for all else. No array of queries by keys is written to memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moa_lab.kernels.drawn import columns_kernel, holds_tiles, launched_with, scores_of_tile, tile_of_rows, tiles_of
from moa_lab.kernels.mixture import BLOCK
from moa_lab.kernels.prefill import NO_REACH


class InfluenceSums(NamedTuple):
    """Of one layer, float32. blocks: (batch, query_heads, blocks, blocks), sums of |E| over 64 x 64 queries and keys; distances: (batch,
    query_heads, blocks), sums over distances of 64 b to 64 b + 63 of keys beyond the sink; span_effects: (batch, query_heads, blocks),
    first-order change of the loss under a window of 64 b tokens."""

    blocks: torch.Tensor
    distances: torch.Tensor
    span_effects: torch.Tensor


@triton.jit
def influence_kernel(
    query, key, value, slope, sink_logits, normaliser, expected, query_slope, blocks, distances, effects,
    n_tokens, n_blocks, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    size = tl.cast(n_tokens, tl.int64) * HEAD_DIM
    inner = tl.arange(0, TILE)
    rows = block * TILE + inner
    dims = tl.arange(0, PADDED_DIM)
    asked = tile_of_rows(query + head * size, block, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    # Rows past the end have no slope, and add nothing.
    wanted = tile_of_rows(slope + head * size, block, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    key += head // GROUP * size
    value += head // GROUP * size
    oldest = tl.maximum(block * TILE - reach + 1, 0) // TILE

    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    gained = tl.zeros((TILE,), tl.float32)
    sink_total = tl.zeros((TILE,), tl.float32)
    sink_gained = tl.zeros((TILE,), tl.float32)
    logit = 0.0
    if SINK_LOGITS:
        # The sink logit is a key of this score and value 0 that every query sees.
        logit = tl.load(sink_logits + head)
        highest = tl.zeros((TILE,), tl.float32) + logit
        total += 1.0
    for near in range(oldest, block + 1):
        known = tile_of_rows(key, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        values = tile_of_rows(value, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        scores = scores_of_tile(asked, known, block, near, n_tokens, reach, scale, softcap, TILE, CAPPED, PRECISION)
        gain = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(highest - safe)
        of_sink = tl.where(near * TILE + inner[None, :] < sink_tokens, weights, 0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        gained = gained * shrink + tl.sum(weights * gain, axis=1)
        sink_total = sink_total * shrink + tl.sum(of_sink, axis=1)
        sink_gained = sink_gained * shrink + tl.sum(of_sink * gain, axis=1)
        highest = higher
    # Rows past the end may see nothing.
    total = tl.maximum(total, 1e-30)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    share = 1.0 / total
    mean = gained / total
    tl.store(normaliser + head * n_tokens + rows, highest + tl.log(total), mask=rows < n_tokens)
    tl.store(expected + head * n_tokens + rows, mean, mask=rows < n_tokens)

    # What every window keeps: the sink, and a sink logit.
    kept = sink_total / total
    kept_slopes = sink_gained / total - mean * kept
    if SINK_LOGITS:
        left = tl.exp(logit - highest) * share
        kept += left
        kept_slopes -= left * mean
    place = (tl.cast(head, tl.int64) * n_blocks + block) * n_blocks
    alone = tl.minimum(rows + 1, reach) == 1
    nearer = 0.0
    gathered = tl.zeros((TILE, PADDED_DIM), tl.float32)
    for back in range(0, block + 1 - oldest):
        near = block - back
        known = tile_of_rows(key, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        values = tile_of_rows(value, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        scores = scores_of_tile(asked, known, block, near, n_tokens, reach, scale, softcap, TILE, CAPPED, PRECISION)
        gain = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        # Not less the logarithm of the sum, which would round what is left beside a weight near 1.
        weights = tl.exp(scores - highest[:, None]) * share[:, None]
        slopes = weights * (gain - mean[:, None])
        magnitude = tl.abs(slopes) / tl.maximum(1.0 - weights, 1.1920929e-07)
        if not SINK_LOGITS:
            # A row's only key has nothing to renormalise to.
            magnitude = tl.where(alone[:, None], 0.0, magnitude)
        tl.store(blocks + place + near, tl.sum(magnitude))
        # Keys beyond the sink: of those before the row's place in its own tile, 64 b tokens back to 64 b + 63 is in the same tile,
        # of those behind it in the tile before.
        beyond = near * TILE + inner[None, :] >= sink_tokens
        behind = beyond & (inner[None, :] > inner[:, None])
        before = beyond & (inner[None, :] <= inner[:, None])
        further = tl.sum(tl.where(behind, magnitude, 0.0))
        tl.store(distances + place + back - 1, nearer + further, mask=back > 0)
        nearer = tl.sum(tl.where(before, magnitude, 0.0))
        kept += tl.sum(tl.where(behind, weights, 0.0), axis=1)
        kept_slopes += tl.sum(tl.where(behind, slopes, 0.0), axis=1)
        # A window of 64 * back tokens.
        change = tl.where(kept > 0.0, kept_slopes / tl.where(kept > 0.0, kept, 1.0), -mean)
        tl.store(effects + place + back, tl.sum(tl.where(rows - back * TILE >= sink_tokens, change, 0.0)))
        kept += tl.sum(tl.where(before, weights, 0.0), axis=1)
        kept_slopes += tl.sum(tl.where(before, slopes, 0.0), axis=1)
        change_of = slopes * scale
        if CAPPED:
            capped = tl.where(scores == float("-inf"), 0.0, scores) / softcap
            change_of *= 1.0 - capped * capped
        gathered += tl.dot(change_of.to(known.dtype), known, input_precision=PRECISION)
    tl.store(distances + place + block - oldest, nearer)
    real = (rows[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM)
    places = head * size + rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(query_slope + places, gathered.to(query_slope.dtype.element_ty), mask=real)


def holds_blocks(query: torch.Tensor) -> bool:
    """Whether the device holds blocks of 64 queries and keys of heads as wide as these: influence is added up in no smaller ones."""
    return tiles_of(query)[0] == BLOCK and holds_tiles(query)


def backward_with_influence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slope: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    reach: int | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], InfluenceSums]:
    """Slopes of the loss in query, key and value, float32, shaped as they are; and the sums of influence.

    query, slope (of the loss in the output): (batch, query_heads, tokens, head_dim); key, value: (batch, kv_heads, tokens, head_dim); all
    of one dtype and without padding. reach: the model's own window in tokens. softcap, sink_logits: as in
    `moa_lab.kernels.reference.masked_attention`. Sums are in float32, in a fixed order.
    """
    query, key, value, slope = (x.contiguous() for x in (query, key, value, slope.to(query.dtype)))
    batch, heads, n_tokens, _ = query.shape
    group, n_blocks = heads // key.shape[1], triton.cdiv(n_tokens, BLOCK)

    normaliser, expected = query.new_empty(2, batch, heads, n_tokens, dtype=torch.float32)
    slopes = [torch.empty_like(query, dtype=torch.float32) for _ in range(3)]
    found = [query.new_zeros(batch, heads, n_blocks, n_blocks, dtype=torch.float32) for _ in range(3)]
    numbers, settings = (reach or NO_REACH, scale, softcap or 1.0), launched_with(query, key, softcap)
    logits = None if sink_logits is None else sink_logits.float().flatten().repeat(batch)
    influence_kernel[n_blocks, batch * heads](
        query, key, value, slope, normaliser if logits is None else logits, normaliser, expected, slopes[0], *found, n_tokens, n_blocks,
        sink_tokens, *numbers, SINK_LOGITS=logits is not None, **settings,
    )  # fmt: skip
    everything = torch.full((batch * key.shape[1],), n_blocks, dtype=torch.int32, device=query.device)
    columns_kernel[n_blocks, batch * heads](
        query, key, value, slope, everything, normaliser, expected, *slopes[1:], n_tokens, n_blocks, 0, *numbers, **settings
    )
    of_keys, of_values = (x.unflatten(1, (-1, group)).sum(dim=2) for x in slopes[1:])
    return (slopes[0], of_keys, of_values), InfluenceSums(found[0], *(x.sum(dim=2) for x in found[1:]))
