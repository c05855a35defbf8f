"""The decode kernels: what one program reads of the ring and its running softmax, and the merge of what programs found.

Of a vector in 8 or 4 bits a kernel multiplies the codes themselves, which float16 holds exactly. With codes c, the grid's smallest
value l and its step s, `q . (l + s c) = l sum(q) + s (q . c)` for keys, and `sum(w (l + s c)) = sum(w l) + sum((w s) c)` for values with
weights w.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_lab.kernels.codes import CODES, grid_of, vectors


@triton.jit
def _fold(
    scores, scores_max, scores_sum, slots, held, length, sink, ring, window, sink_tokens, reach, softcap,
    CAPPED: tl.constexpr, REACHES: tl.constexpr,
):  # fmt: skip
    """Fold the scores of a tile into the running softmax, in base 2: its weights, by what all before shrinks, and the new state."""
    if CAPPED:
        # tanh via sigmoid. Below, scores are in base 2.
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    scores = scores * 1.4426950408889634
    if REACHES:
        turns = tl.where(slots < sink, 0, (length - 1 - slots) // ring)
        back = length - 1 - slots - turns * ring
        held = held & (back < reach) & ((back < window) | (length - 1 - back < sink_tokens))
    scores = tl.where(held[None, :], scores, float("-inf"))
    new_max = tl.maximum(scores_max, tl.max(scores, axis=1))
    # If the whole tile is hidden, there is no maximum to subtract.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    shrink = tl.exp2(scores_max - safe_max)
    return weights, shrink, new_max, scores_sum * shrink + tl.sum(weights, axis=1)


@triton.jit
def pages_of(pages, steps, rank, slots, held, PAGE: tl.constexpr):
    """The pages in which `slots` of a head lie, int64: one, or several; held: those that there are. pages: the row's block table. steps,
    rank: of `moa_lab.serving.page_layout`, of the head."""
    column = tl.load(steps + slots // PAGE, mask=held, other=0) + rank
    return tl.load(pages + column, mask=held, other=0).to(tl.int64)


@triton.jit
def at_page(base, page, BYTES: tl.constexpr):
    """`base`, of the first page, moved on to a page or pages, which are so many bytes each."""
    return base + page * (BYTES // (base.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def attend(
    query, key, key_grids, value, value_grids, low, high, length, sink, ring, window, part_output, part_max, part_sum,
    query_head, sink_tokens, reach, scale, softcap, pages, steps, rank,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
    CAPPED: tl.constexpr, REACHES: tl.constexpr, PRECISION: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head over its slots from `low` to `high`: their output before division, greatest score and sum.

    query: of the first of these heads. key, value: of the head's first slot, numbers or codes; key_grids, value_grids: its grid.
    PAGE: 0, or slots lie in pages of so many, a multiple of TILE, and so is `low`: key, value and grids are then of the first page, of
    PAGE_BYTES, and pages, steps, rank are as in `pages_of`.
    """
    DTYPE: tl.constexpr = tl.float32 if query.dtype.element_ty == tl.float32 else tl.float16
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    asking = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    asked = tl.load(query + rows[:, None].to(tl.int64) * query_head + dims[None, :], mask=asking, other=0.0)
    if KEY_BITS < 16:
        # Scaled to what float16 holds: queries may be bfloat16.
        exact = asked.to(tl.float32)
        largest = tl.max(tl.abs(exact), axis=1)
        asked = (exact / tl.where(largest == 0.0, 1.0, largest)[:, None]).to(DTYPE)
        asked_sum = tl.sum(asked.to(tl.float32), axis=1)
        factor = scale * largest
    scores_max = tl.full([ROWS], float("-inf"), tl.float32)
    scores_sum = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    if VALUE_BITS < 16:
        shift = tl.zeros([ROWS], tl.float32)
    page = tl.zeros([], tl.int64)
    if PAGE > 0:
        page = pages_of(pages, steps, rank, low, low < high, PAGE)
    for at in range(low, high, TILE):
        slots = at + tl.arange(0, TILE)
        held = slots < high
        places = slots
        here = page
        if PAGE > 0:
            # A tile lies in one page, so that its vectors follow one another. Where the next one lies is looked up a turn
            # ahead: in the turn that reads it, the lookup would take a stage of the pipeline. Two turns ahead there is no pipeline.
            places = at % PAGE + tl.arange(0, TILE)
            page = pages_of(pages, steps, rank, at + TILE, at + TILE < high, PAGE)
        near = vectors(at_page(key, here, PAGE_BYTES), places, held, HEAD_DIM, PADDED_DIM, KEY_BITS, DTYPE)
        scores = tl.dot(asked, tl.trans(near), input_precision=PRECISION)
        if KEY_BITS == 16:
            scores = scores * scale
        else:
            smallest, step = grid_of(at_page(key_grids, here, PAGE_BYTES), places, held)
            scores = (scores * (step * CODES)[None, :] + asked_sum[:, None] * smallest[None, :]) * factor[:, None]
        weights, shrink, scores_max, scores_sum = _fold(
            scores, scores_max, scores_sum, slots, held, length, sink, ring, window, sink_tokens, reach, softcap, CAPPED, REACHES
        )
        near = vectors(at_page(value, here, PAGE_BYTES), places, held, HEAD_DIM, PADDED_DIM, VALUE_BITS, DTYPE)
        if VALUE_BITS == 16:
            output = tl.dot(weights.to(near.dtype), near, output * shrink[:, None], input_precision=PRECISION)
        else:
            smallest, step = grid_of(at_page(value_grids, here, PAGE_BYTES), places, held)
            shift = shift * shrink + tl.sum(weights * smallest[None, :], axis=1)
            # Relative to the greatest step, so that float16 holds the weights.
            greatest = tl.max(step, axis=0)
            weights = weights * (step / tl.where(greatest == 0.0, 1.0, greatest))[None, :]
            output = output * shrink[:, None] + tl.dot(weights.to(DTYPE), near, input_precision=PRECISION) * (greatest * CODES)
    if VALUE_BITS < 16:
        output += shift[:, None]
    tl.store(part_max + rows, scores_max, mask=rows < GROUP)
    tl.store(part_sum + rows, scores_sum, mask=rows < GROUP)
    tl.store(part_output + rows[:, None] * PADDED_DIM + dims[None, :], output, mask=rows[:, None] < GROUP)


@triton.jit
def _first(numbers, codes, side, HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr):
    """The first vector of a head's K or V, in the buffer of its kind."""
    if BITS == 16:
        found = numbers + tl.multiple_of(tl.load(side + 1), HEAD_DIM & -HEAD_DIM)
    else:
        found = codes + tl.multiple_of(tl.load(side + 1), ALIGNED)
    return found


@triton.jit
def decode_kernel(
    query, keys, values, codes, grids, table, sides, lengths, segments, bounds, part_output, part_max, part_sum,
    query_batch, query_head, ring_batch, codes_batch, grids_batch, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
    CAPPED: tl.constexpr, REACHES: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The segments of one program. PAIRS: the bits of K and V that heads of this layer have, each pair with a loop of its own; empty for
    a ring without codes. ALIGNED: divides the first word of every head's codes."""
    program = tl.program_id(0)
    for segment in range(tl.load(bounds + program), tl.load(bounds + program + 1)):
        batch = tl.load(segments + segment * 4).to(tl.int64)
        head = tl.load(segments + segment * 4 + 1)
        low = tl.load(segments + segment * 4 + 2)
        length = tl.load(lengths + batch)
        high = tl.minimum(tl.load(segments + segment * 4 + 3), length)
        start = tl.load(table + head * 4)
        sink = tl.load(table + head * 4 + 1)
        ring = tl.load(table + head * 4 + 2)
        window = tl.load(table + head * 4 + 3)
        asking = query + batch * query_batch + head.to(tl.int64) * GROUP * query_head
        # int64: rows times slots times head_dim can exceed 2^31.
        place = tl.cast(segment, tl.int64) * GROUP
        output = part_output + place * PADDED_DIM
        if len(PAIRS) == 0:
            base = batch * ring_batch + start.to(tl.int64) * HEAD_DIM
            attend(
                asking, keys + base, grids, values + base, grids, low, high, length, sink, ring, window,
                output, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap, table, table, 0,
                GROUP, ROWS, HEAD_DIM, PADDED_DIM, TILE, CAPPED, REACHES, PRECISION, 16, 16, 0, 0,
            )  # fmt: skip
        side = sides + head * 6
        numbers = keys + batch * ring_batch
        words = codes + batch * codes_batch
        grid = grids + batch * grids_batch
        for pair in tl.static_range(len(PAIRS)):
            if (tl.load(side) == PAIRS[pair][0]) & (tl.load(side + 3) == PAIRS[pair][1]):
                attend(
                    asking, _first(numbers, words, side, HEAD_DIM, ALIGNED, PAIRS[pair][0]), grid + tl.load(side + 2),
                    _first(numbers, words, side + 3, HEAD_DIM, ALIGNED, PAIRS[pair][1]), grid + tl.load(side + 5),
                    low, high, length, sink, ring, window,
                    output, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap, table, table, 0,
                    GROUP, ROWS, HEAD_DIM, PADDED_DIM, TILE, CAPPED, REACHES, PRECISION, PAIRS[pair][0], PAIRS[pair][1], 0, 0,
                )  # fmt: skip


@triton.jit
def merged(
    part_output, part_max, part_sum, start, stop, row, sink_logit,
    GROUP: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """The segments from `start` to `stop` as one output, (PADDED_DIM,), in a fixed order, so that sums are reproducible. row: the query
    head within its group. sink_logit: of that head."""
    dims = tl.arange(0, PADDED_DIM)
    scores_max = tl.full([], float("-inf"), tl.float32)
    scores_sum = tl.full([], 0.0, tl.float32)
    if SINK_LOGITS:
        # A key of this score (in base 2) and value 0; added here to count it once, not in every segment.
        scores_max = tl.load(sink_logit).to(tl.float32) * 1.4426950408889634
        scores_sum += 1.0
    total = tl.zeros([PADDED_DIM], tl.float32)
    for segment in range(start, stop, BLOCK):
        these = segment + tl.arange(0, BLOCK)
        place = these.to(tl.int64) * GROUP + row
        their_max = tl.load(part_max + place, mask=these < stop, other=float("-inf"))
        their_sum = tl.load(part_sum + place, mask=these < stop, other=0.0)
        theirs = tl.load(part_output + place[:, None] * PADDED_DIM + dims[None, :], mask=(these < stop)[:, None], other=0.0)
        new_max = tl.maximum(scores_max, tl.max(their_max, axis=0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(their_max - safe_max)
        shrink = tl.exp2(scores_max - safe_max)
        scores_sum = scores_sum * shrink + tl.sum(their_sum * weights, axis=0)
        total = total * shrink + tl.sum(theirs * weights[:, None], axis=0)
        scores_max = new_max
    return total / tl.where(scores_sum == 0.0, 1.0, scores_sum)


@triton.jit
def merge_kernel(
    part_output, part_max, part_sum, firsts, sink_logits, output, output_batch, output_head, query_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge the segments of one row and query head."""
    batch = tl.program_id(0) // query_heads
    head = tl.program_id(0) % query_heads
    owner = batch * (query_heads // GROUP) + head // GROUP
    dims = tl.arange(0, PADDED_DIM)
    total = merged(
        part_output, part_max, part_sum, tl.load(firsts + owner), tl.load(firsts + owner + 1), head % GROUP, sink_logits + head,
        GROUP, PADDED_DIM, BLOCK, SINK_LOGITS,
    )  # fmt: skip
    output += batch.to(tl.int64) * output_batch + head.to(tl.int64) * output_head
    tl.store(output + dims, total.to(output.dtype.element_ty), mask=dims < HEAD_DIM)
