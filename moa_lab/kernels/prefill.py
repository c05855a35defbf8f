"""Prefill attention in Triton: every KV head has its sink and window, and tiles that nobody sees are never loaded."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moa_lab.cache import RingLayer

NO_REACH = 2**30
"""Tokens that no sequence has: the reach of a layer without a window of its own."""


@triton.jit
def _load(
    tiles, new, ring, batch, head, start, past, origin, sink, ring_slots, stride, stop,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, OVER_RING: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Keys or values at BLOCK_N positions from `start` on, before `stop`: those from `past` on are new, the others lie in the ring."""
    if DESCRIBED:
        # Past the last column there are zeros.
        found = tiles.load([batch, head, start - origin, 0]).reshape(BLOCK_N, PADDED_DIM)
    else:
        positions = start + tl.arange(0, BLOCK_N)
        dims = tl.arange(0, PADDED_DIM)
        real = (positions[:, None] < stop) & (dims[None, :] < HEAD_DIM)
        offsets = (positions - origin).to(tl.int64)[:, None] * stride + dims[None, :]
        if OVER_RING:
            is_new = positions[:, None] >= past
            slots = tl.where(positions < sink, positions, sink + (positions - sink) % ring_slots)
            held = tl.load(ring + slots.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :], mask=real & (is_new == 0), other=0.0)
            found = tl.where(is_new, tl.load(new + offsets, mask=real & is_new, other=0.0), held)
        else:
            found = tl.load(new + offsets, mask=real, other=0.0)
    return found


@triton.jit
def _fold(
    scores_max, scores_sum, output, query, start,
    key_tiles, value_tiles, key, value, key_ring, value_ring, batch, head, past, origin, sink, ring_slots, key_stride, value_stride, stop,
    query_positions, sink_tokens, window, reach, scale, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr,
    OVER_RING: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the BLOCK_N keys from position `start` on into the running softmax, in base 2, of a block of queries."""
    near_key = _load(
        key_tiles, key, key_ring, batch, head, start, past, origin, sink, ring_slots, key_stride, stop,
        HEAD_DIM, PADDED_DIM, BLOCK_N, OVER_RING, DESCRIBED,
    )  # fmt: skip
    scores = tl.dot(query, tl.trans(near_key), input_precision=PRECISION)
    # What is left to multiply with is folded into the exponent: one operation a score.
    factor = scale * 1.4426950408889634
    if CAPPED:
        # tanh by a sigmoid.
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
        value_tiles, value, value_ring, batch, head, start, past, origin, sink, ring_slots, value_stride, stop,
        HEAD_DIM, PADDED_DIM, BLOCK_N, OVER_RING, DESCRIBED,
    )  # fmt: skip
    output = tl.dot(weights.to(near_value.dtype), near_value, output * shrink[:, None], input_precision=PRECISION)
    return new_max, scores_sum, output


@triton.jit
def _prefill_kernel(
    query, key_tiles, value_tiles, key, value, output, key_ring, value_ring, table, order, lengths, padding,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, output_batch, output_head, output_token, ring_batch,
    n_queries, n_keys, kv_heads, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, OVER_RING: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Long work starts first, or the device waits for it in the end: the heads of the longest windows, in every row, and of each
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
    if OVER_RING:
        length = tl.load(lengths + batch)
        ring_start = batch * ring_batch + tl.load(table + kv_head * 4).to(tl.int64) * HEAD_DIM
        key_ring += ring_start
        value_ring += ring_start
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
    diagonal = tl.maximum(diagonal, inner)

    scores_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scores_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for start in range(inner, diagonal, BLOCK_N):
        scores_max, scores_sum, total = _fold(
            scores_max, scores_sum, total, asked, start,
            key_tiles, value_tiles, key, value, key_ring, value_ring, row, kv_head, past, origin, sink, ring_slots, key_token, value_token,
            length, query_positions, sink_tokens, window, reach, scale, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_N, False, CAPPED, OVER_RING, DESCRIBED, PRECISION,
        )  # fmt: skip
    # What is masked lies in three places, and takes one loop: three would fill and drain the pipeline of loads three times.
    of_sink = tl.maximum(sink_stop - begin, 0)
    of_window = of_sink + inner - near
    for done in range(0, of_window + tl.maximum(highest + 1 - diagonal, 0), BLOCK_N):
        start = tl.where(done < of_sink, begin + done, tl.where(done < of_window, near + done - of_sink, diagonal + done - of_window))
        scores_max, scores_sum, total = _fold(
            scores_max, scores_sum, total, asked, start,
            key_tiles, value_tiles, key, value, key_ring, value_ring, row, kv_head, past, origin, sink, ring_slots, key_token, value_token,
            length, query_positions, sink_tokens, window, reach, scale, softcap,
            HEAD_DIM, PADDED_DIM, BLOCK_N, True, CAPPED, OVER_RING, DESCRIBED, PRECISION,
        )  # fmt: skip
    # A padding query of a row's first tokens sees nothing: its output is 0.
    total = total / tl.where(scores_sum == 0.0, 1.0, scores_sum)[:, None]
    output += batch * output_batch + head * output_head
    tl.store(output + rows.to(tl.int64)[:, None] * output_token + dims[None, :], total.to(output.dtype.element_ty), mask=real)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: Iterable[int],
    sink_tokens: int,
    scale: float,
    *,
    first: torch.Tensor | None = None,
    reach: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention in which KV head g sees its sink and its own window: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim), the last of the key_tokens; key, value: (batch, kv_heads, key_tokens,
    head_dim), float16, bfloat16 or float32, the last dimension contiguous; query head h reads KV head h // group. windows: tokens per
    KV head, known to the host. first: int32 (batch,), each row's first key that is not padding (None: 0 for
    all); the sink starts there, and a padding query's output is 0. reach: the layer's own window, beyond which nothing is seen, the
    sink neither. softcap: as in `masked_attention`.

    Work grows with what the windows keep. Sums are in float32; the result has the dtype of `query`. Raises ValueError for
    shapes that do not fit and for a scale that is not positive. Source: FlashAttention-2 (Dao, 2023) with the spans of MoA
    (arXiv 2406.14909).
    """
    spans = tuple(map(int, windows))
    if len(spans) != key.shape[1] or (first is not None and first.shape != (len(query),)):
        raise ValueError(f"windows must be (kv_heads,) = ({key.shape[1]},) and first (batch,) = ({len(query)},)")
    _check(query, key, value, scale)
    table, order = _heads(spans, query.device)
    padding = torch.zeros(len(query), dtype=torch.int32, device=query.device) if first is None else first
    return _prefill(query, key, value, None, None, table, order, padding, padding, sink_tokens, reach or NO_REACH, scale, softcap or 0.0)


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    padding: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """`moa_lab.kernels.ring_reference.chunk_attention` in one kernel: new tokens attend to the ring and to one another.

    Of the ring, nothing is read that no new token sees. float16, bfloat16 or float32.
    """
    _check(query, key, value, scale)
    layout = ring.layout
    _, order = _heads(layout.windows, query.device)
    return _prefill(
        query, key, value, ring.keys, ring.values, ring.table, order, lengths, padding, layout.sink_tokens, layout.reach or NO_REACH,
        scale, softcap or 0.0,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _heads(windows: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel needs to know of heads without a ring, as `LayerLayout.table`, and the heads in order, longest window first.

    Kept: a copy to the device in every layer of every prefill would make the host wait.
    """
    found = np.zeros((len(windows), 4), dtype=np.int32)
    found[:, 3] = np.minimum(windows, NO_REACH)
    order = np.argsort(-found[:, 3], kind="stable").astype(np.int32)
    return torch.from_numpy(found).to(device), torch.from_numpy(order).to(device)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
    batch, query_heads, n_queries, head_dim = query.shape
    fits = key.shape == value.shape and key.shape[0] == batch and key.shape[3] == head_dim
    if not fits or query_heads % key.shape[1] or n_queries > key.shape[2]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


@torch.library.custom_op("moa_lab::prefill", mutates_args=())
def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ring_keys: torch.Tensor | None, ring_values: torch.Tensor | None,
    table: torch.Tensor, order: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor, sink_tokens: int, reach: int, scale: float,
    softcap: float,
) -> torch.Tensor:  # fmt: skip
    """softcap: 0 for none."""
    batch, query_heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = _like(query)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    over_ring = ring_keys is not None
    block_m, block_n, warps, stages = _tiles(padded_dim, query, over_ring)
    described = not over_ring and _describes(key) and _describes(value)
    tiles = [TensorDescriptor.from_tensor(x, [1, 1, block_n, padded_dim]) if described else x for x in (key, value)]
    keys, values = (key, value) if ring_keys is None else (ring_keys, ring_values)
    grid = (triton.cdiv(n_queries, block_m), batch * query_heads)
    _prefill_kernel[grid](
        query, *tiles, key, value, output, keys, values, table, order, lengths, padding,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], keys.stride(0),
        n_queries, n_keys, kv_heads, sink_tokens, reach, scale, softcap or 1.0,
        GROUP=query_heads // kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        BLOCK_M=block_m, BLOCK_N=block_n, CAPPED=softcap != 0, OVER_RING=over_ring, DESCRIBED=described,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


@_prefill.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return _like(query)


def _like(query: torch.Tensor) -> torch.Tensor:
    """Room for the output, as transformers wants it: (batch, tokens, heads, head_dim) in memory."""
    batch, query_heads, n_queries, head_dim = query.shape
    return query.new_empty(batch, n_queries, query_heads, head_dim).transpose(1, 2)


def _describes(tensor: torch.Tensor) -> bool:
    """Whether tiles may be loaded by a tensor descriptor, as Hopper's copy engine does: it wants all but the last stride on 16 bytes."""
    able = not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0)
    aligned = tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    return able and aligned and 0 not in tensor.shape


def _tiles(padded_dim: int, query: torch.Tensor, over_ring: bool) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages: as many of these as the device's shared memory holds."""
    if query.dtype == torch.float32:
        return (64, 32, 4, 1) if padded_dim <= 128 else (32, 32, 4, 1)
    block_m, block_n, warps, stages = (64, 64, 4, 2 if over_ring else 3) if padded_dim <= 128 else (128, 64, 8, 2)
    if query.is_cuda:
        tiles = (_shared_memory(query.device.index) // (padded_dim * query.itemsize) - block_m) // block_n
        # Over a ring, keys and values come from two places each, and the compiler keeps 4 tiles for every stage but the last.
        stages = min(stages, max((tiles + 3) // 4 if over_ring else tiles // 2, 1))
    return block_m, block_n, warps, stages


@cache
def _shared_memory(device: int) -> int:
    """Bytes that a program may have; asked once, not in every layer of every prefill."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])
