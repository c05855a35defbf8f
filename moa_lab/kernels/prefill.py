"""Prefill attention in Triton: every KV head has its sink and window, and tiles that no query sees are never loaded.

Checks, tile sizes and the launch; the kernel is in `prefill_kernel`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moa_lab.cache import PackedRing, RingLayer
from moa_lab.cache.layout import LONGEST
from moa_lab.kernels.devices import nvidia_capability, precision, room_for_tiles, wave_lanes
from moa_lab.kernels.prefill_kernel import prefill_kernel
from moa_lab.kernels.read import ring_read
from moa_lab.kernels.unroll import unrolled, unrolled_bytes

HOPPER = (9, 0)
NO_REACH = LONGEST
"""The reach of a layer without a window of its own: longer than any sequence."""
MANY = 256
"""New tokens, from which on it pays to lay a ring out by position first: a tile of a ring takes two and a half times as long."""
MOST_UNROLLED = 2**30
"""Bytes for that."""


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
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention in which KV head g sees its sink and its own window: (batch, query_heads, query_tokens, head_dim).

    query: (batch, query_heads, query_tokens, head_dim), the last of the key_tokens; key, value: (batch, kv_heads, key_tokens,
    head_dim), float16, bfloat16 or float32, the last dimension contiguous; query head h reads KV head h // group. windows: tokens per
    KV head, on the host. first: int32 (batch,), each row's first key that is not padding (None: 0 for all); the sink starts there, and
    a padding query's output is 0. reach: the model's own window, beyond which nothing is seen, not even the sink. softcap: as in
    `masked_attention`. sink_logits: (query_heads, 1, 1), likewise.

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
    return _prefill(
        query, key, value, None, None, table, order, padding, padding, sink_tokens, reach or NO_REACH, scale, softcap or 0.0, sink_logits
    )


def chunk_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ring: RingLayer,
    lengths: torch.Tensor,
    padding: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moa_lab.kernels.ring_reference.chunk_attention` by kernels: new tokens attend to the ring and to one another.

    Tiles of the ring that no new token sees are not read. float16, bfloat16 or float32. What a `PackedRing` holds is first read whole,
    into memory for this layer's K and V in the ring's dtype; for `MANY` new tokens or more, what any ring holds is laid out by position,
    in memory for K and V of as many tokens as its capacity, where that is at most `MOST_UNROLLED` bytes.
    """
    _check(query, key, value, scale)
    layout = ring.layout
    keys, values = ring_read(ring) if isinstance(ring, PackedRing) else (ring.keys, ring.values)
    table, order = _heads(layout.windows, query.device)
    if query.shape[2] >= MANY and unrolled_bytes(ring) <= MOST_UNROLLED:
        by_position, values_by_position, first = unrolled(keys, values, ring, key, value, lengths, padding)
        return _prefill(
            query, by_position, values_by_position, None, None, table, order, first, first, layout.sink_tokens, layout.reach or NO_REACH,
            scale, softcap or 0.0, sink_logits,
        )  # fmt: skip
    return _prefill(
        query, key, value, keys, values, ring.table, order, lengths, padding, layout.sink_tokens, layout.reach or NO_REACH, scale,
        softcap or 0.0, sink_logits,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _heads(windows: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's table, as `LayerLayout.table`, for heads without a ring; and the heads ordered by window, longest first.

    Cached: a copy to the device in every layer of every prefill would mean a host synchronisation each.
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
    softcap: float, sink_logits: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """softcap: 0 for none."""
    batch, query_heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = empty_like(query)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    over_ring = ring_keys is not None
    block_m, block_n, warps, stages = _tiles(padded_dim, query)
    described = not over_ring and _describes(key) and _describes(value)
    tiles = [TensorDescriptor.from_tensor(x, [1, 1, block_n, padded_dim]) if described else x for x in (key, value)]
    keys, values = (key, value) if ring_keys is None else (ring_keys, ring_values)
    grid = (triton.cdiv(n_queries, block_m), batch * query_heads)
    prefill_kernel[grid](
        query, *tiles, key, value, output, keys, values, table, order, lengths, padding,
        query if sink_logits is None else sink_logits.contiguous(),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3], keys.stride(0),
        n_queries, n_keys, kv_heads, sink_tokens, reach, scale, softcap or 1.0,
        GROUP=query_heads // kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        BLOCK_M=block_m, BLOCK_N=block_n, ONE_LOOP=wave_lanes(query) == 32 and padded_dim > 128,
        CAPPED=softcap != 0, OVER_RING=over_ring, BY_PLACE=wave_lanes(query) is None, DESCRIBED=described,
        SINK_LOGITS=sink_logits is not None, PRECISION=precision(query),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


@_prefill.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_like(query)


def empty_like(query: torch.Tensor) -> torch.Tensor:
    """An empty output, in memory as transformers expects: (batch, tokens, heads, head_dim)."""
    batch, query_heads, n_queries, head_dim = query.shape
    return query.new_empty(batch, n_queries, query_heads, head_dim).transpose(1, 2)


def _describes(tensor: torch.Tensor) -> bool:
    """Whether tiles can be loaded by a tensor descriptor (Hopper's TMA): all strides but the last must be multiples of 16 bytes."""
    capability = nvidia_capability(tensor)
    able = not tensor.is_cuda or (capability is not None and capability >= HOPPER)
    aligned = tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    return able and aligned and 0 not in tensor.shape


def _tiles(padded_dim: int, query: torch.Tensor) -> tuple[int, int, int, int]:
    """Queries and keys per tile, warps, and as many stages as fit in the device's shared memory."""
    wave = wave_lanes(query)
    if query.dtype == torch.float32:
        # Products of such numbers are sums in registers, which hold both operands.
        return (32, 32, 8, 1) if padded_dim <= 128 and wave != 32 else (16, 16, 8, 1)
    if wave == 32:
        return 32, (32 if padded_dim <= 128 else 16), 8, 1
    block_m, block_n, warps, stages = (64, 64, 4, 3) if padded_dim <= 128 else (128, 64, 8, 2)
    if (nvidia_capability(query) or HOPPER) < HOPPER:
        # Products there keep both operands in registers: more of them hold the same tile.
        block_m, warps = 64, 8
    if wave is not None:
        # Four waves of 64 lanes have all registers there are, eight have half of them each.
        warps = 4
    rows = room_for_tiles(query) // (padded_dim * query.itemsize)
    if rows < block_m + block_n:
        block_m //= 2
    tiles = (rows - block_m) // block_n
    return block_m, block_n, warps, min(stages, max(tiles // 2, 1))
