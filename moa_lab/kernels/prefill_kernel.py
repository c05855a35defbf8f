"""The prefill kernel: which keys one block of queries of one head reads, and their running softmax."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(
    tiles, new, ring, batch, head, start, past, origin, sink, ring_slots, turn, stride, stop,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, OVER_RING: tl.constexpr, BY_PLACE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Keys or values at BLOCK_N positions from `start` on, before `stop`: those from `past` on are new, the others lie in the ring, where
    the token at `past` would take the slot `turn` after the sink."""
    if DESCRIBED:
        # Columns past the end load as zeros.
        found = tiles.load([batch, head, start - origin, 0]).reshape(BLOCK_N, PADDED_DIM)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        dims = tl.arange(0, PADDED_DIM)
        real = (positions[:, None] < stop) & (dims[None, :] < HEAD_DIM)
        places = new + (positions - origin).to(tl.int64)[:, None] * stride + dims[None, :]
        if OVER_RING:
            # So many slots back from `turn`, around the ring; no division for every position. A position that the ring no longer holds,
            # which nobody sees, takes one that it holds, and so a number.
            slots = turn + positions - past
            slots = sink + tl.maximum(tl.where(slots < 0, slots + ring_slots, slots), 0)
            slots = tl.where(positions < sink, positions, slots)
            held = ring + slots.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            is_new = positions[:, None] >= past
            if BY_PLACE:
                # One load from either, which is pipelined; two would meet in registers.
                found = tl.load(tl.where(is_new, places, held), mask=real, other=0.0)
            else:
                found = tl.where(is_new, tl.load(places, mask=real & is_new, other=0.0), tl.load(held, mask=real & ~is_new, other=0.0))
        else:
            found = tl.load(places, mask=real, other=0.0)
    return found


@triton.jit
def _fold(
    scores_max, scores_sum, output, query, start,
    key_tiles, value_tiles, key, value, key_ring, value_ring, batch, head, past, origin, sink, ring_slots, turn,
    key_stride, value_stride, stop, query_positions, sink_tokens, window, reach, scale, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    OVER_RING: tl.constexpr, BY_PLACE: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the BLOCK_N keys from position `start` on into the running softmax, in base 2, of a block of queries."""
    near_key = _load(
        key_tiles, key, key_ring, batch, head, start, past, origin, sink, ring_slots, turn, key_stride, stop,
        HEAD_DIM, PADDED_DIM, BLOCK_N, OVER_RING, BY_PLACE, DESCRIBED,
    )  # fmt: skip
    scores = tl.dot(query, tl.trans(near_key), input_precision=PRECISION)
    # The scale is applied in the exponent: one operation per score.
    factor = scale * 1.4426950408889634
    if CAPPED:
        # tanh via sigmoid.
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scale * scores / softcap) - 1.0)
        factor = 1.4426950408889634
    if MASKED:
        positions = start + tl.arange(0, BLOCK_N)
        back = query_positions[:, None] - positions[None, :]
        seen = (back >= 0) & (back < reach) & ((back < window) | (positions[None, :] < sink_tokens))
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(scores_max, tl.max(scores, axis=1) * factor)
    # A row that has seen nothing yet has no maximum to subtract.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    weights = tl.exp2(scores * factor - safe_max[:, None])
    shrink = tl.exp2(scores_max - safe_max)
    scores_sum = scores_sum * shrink + tl.sum(weights, axis=1)
    near_value = _load(
        value_tiles, value, value_ring, batch, head, start, past, origin, sink, ring_slots, turn, value_stride, stop,
        HEAD_DIM, PADDED_DIM, BLOCK_N, OVER_RING, BY_PLACE, DESCRIBED,
    )  # fmt: skip
    output = tl.dot(weights.to(near_value.dtype), near_value, output * shrink[:, None], input_precision=PRECISION)
    return new_max, scores_sum, output


@triton.jit(do_not_specialize=["n_queries", "n_keys", "kv_heads"], do_not_specialize_on_alignment=["sink_logits"])
def prefill_kernel(
    query, key_tiles, value_tiles, key, value, output, key_ring, value_ring, table, order, lengths, padding, sink_logits,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, output_batch, output_head, output_token, ring_batch,
    n_queries, n_keys, kv_heads, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ONE_LOOP: tl.constexpr,
    CAPPED: tl.constexpr, OVER_RING: tl.constexpr, BY_PLACE: tl.constexpr, DESCRIBED: tl.constexpr, SINK_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ONE_LOOP: tiles that all rows see whole share the loop of masked ones, which takes fewer registers. BY_PLACE: a load may choose
    between the ring and the new tokens, token by token; Triton 3.6 compiles no such choice for AMD."""
    # Longest work first, so that it does not run alone at the end: the heads with the longest windows, in every row, and within each
    # the last queries, which see most keys.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    rows_of_head = tl.num_programs(1) // kv_heads
    kv_head = tl.load(order + tl.program_id(1) // rows_of_head)
    row = tl.program_id(1) % rows_of_head // GROUP
    batch = row.to(tl.int64)
    head = (kv_head * GROUP + tl.program_id(1) % GROUP).to(tl.int64)
    sink = tl.load(table + kv_head * 4 + 1)
    ring_slots = tl.load(table + kv_head * 4 + 2)
    window = tl.load(table + kv_head * 4 + 3)
    # Everything is counted in positions of the row's own sequence. Its new tokens begin at `past`, the first column at `origin`.
    fresh = n_keys - tl.load(padding + batch)
    length = fresh
    turn = 0
    if OVER_RING:
        length = tl.load(lengths + batch)
        ring_start = batch * ring_batch + tl.load(table + kv_head * 4).to(tl.int64) * HEAD_DIM
        key_ring += ring_start
        value_ring += ring_start
        turn = tl.maximum(length - fresh - sink, 0) % ring_slots
    past = length - fresh
    origin = length - n_keys

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    real = (rows[:, None] < n_queries) & (dims[None, :] < HEAD_DIM)
    query += batch * query_batch + head * query_head
    asked = tl.load(query + rows.to(tl.int64)[:, None] * query_token + dims[None, :], mask=real, other=0.0)
    key += batch * key_batch + kv_head.to(tl.int64) * key_head
    value += batch * value_batch + kv_head.to(tl.int64) * value_head
    query_positions = length - n_queries + rows
    lowest = length - n_queries + block * BLOCK_M
    highest = tl.minimum(lowest + BLOCK_M, length) - 1

    # The window: [near, highest], of which all rows see [inner, diagonal) whole. The sink before it: [begin, sink_stop).
    oldest = tl.maximum(lowest - reach + 1, 0)
    begin = oldest // BLOCK_N * BLOCK_N
    near = tl.maximum(lowest - window + 1, oldest) // BLOCK_N * BLOCK_N
    sink_stop = tl.minimum((sink_tokens + BLOCK_N - 1) // BLOCK_N * BLOCK_N, near)
    inner = (tl.maximum(highest - tl.minimum(window, reach) + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(lowest + 1, 0) // BLOCK_N * BLOCK_N
    inner = tl.maximum(tl.minimum(inner, diagonal), near)
    diagonal = inner if ONE_LOOP else tl.maximum(diagonal, inner)

    scores_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scores_sum = tl.zeros([BLOCK_M], tl.float32)
    if SINK_LOGITS:
        # The sink logit is a key of this score (in base 2) and value 0 that every query sees.
        scores_max = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        scores_sum += 1.0
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    if not ONE_LOOP:
        for start in range(inner, diagonal, BLOCK_N):
            scores_max, scores_sum, total = _fold(
                scores_max, scores_sum, total, asked, start,
                key_tiles, value_tiles, key, value, key_ring, value_ring, row, kv_head, past, origin, sink, ring_slots, turn,
                key_token, value_token, length, query_positions, sink_tokens, window, reach, scale, softcap,
                HEAD_DIM, PADDED_DIM, BLOCK_N, False, CAPPED, OVER_RING, BY_PLACE, DESCRIBED, PRECISION,
            )  # fmt: skip
    # The masked tiles lie in three ranges but share one loop: three loops would fill and drain the load pipeline three times.
    of_sink = tl.maximum(sink_stop - begin, 0)
    of_window = of_sink + inner - near
    for done in range(0, of_window + tl.maximum(highest + 1 - diagonal, 0), BLOCK_N):
        start = tl.where(done < of_sink, begin + done, tl.where(done < of_window, near + done - of_sink, diagonal + done - of_window))
        scores_max, scores_sum, total = _fold(
            scores_max, scores_sum, total, asked, start,
            key_tiles, value_tiles, key, value, key_ring, value_ring, row, kv_head, past, origin, sink, ring_slots, turn,
            key_token, value_token, length, query_positions, sink_tokens, window, reach, scale, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_N, True, CAPPED, OVER_RING, BY_PLACE, DESCRIBED, PRECISION,
        )  # fmt: skip
    # A left-padding query sees nothing: its output is 0.
    total = total / tl.where(scores_sum == 0.0, 1.0, scores_sum)[:, None]
    output += batch * output_batch + head * output_head
    tl.store(output + rows.to(tl.int64)[:, None] * output_token + dims[None, :], total.to(output.dtype.element_ty), mask=real)
