"""The kernels over pages of single heads: writing new tokens, reading what a row holds, a step of one new token a row, and its merge.

Of a head they are told its sink, ring, window, slots and rank, int32 each, `HEAD` of them, by the bucket of a request. A pool comes twice,
as numbers and as 32-bit words: a page holds the K of its tokens, then their V, each as numbers, or as all codes and then all grids.

What differs from pass to pass is not specialised: a server compiles nothing while it answers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_lab.kernels.codes import CODES, grid_of, grid_word, on_grid, store_words, vectors, words_of
from moa_lab.kernels.decode_kernel import at_page, attend, merged, pages_of
from moa_lab.kernels.write import held_positions, kept_slots

HEAD = tl.constexpr(5)
"""Numbers that tell of a head."""


@triton.jit
def lies(numbers, words, AT: tl.constexpr, BITS: tl.constexpr):
    """What lies at byte AT of the first page: numbers, or words of codes."""
    return numbers + AT // (numbers.dtype.element_ty.primitive_bitwidth // 8) if BITS == 16 else words + AT // 4


@triton.jit
def _keep(
    source, numbers, words, pages, slots, kept, these, token,
    PART: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    """K or V of `these` new tokens, which lie `token` elements apart, to their pages and slots. PART: `moa_lab.serving.page_pool.Part`."""
    dims = tl.arange(0, PADDED_DIM)[None, :]
    there = kept[:, None] & (dims < HEAD_DIM)
    slots = slots[:, None]
    given = tl.load(source + these[:, None].to(tl.int64) * token + dims, mask=there, other=0.0)
    target = at_page(lies(numbers, words, PART[1], PART[0]), pages[:, None], PAGE_BYTES)
    if PART[0] == 16:
        tl.store(target + slots * HEAD_DIM + dims, given, mask=there)
    else:
        places, low, step = on_grid(given, there, 2.0 ** PART[0] - 1.0)
        store_words(target, words_of(places, PART[0]), slots, kept, HEAD_DIM, PART[0])
        tl.store(at_page(words + PART[2] // 4, pages[:, None], PAGE_BYTES) + slots, grid_word(low, step), mask=kept[:, None])


@triton.jit(do_not_specialize=["tokens", "row_count", "table_row", "steps_row"], do_not_specialize_on_alignment=["table"])
def paged_write_kernel(
    key, value, numbers, words, table, lengths, firsts, rows, buckets, heads, steps, table_row, steps_row, kv_heads,
    key_token, key_head, value_token, value_head, tokens, row_count,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK new tokens of one head to their slots."""
    these = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = these < tokens
    head = tl.program_id(1)
    row = tl.load(rows + these, mask=real, other=0)
    # A graph may have been captured for more tokens.
    real = real & (row < row_count)
    row = tl.where(real, row, 0)
    bucket = tl.load(buckets + row)
    told = heads + (bucket * kv_heads + head) * HEAD
    sink = tl.load(told)
    ring = tl.load(told + 1)
    rank = tl.load(told + 4)
    length = tl.load(lengths + row)
    kept, slots = kept_slots(these + length - tl.load(firsts + row + 1), length, sink, ring)
    kept = kept & real
    pages = pages_of(table + row.to(tl.int64) * table_row, steps + bucket * steps_row, rank, slots, kept, PAGE)
    slots = slots % PAGE
    head = head.to(tl.int64)
    _keep(key + head * key_head, numbers, words, pages, slots, kept, these, key_token, KEY, HEAD_DIM, PADDED_DIM, PAGE_BYTES)
    _keep(value + head * value_head, numbers, words, pages, slots, kept, these, value_token, VALUE, HEAD_DIM, PADDED_DIM, PAGE_BYTES)


@triton.jit
def _take(
    target, numbers, words, pages, slots, at, held,
    PART: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    """K or V of slots, by their pages and their places there, to `at` of target; as `moa_lab.cache.storage.values_at`."""
    dims = tl.arange(0, PADDED_DIM)[None, :]
    source = at_page(lies(numbers, words, PART[1], PART[0]), pages[:, None], PAGE_BYTES)
    found = vectors(source, slots, held, HEAD_DIM, PADDED_DIM, PART[0], tl.float32)
    if PART[0] < 16:
        smallest, step = grid_of(at_page(words + PART[2] // 4, pages, PAGE_BYTES), slots, held)
        found = smallest[:, None] + (step[:, None] * CODES) * found
    there = held[:, None] & (dims < HEAD_DIM)
    tl.store(target + at[:, None] * HEAD_DIM + dims, found.to(target.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["length", "columns"], do_not_specialize_on_alignment=["table", "steps", "heads"])
def paged_read_kernel(
    keys, values, numbers, words, table, steps, heads, length, columns,
    KEY: tl.constexpr, VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK slots of one head of one row, which has `length` tokens, to their positions. table, steps, heads: of the row and its bucket."""
    told = heads + tl.program_id(1) * HEAD
    sink = tl.load(told)
    ring = tl.load(told + 1)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = slots < tl.minimum(length, tl.load(told + 3))
    at = tl.program_id(1).to(tl.int64) * columns + held_positions(slots, length, sink, ring)
    pages = pages_of(table, steps, tl.load(told + 4), slots, held, PAGE)
    within = slots % PAGE
    _take(keys, numbers, words, pages, within, at, held, KEY, HEAD_DIM, PADDED_DIM, PAGE_BYTES)
    _take(values, numbers, words, pages, within, at, held, VALUE, HEAD_DIM, PADDED_DIM, PAGE_BYTES)


@triton.jit
def split_of(lengths, firsts, buckets, heads, kv_heads, SPLIT: tl.constexpr, GROUP: tl.constexpr):
    """What a program of a step does: its row, head and that row's first token, length and bucket; what is told of the head; its slots, from
    one to another; and where its part of the output goes. In Gluon too."""
    program = tl.program_id(0)
    row = program // kv_heads
    head = program % kv_heads
    first = tl.load(firsts + row)
    length = tl.load(lengths + row)
    bucket = tl.load(buckets + row)
    told = heads + (bucket * kv_heads + head) * HEAD
    low = tl.program_id(1) * SPLIT
    count = tl.minimum(length, tl.load(told + 3))
    place = (program.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * GROUP
    return row, head, first, length, bucket, told, low, count, place


@triton.jit(do_not_specialize=["table_row", "steps_row"], do_not_specialize_on_alignment=["table"])
def paged_decode_kernel(
    query, numbers, words, table, lengths, firsts, buckets, heads, steps, part_output, part_max, part_sum,
    table_row, steps_row, query_token, query_head, kv_heads, sink_tokens, reach, scale, softcap,
    KEY: tl.constexpr, VALUE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, CAPPED: tl.constexpr, REACHES: tl.constexpr, PRECISION: tl.constexpr, PAGE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    """SPLIT slots of one head of a row that has one new token, which is written."""
    row, head, first, length, bucket, told, low, count, place = split_of(lengths, firsts, buckets, heads, kv_heads, SPLIT, GROUP)
    if (tl.load(firsts + row + 1) == first + 1) & (low < count):
        attend(
            query + first.to(tl.int64) * query_token + head.to(tl.int64) * GROUP * query_head,
            lies(numbers, words, KEY[1], KEY[0]), words + KEY[2] // 4,
            lies(numbers, words, VALUE[1], VALUE[0]), words + VALUE[2] // 4,
            low, tl.minimum(low + SPLIT, count), length, tl.load(told), tl.load(told + 1), tl.load(told + 2),
            part_output + place * PADDED_DIM, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap,
            table + row.to(tl.int64) * table_row, steps + bucket * steps_row, tl.load(told + 4),
            GROUP, ROWS, HEAD_DIM, PADDED_DIM, TILE, CAPPED, REACHES, PRECISION, KEY[0], VALUE[0], PAGE, PAGE_BYTES,
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
