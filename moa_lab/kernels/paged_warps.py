"""Decode over pages of stored codes by single warps, in Gluon: `moa_lab.kernels.decode_warps` over the pages of `paged_kernel`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moa_lab.kernels.decode_warps import attend
from moa_lab.kernels.paged_kernel import lies, split_of


@gluon.jit(do_not_specialize=["table_row", "steps_row"], do_not_specialize_on_alignment=["table"])
def paged_decode_warps_kernel(
    query, numbers, words, table, lengths, firsts, buckets, heads, steps, part_output, part_max, part_sum,
    table_row, steps_row, query_token, query_head, kv_heads, sink_tokens, reach, scale, softcap,
    KEY: gl.constexpr, VALUE: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr,
    SPLIT: gl.constexpr, CAPPED: gl.constexpr, REACHES: gl.constexpr, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """As `paged_decode_kernel`."""
    row, head, first, length, bucket, told, low, count, place = split_of(lengths, firsts, buckets, heads, kv_heads, SPLIT, GROUP)
    if (gl.load(firsts + row + 1) == first + 1) & (low < count):
        attend(
            query + first.to(gl.int64) * query_token + head.to(gl.int64) * GROUP * query_head,
            lies(numbers, words, KEY[1], KEY[0]), words + KEY[2] // 4,
            lies(numbers, words, VALUE[1], VALUE[0]), words + VALUE[2] // 4,
            low, gl.minimum(low + SPLIT, count), length, gl.load(told), gl.load(told + 1), gl.load(told + 2),
            part_output + place * HEAD_DIM, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap,
            table + row.to(gl.int64) * table_row, steps + bucket * steps_row, gl.load(told + 4),
            GROUP, ROWS, HEAD_DIM, TILE, CAPPED, REACHES, KEY[0], VALUE[0], PAGE, PAGE_BYTES,
        )  # fmt: skip
