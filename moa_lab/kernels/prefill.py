"""Prefill attention in Triton: every KV head has its sink and window, and tiles that nobody sees are never loaded."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _fold(
    scores_max, scores_sum, output,
    query, key_start, value_start, key_stride, value_stride, low, high,
    query_index, first, sink_end, window, reach, n_keys, scale, softcap,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys `low` to `high` (multiples of BLOCK_N) into the running softmax of a block of queries."""
    dims = tl.arange(0, PADDED_DIM)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        real = (keys[:, None] < n_keys) & (dims[None, :] < HEAD_DIM)
        offsets = keys.to(tl.int64)[:, None]
        key = tl.load(key_start + offsets * key_stride + dims[None, :], mask=real, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if CAPPED:
            # tanh by a sigmoid; in base 2 from here on.
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = scores * 1.4426950408889634
        if MASKED:
            back = query_index[:, None] - keys[None, :]
            seen = (back >= 0) & (keys[None, :] >= first) & (back < reach) & ((back < window) | (keys[None, :] < sink_end))
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(scores_max, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe_max[:, None])
        shrink = tl.exp2(scores_max - safe_max)
        scores_sum = scores_sum * shrink + tl.sum(weights, axis=1)
        value = tl.load(value_start + offsets * value_stride + dims[None, :], mask=real, other=0.0)
        output = tl.dot(weights.to(value.dtype), value, output * shrink[:, None], input_precision=PRECISION)
        scores_max = new_max
    return scores_max, scores_sum, output


@triton.jit
def _prefill_kernel(
    query, key, value, output, windows, firsts,
    query_batch, query_head, query_token, key_batch, key_head, key_token,
    value_batch, value_head, value_token, output_batch, output_head, output_token,
    n_queries, n_keys, offset, query_heads, sink_tokens, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # The last queries of a row see most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // query_heads).to(tl.int64)
    head = (tl.program_id(1) % query_heads).to(tl.int64)
    kv_head = head // GROUP
    window = tl.load(windows + kv_head)
    first = tl.load(firsts + batch)
    sink_end = first + sink_tokens

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    real = (rows[:, None] < n_queries) & (dims[None, :] < HEAD_DIM)
    query += batch * query_batch + head * query_head
    asked = tl.load(query + rows.to(tl.int64)[:, None] * query_token + dims[None, :], mask=real, other=0.0)
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    # Position of every query among the keys.
    query_index = offset + rows
    lowest = offset + block * BLOCK_M
    highest = tl.minimum(lowest + BLOCK_M, offset + n_queries) - 1

    # The window: [near, stop), of which all rows see [inner, diagonal) whole. The sink before it: [begin, sink_stop).
    stop = tl.minimum(highest + 1, n_keys)
    oldest = tl.maximum(tl.maximum(lowest - reach + 1, first), 0)
    near = tl.maximum(lowest - window + 1, oldest) // BLOCK_N * BLOCK_N
    begin = oldest // BLOCK_N * BLOCK_N
    sink_stop = tl.minimum((sink_end + BLOCK_N - 1) // BLOCK_N * BLOCK_N, near)
    inner = (tl.maximum(highest - tl.minimum(window, reach) + 1, first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    diagonal = (lowest + 1) // BLOCK_N * BLOCK_N
    inner = tl.maximum(tl.minimum(inner, diagonal), near)
    diagonal = tl.maximum(diagonal, inner)

    scores_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scores_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    scores_max, scores_sum, total = _fold(
        scores_max, scores_sum, total, asked, key, value, key_token, value_token, begin, sink_stop,
        query_index, first, sink_end, window, reach, n_keys, scale, softcap,
        HEAD_DIM, PADDED_DIM, BLOCK_N, True, CAPPED, PRECISION,
    )  # fmt: skip
    scores_max, scores_sum, total = _fold(
        scores_max, scores_sum, total, asked, key, value, key_token, value_token, near, inner,
        query_index, first, sink_end, window, reach, n_keys, scale, softcap,
        HEAD_DIM, PADDED_DIM, BLOCK_N, True, CAPPED, PRECISION,
    )  # fmt: skip
    scores_max, scores_sum, total = _fold(
        scores_max, scores_sum, total, asked, key, value, key_token, value_token, inner, diagonal,
        query_index, first, sink_end, window, reach, n_keys, scale, softcap,
        HEAD_DIM, PADDED_DIM, BLOCK_N, False, CAPPED, PRECISION,
    )  # fmt: skip
    scores_max, scores_sum, total = _fold(
        scores_max, scores_sum, total, asked, key, value, key_token, value_token, diagonal, stop,
        query_index, first, sink_end, window, reach, n_keys, scale, softcap,
        HEAD_DIM, PADDED_DIM, BLOCK_N, True, CAPPED, PRECISION,
    )  # fmt: skip
    # A padding query sees nothing: its output is 0.
    total = total / tl.where(scores_sum == 0.0, 1.0, scores_sum)[:, None]
    output += batch * output_batch + head * output_head
    tl.store(output + rows.to(tl.int64)[:, None] * output_token + dims[None, :], total.to(output.dtype.element_ty), mask=real)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    windows: torch.Tensor,
    sink_tokens: int,
    scale: float,
    *,
    first: torch.Tensor | None = None,
    reach: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention in which KV head g sees its sink and its own window: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim), the last of the key_tokens; key, value: (batch, kv_heads, key_tokens,
    head_dim), float16, bfloat16 or float32, the last dimension contiguous; query head h reads KV head h // group. windows: int32
    (kv_heads,) on the same device, in tokens. first: int32 (batch,), each row's first key that is not padding (None: 0 for
    all); the sink starts there, and a padding query's output is 0. reach: the layer's own window, beyond which nothing is seen, the
    sink neither. softcap: as in `masked_attention`.

    Work grows with what the windows keep. Sums are in float32; the result has the dtype of `query`. Raises ValueError for
    shapes that do not fit. Source: FlashAttention-2 (Dao, 2023) with the spans of MoA (arXiv 2406.14909).
    """
    batch, query_heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != head_dim or query_heads % kv_heads or n_queries > n_keys:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together")
    if windows.shape != (kv_heads,) or (first is not None and first.shape != (batch,)):
        raise ValueError(f"windows must be (kv_heads,) = ({kv_heads},) and first (batch,) = ({batch},)")
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    # As transformers wants it: (batch, tokens, heads, head_dim) in memory.
    output = torch.empty(batch, n_queries, query_heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    if first is None:
        first = torch.zeros(batch, dtype=torch.int32, device=query.device)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    block_m, block_n, warps, stages = _tiles(padded_dim, query.dtype)
    grid = (triton.cdiv(n_queries, block_m), batch * query_heads)
    _prefill_kernel[grid](
        query, key, value, output, windows, first,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        n_queries, n_keys, n_keys - n_queries, query_heads, sink_tokens, min(reach or n_keys, n_keys), scale, softcap or 1.0,
        GROUP=query_heads // kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK_M=block_m, BLOCK_N=block_n,
        CAPPED=softcap is not None, PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


def _tiles(padded_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages."""
    if dtype == torch.float32:
        return (64, 32, 4, 1) if padded_dim <= 128 else (32, 32, 4, 1)
    if padded_dim <= 64:
        return 128, 64, 4, 3
    return (128, 64, 8, 2) if padded_dim <= 128 else (64, 32, 8, 2)
