"""A ring's tokens and new ones in the order of their positions, in Triton: a chunk of many new tokens attends to that faster."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moa_lab.cache import RingLayer
from moa_lab.kernels.write import held_positions


def unrolled_bytes(ring: RingLayer) -> int:
    """What `unrolled` takes: K and V of as many tokens as the ring's capacity."""
    layout, (batch, _, head_dim) = ring.layout, ring.sample.shape
    return 2 * batch * len(layout.windows) * layout.capacity * head_dim * ring.sample.itemsize


def unrolled(
    keys: torch.Tensor, values: torch.Tensor, ring: RingLayer, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor,
    padding: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """K and V by position, (batch, kv_heads, layout.capacity, head_dim) each, the last token in the last column, and every row's first
    column: int32 (batch,). Tokens that a head does not keep are zeros.

    keys, values: all slots of `ring`, (batch, layout.total, head_dim). key, value: the new tokens, (batch, kv_heads, tokens, head_dim).
    lengths, padding: as in `moa_lab.kernels.ring_reference.chunk_attention`.
    """
    layout = ring.layout
    found = _unrolled(keys, values, key, value, ring.table, lengths, padding, layout.capacity, int(layout.slots.max()))
    return *found, (layout.capacity - lengths).int()


@triton.jit
def _unroll_kernel(
    by_position, values_by_position, keys, values, key, value, table, lengths, padding, ring_batch,
    key_batch, key_head, key_token, value_batch, value_head, value_token, tokens, capacity, kv_heads, ring_blocks,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK slots of one head, or as many new tokens."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    these = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + batch)
    hidden = tl.load(padding + batch)
    # Numbers come out of both branches, not places: Triton 3.6 compiles no choice of those for AMD.
    if tl.program_id(0) < ring_blocks:
        sink = tl.load(table + head * 4 + 1)
        ring = tl.load(table + head * 4 + 2)
        past = length - tokens + hidden
        held = (these < sink + ring) & (these < past)
        position = held_positions(these, past, sink, ring)
        there = held[:, None] & (dims < HEAD_DIM)
        place = batch * ring_batch + (tl.load(table + head * 4) + these[:, None]).to(tl.int64) * HEAD_DIM + dims
        found = tl.load(keys + place, mask=there, other=0.0)
        values_found = tl.load(values + place, mask=there, other=0.0)
    else:
        these -= ring_blocks * BLOCK
        position = length - tokens + these
        there = ((these < tokens) & (these >= hidden))[:, None] & (dims < HEAD_DIM)
        token = these[:, None].to(tl.int64)
        found = tl.load(key + batch * key_batch + head * key_head + token * key_token + dims, mask=there, other=0.0)
        values_found = tl.load(value + batch * value_batch + head * value_head + token * value_token + dims, mask=there, other=0.0)
    column = capacity - length + position
    there = there & (column >= 0)[:, None]
    target = ((batch * kv_heads + head) * capacity + column[:, None]) * HEAD_DIM + dims
    tl.store(by_position + target, found, mask=there)
    tl.store(values_by_position + target, values_found, mask=there)


@torch.library.custom_op("moa_lab::unroll", mutates_args=())
def _unrolled(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    padding: torch.Tensor, capacity: int, slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """slots: of the head that has most."""
    batch, kv_heads, tokens, head_dim = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    # What lies beside a span in a tile is read, and counts nothing: it must be a number.
    found = [keys.new_zeros(batch, kv_heads, capacity, head_dim) for _ in range(2)]
    padded_dim = max(triton.next_power_of_2(head_dim), 8)
    block = max(4096 // padded_dim, 1)
    ring_blocks = triton.cdiv(slots, block)
    _unroll_kernel[(ring_blocks + triton.cdiv(tokens, block), batch * kv_heads)](
        *found, keys, values, key, value, table, lengths, padding, keys.stride(0), *key.stride()[:3], *value.stride()[:3],
        tokens, capacity, kv_heads, ring_blocks, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return found[0], found[1]


@_unrolled.register_fake
def _(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor,
    padding: torch.Tensor, capacity: int, slots: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, kv_heads, _, head_dim = key.shape
    found = [keys.new_empty(batch, kv_heads, capacity, head_dim) for _ in range(2)]
    return found[0], found[1]
