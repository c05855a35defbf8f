"""The kernels over pages of single heads: writing new tokens, a step of one new token a row, and its merge.

Of a head they are told its sink, ring, window, slots and rank, int32 each, `HEAD` of them, by the bucket of a request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_lab.kernels.decode_kernel import attend, merged, paged_places
from moa_lab.kernels.write import kept_slots

HEAD = tl.constexpr(5)
"""Numbers that tell of a head."""


@triton.jit
def paged_write_kernel(
    key, value, pool, table, lengths, firsts, rows, buckets, heads, steps, table_row, steps_row, kv_heads,
    key_token, key_head, value_token, value_head, tokens,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK new tokens of one head to their slots."""
    these = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = these < tokens
    head = tl.program_id(1)
    row = tl.load(rows + these, mask=real, other=0)
    bucket = tl.load(buckets + row)
    told = heads + (bucket * kv_heads + head) * HEAD
    sink = tl.load(told)
    ring = tl.load(told + 1)
    rank = tl.load(told + 4)
    length = tl.load(lengths + row)
    kept, slots = kept_slots(these + length - tl.load(firsts + row + 1), length, sink, ring)
    kept = kept & real
    places = paged_places(table + row.to(tl.int64) * table_row, steps + bucket * steps_row, rank, slots, kept, PAGE)
    dims = tl.arange(0, PADDED_DIM)
    there = kept[:, None] & (dims[None, :] < HEAD_DIM)
    target = pool + places[:, None] * HEAD_DIM + dims[None, :]
    source = these[:, None].to(tl.int64) * key_token + head.to(tl.int64) * key_head + dims[None, :]
    tl.store(target, tl.load(key + source, mask=there, other=0.0), mask=there)
    source = these[:, None].to(tl.int64) * value_token + head.to(tl.int64) * value_head + dims[None, :]
    tl.store(target + PAGE * HEAD_DIM, tl.load(value + source, mask=there, other=0.0), mask=there)


@triton.jit
def paged_decode_kernel(
    query, pool, table, lengths, firsts, buckets, heads, steps, part_output, part_max, part_sum,
    table_row, steps_row, query_token, query_head, kv_heads, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    CAPPED: tl.constexpr, REACHES: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """SPLIT slots of one head of a row that has one new token, which is written."""
    row = tl.program_id(0) // kv_heads
    head = tl.program_id(0) % kv_heads
    first = tl.load(firsts + row)
    length = tl.load(lengths + row)
    bucket = tl.load(buckets + row)
    told = heads + (bucket * kv_heads + head) * HEAD
    low = tl.program_id(1) * SPLIT
    count = tl.minimum(length, tl.load(told + 3))
    if (tl.load(firsts + row + 1) == first + 1) & (low < count):
        place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * GROUP
        attend(
            query + first.to(tl.int64) * query_token + head.to(tl.int64) * GROUP * query_head,
            pool, table, pool + PAGE * HEAD_DIM, table, low, tl.minimum(low + SPLIT, count), length,
            tl.load(told), tl.load(told + 1), tl.load(told + 2),
            part_output + place * PADDED_DIM, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap,
            table + row.to(tl.int64) * table_row, steps + bucket * steps_row, tl.load(told + 4),
            GROUP, ROWS, HEAD_DIM, PADDED_DIM, TILE, CAPPED, REACHES, PRECISION, 16, 16, PAGE,
        )  # fmt: skip


@triton.jit
def paged_merge_kernel(
    part_output, part_max, part_sum, lengths, firsts, buckets, heads, sink_logits, output, output_token, output_head, query_heads, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge what `paged_decode_kernel` found of one row and query head."""
    row = tl.program_id(0) // query_heads
    head = tl.program_id(0) % query_heads
    first = tl.load(firsts + row)
    if tl.load(firsts + row + 1) == first + 1:
        owner = tl.load(buckets + row) * (query_heads // GROUP) + head // GROUP
        count = tl.minimum(tl.load(lengths + row), tl.load(heads + owner * HEAD + 3))
        start = (row * (query_heads // GROUP) + head // GROUP) * splits
        total = merged(
            part_output, part_max, part_sum, start, start + (count + SPLIT - 1) // SPLIT, head % GROUP, sink_logits + head,
            GROUP, PADDED_DIM, BLOCK, SINK_LOGITS,
        )  # fmt: skip
        dims = tl.arange(0, PADDED_DIM)
        output += first.to(tl.int64) * output_token + head.to(tl.int64) * output_head
        tl.store(output + dims, total.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
