"""Decode attention in Triton: one new query per row over the ring cache, limited by memory bandwidth."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moa_lab.cache import RingLayer
from moa_lab.kernels.schedule import DecodeSchedule

PROGRAMS_PER_CORE = 3
"""Most programs per streaming multiprocessor."""
TILES_PER_PROGRAM = 32
"""Fewest tiles per program, where there are several per multiprocessor: each program adds a partial result to merge."""


@triton.jit
def _decode_kernel(
    query, keys, values, table, lengths, segments, bounds, part_output, part_max, part_sum,
    query_batch, query_head, ring_batch, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
    CAPPED: tl.constexpr, REACHES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED_DIM)
    asking = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
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
        asked = tl.load(
            query + batch * query_batch + (head * GROUP + rows)[:, None].to(tl.int64) * query_head + dims[None, :], mask=asking, other=0.0
        )
        # int64: rows times slots times head_dim can exceed 2^31.
        base = batch * ring_batch + start.to(tl.int64) * HEAD_DIM
        scores_max = tl.full([ROWS], float("-inf"), tl.float32)
        scores_sum = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([ROWS, PADDED_DIM], tl.float32)
        for at in range(low, high, TILE):
            slots = at + tl.arange(0, TILE)
            held = slots < high
            there = held[:, None] & (dims[None, :] < HEAD_DIM)
            offsets = base + slots[:, None] * HEAD_DIM + dims[None, :]
            key = tl.load(keys + offsets, mask=there, other=0.0)
            scores = tl.dot(asked, tl.trans(key), input_precision=PRECISION) * scale
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
            scores_sum = scores_sum * shrink + tl.sum(weights, axis=1)
            value = tl.load(values + offsets, mask=there, other=0.0)
            output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision=PRECISION)
            scores_max = new_max
        place = (segment * GROUP + rows).to(tl.int64)
        tl.store(part_max + place, scores_max, mask=rows < GROUP)
        tl.store(part_sum + place, scores_sum, mask=rows < GROUP)
        tl.store(part_output + place[:, None] * PADDED_DIM + dims[None, :], output, mask=rows[:, None] < GROUP)


@triton.jit
def _merge_kernel(
    part_output, part_max, part_sum, firsts, sink_logits, output, output_batch, output_head, query_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge the segments of one row and query head in a fixed order, so that sums are reproducible."""
    batch = tl.program_id(0) // query_heads
    head = tl.program_id(0) % query_heads
    owner = batch * (query_heads // GROUP) + head // GROUP
    dims = tl.arange(0, PADDED_DIM)
    scores_max = tl.full([], float("-inf"), tl.float32)
    scores_sum = tl.full([], 0.0, tl.float32)
    if SINK_LOGITS:
        # The sink logit is a key of this score (in base 2) and value 0; added here to count it once, not in every segment.
        scores_max = tl.load(sink_logits + head).to(tl.float32) * 1.4426950408889634
        scores_sum += 1.0
    total = tl.zeros([PADDED_DIM], tl.float32)
    stop = tl.load(firsts + owner + 1)
    for segment in range(tl.load(firsts + owner), stop, BLOCK):
        these = segment + tl.arange(0, BLOCK)
        place = these.to(tl.int64) * GROUP + head % GROUP
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
    total = total / tl.where(scores_sum == 0.0, 1.0, scores_sum)
    output += batch.to(tl.int64) * output_batch + head.to(tl.int64) * output_head
    tl.store(output + dims, total.to(output.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def _write_kernel(
    key, value, keys, values, table, lengths, padding,
    key_batch, key_head, key_token, value_batch, value_head, value_token, ring_batch, tokens, kv_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + batch)
    start = tl.load(table + head * 4)
    sink = tl.load(table + head * 4 + 1)
    ring = tl.load(table + head * 4 + 2)
    at = length - tokens + columns
    # Skip tokens that later ones would overwrite: the order of writes to one slot is undefined.
    kept = (columns < tokens) & (columns >= tl.load(padding + batch)) & ((at < sink) | (at >= length - ring))
    slots = start + tl.where(at < sink, at, sink + (at - sink) % ring)
    there = kept[:, None] & (dims[None, :] < HEAD_DIM)
    target = batch * ring_batch + slots[:, None].to(tl.int64) * HEAD_DIM + dims[None, :]
    source = key + batch * key_batch + head * key_head + columns[:, None].to(tl.int64) * key_token + dims[None, :]
    tl.store(keys + target, tl.load(source, mask=there, other=0.0), mask=there)
    source = value + batch * value_batch + head * value_head + columns[:, None].to(tl.int64) * value_token + dims[None, :]
    tl.store(values + target, tl.load(source, mask=there, other=0.0), mask=there)


def ring_write(key: torch.Tensor, value: torch.Tensor, ring: RingLayer, lengths: torch.Tensor, padding: torch.Tensor) -> None:
    """`RingLayer.write` in one kernel, without host synchronisation."""
    _write(key, value, ring.keys, ring.values, ring.table, lengths, padding)


def decode_attention(
    query: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    schedule: DecodeSchedule,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every row's newest token, already in the ring: (batch, query_heads, 1, head_dim), as `newest_attention`.

    query: (batch, query_heads, 1, head_dim), float16, bfloat16 or float32; lengths: int32 (batch,), at least 1. schedule: made for this
    batch and the ring's slots. sink_logits: (query_heads, 1, 1).
    Sums are in float32, in a fixed order.
    Source: split-KV decoding as in Flash-Decoding (Dao et al., 2023), over heads of unequal spans.
    """
    batch, kv_heads = len(query), len(ring.layout.windows)
    if len(schedule.firsts) != batch * kv_heads + 1 or len(ring.keys) != batch:
        raise ValueError(f"the schedule and the ring must be for {batch} rows and {kv_heads} KV heads")
    return _decode(
        query, ring.keys, ring.values, ring.table, lengths, schedule.segments, schedule.bounds, schedule.firsts, schedule.tile,
        ring.layout.sink_tokens, ring.layout.reach or 0, scale, softcap or 0.0, sink_logits,
    )  # fmt: skip


@torch.library.custom_op("moa_lab::ring_write", mutates_args=("keys", "values"))
def _write(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, padding: torch.Tensor,
) -> None:  # fmt: skip
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, kv_heads, tokens, head_dim = key.shape
    padded_dim = triton.next_power_of_2(head_dim)
    block = min(triton.next_power_of_2(tokens), max(4096 // padded_dim, 1))
    _write_kernel[(triton.cdiv(tokens, block), batch * kv_heads)](
        key, value, keys, values, table, lengths, padding, *key.stride()[:3], *value.stride()[:3], keys.stride(0),
        tokens, kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("moa_lab::decode", mutates_args=())
def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    segments: torch.Tensor, bounds: torch.Tensor, firsts: torch.Tensor, tile: int,
    sink_tokens: int, reach: int, scale: float, softcap: float, sink_logits: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """reach, softcap: 0 for none."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, query_heads, _, head_dim = query.shape
    group = query_heads // len(table)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    # transformers expects (batch, tokens, heads, head_dim) in memory, which is the same for one token.
    output = torch.empty(batch, query_heads, 1, head_dim, dtype=query.dtype, device=query.device)
    part_output = torch.empty(len(segments), group, padded_dim, dtype=torch.float32, device=query.device)
    part_max, part_sum = torch.empty(2, len(segments), group, dtype=torch.float32, device=query.device)
    warps, stages = _shape(padded_dim, query.dtype)
    _decode_kernel[(len(bounds) - 1,)](
        query, keys, values, table, lengths, segments, bounds, part_output, part_max, part_sum,
        query.stride(0), query.stride(1), keys.stride(0), sink_tokens, reach, scale, softcap or 1.0,
        GROUP=group, ROWS=max(triton.next_power_of_2(group), 16), HEAD_DIM=head_dim, PADDED_DIM=padded_dim, TILE=tile,
        CAPPED=softcap != 0, REACHES=reach != 0, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge_kernel[(batch * query_heads,)](
        part_output, part_max, part_sum, firsts, part_max if sink_logits is None else sink_logits.contiguous(),
        output, output.stride(0), output.stride(1), query_heads,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=16, SINK_LOGITS=sink_logits is not None, num_warps=4,
    )  # fmt: skip
    return output


@_decode.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape)


def tile_slots(head_dim: int, dtype: torch.dtype) -> int:
    """Slots per tile, which a program reads at once."""
    size = 4 if dtype == torch.float32 else 2
    return max(16, min(128, 16384 // (triton.next_power_of_2(head_dim) * size)))


def programs_for(tiles: int, cores: int) -> int:
    """How many programs read `tiles` tiles on a GPU of `cores` streaming multiprocessors."""
    return min(max(tiles // TILES_PER_PROGRAM, cores), PROGRAMS_PER_CORE * cores)


def _shape(padded_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Warps and stages."""
    return (4, 1) if dtype == torch.float32 else (4, 3)
