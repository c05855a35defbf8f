"""Keys and values in pages of single heads, in Triton: new tokens are written, rows of one new token attend to what they hold, and what a
row holds is read for the rest.

A pass of several requests: `Pass`. No host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moa_lab.kernels.decode import by_warps, slots_of_warp, stages, tile_of, warp_registers, warps
from moa_lab.kernels.devices import precision
from moa_lab.kernels.paged_kernel import paged_decode_kernel, paged_merge_kernel, paged_read_kernel, paged_write_kernel
from moa_lab.plan.bits import UNTOUCHED

SPLIT = 512
"""Slots that a program reads: fewer fill a GPU with few requests, more leave less to merge and fewer programs without slots. One number for
any batch, which twice as many gain 1 to 3%: another would be compiled in the middle of an answer."""


@dataclass(frozen=True)
class PagedHeads:
    """What the kernels know of a layer. heads: int32 (buckets, kv_heads, 5): sink, ring, window, slots and rank of every head, in requests
    of every bucket. steps: int32 (buckets, steps + 1), of `moa_lab.serving.page_layout`. most_slots: of the head with the most. reach: 0
    for none."""

    heads: torch.Tensor
    steps: torch.Tensor
    most_slots: int
    sink_tokens: int
    reach: int
    page_tokens: int


@dataclass(frozen=True)
class PooledPages:
    """What a pool of pages holds. numbers, words: all of it, as numbers of the model's type and as int32, contiguous. key, value: the
    bits of a page's K or V, and at which of its bytes they and their grids begin."""

    numbers: torch.Tensor
    words: torch.Tensor
    page_bytes: int
    key: tuple[int, int, int]
    value: tuple[int, int, int]


@dataclass(frozen=True)
class Pass:
    """The requests of one pass of the model, int32 each. table: (rows, columns), the pages of the block tables. lengths: (rows,), tokens
    with the new ones. firsts: (rows + 1,), the first new token of every row, then the number of all. rows: (tokens,), the row of every new
    token, which is not written where there is no such row. buckets: (rows,)."""

    table: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor
    rows: torch.Tensor
    buckets: torch.Tensor


def paged_write(layer: PagedHeads, pool: PooledPages, key: torch.Tensor, value: torch.Tensor, step: Pass) -> None:
    """Write the new tokens to their slots: key, value (tokens, kv_heads, head_dim), the last dimension contiguous. Codes are equal to those
    of `moa_lab.cache.storage` to the last bit."""
    tokens, kv_heads, head_dim = key.shape
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    # The same for any number of tokens: another would be compiled. Quantising takes registers, and Triton 3.6 compiles no more than 16.
    block = 2048 // padded_dim if min(pool.key[0], pool.value[0]) == UNTOUCHED else min(16, 1024 // padded_dim)
    paged_write_kernel[(triton.cdiv(tokens, block), kv_heads)](
        key, value, pool.numbers, pool.words, step.table, step.lengths, step.firsts, step.rows, step.buckets, layer.heads, layer.steps,
        step.table.stride(0), layer.steps.stride(0), kv_heads, *key.stride()[:2], *value.stride()[:2], tokens, len(step.lengths),
        KEY=pool.key, VALUE=pool.value, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PAGE=layer.page_tokens, PAGE_BYTES=pool.page_bytes,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def paged_read(
    layer: PagedHeads, pool: PooledPages, table: torch.Tensor, bucket: int, length: int, heads: slice, keys: torch.Tensor,
    values: torch.Tensor,
) -> None:  # fmt: skip
    """What some heads of one row hold at `length` tokens, as numbers, to its position in `keys` and `values` (heads, columns, head_dim),
    contiguous. Columns of tokens that a head does not hold are left alone.

    table: int32, the row's block table.
    """
    count, columns, head_dim = keys.shape
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    block = max(1, 2048 // padded_dim)
    paged_read_kernel[(triton.cdiv(min(layer.most_slots, length), block), count)](
        keys, values, pool.numbers, pool.words, table, layer.steps[bucket], layer.heads[bucket, heads], length, columns,
        KEY=pool.key, VALUE=pool.value, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PAGE=layer.page_tokens, PAGE_BYTES=pool.page_bytes,
        BLOCK=block, num_warps=4,
    )  # fmt: skip


def paged_decode(
    layer: PagedHeads,
    pool: PooledPages,
    query: torch.Tensor,
    output: torch.Tensor,
    step: Pass,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> None:
    """Attention of rows that have one new token, already written, to what their heads hold, into `output`; other rows are left alone.

    query, output: (tokens, query_heads, head_dim), the last dimension contiguous, float16, bfloat16 or float32. softcap, sink_logits: as in
    `moa_lab.kernels.decode.decode_attention`. Pages have a multiple of 16 tokens: a tile lies in one page. Sums are in float32, in a fixed
    order.
    """
    query_heads, head_dim = query.shape[1:]
    rows, kv_heads = len(step.lengths), layer.heads.shape[1]
    group = query_heads // kv_heads
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    most_bits, packed = max(pool.key[0], pool.value[0]), min(pool.key[0], pool.value[0]) < UNTOUCHED
    warped = by_warps(query, packed) and layer.page_tokens % slots_of_warp(head_dim) == 0
    if warped:
        tile = slots_of_warp(head_dim)
    else:
        tile = min(tile_of(query, query.itemsize if most_bits == UNTOUCHED else 1), layer.page_tokens & -layer.page_tokens)
    splits = triton.cdiv(layer.most_slots, SPLIT)
    parts = rows * kv_heads * splits
    part_output = torch.empty(parts, group, padded_dim, dtype=torch.float32, device=query.device)
    part_max, part_sum = (torch.empty(parts, group, dtype=torch.float32, device=query.device) for _ in range(2))
    arguments = (
        query, pool.numbers, pool.words, step.table, step.lengths, step.firsts, step.buckets, layer.heads, layer.steps,
        part_output, part_max, part_sum, step.table.stride(0), layer.steps.stride(0), *query.stride()[:2], kv_heads,
        layer.sink_tokens, layer.reach, scale, softcap or 1.0,
    )  # fmt: skip
    settings = {
        "KEY": pool.key, "VALUE": pool.value, "GROUP": group, "HEAD_DIM": head_dim, "TILE": tile, "SPLIT": SPLIT,
        "CAPPED": softcap is not None, "REACHES": layer.reach != 0, "PAGE": layer.page_tokens, "PAGE_BYTES": pool.page_bytes,
    }  # fmt: skip
    if warped:
        # Imported here: Gluon is newer than Triton itself.
        from moa_lab.kernels.paged_warps import paged_decode_warps_kernel

        paged_decode_warps_kernel[(rows * kv_heads, splits)](
            *arguments, **settings, ROWS=max(triton.next_power_of_2(group), 8), num_warps=1, maxnreg=warp_registers(head_dim, most_bits)
        )
    else:
        paged_decode_kernel[(rows * kv_heads, splits)](
            *arguments, **settings, ROWS=max(triton.next_power_of_2(group), 16), PADDED_DIM=padded_dim, PRECISION=precision(query),
            num_warps=warps(query), num_stages=stages(query, tile, most_bits),
        )  # fmt: skip
    paged_merge_kernel[(rows * query_heads,)](
        part_output, part_max, part_sum, step.lengths, step.firsts, step.buckets, layer.heads,
        part_max if sink_logits is None else sink_logits.contiguous(), output, *output.stride()[:2], query_heads, splits,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, SPLIT=SPLIT, BLOCK=16, SINK_LOGITS=sink_logits is not None, num_warps=4,
    )  # fmt: skip
