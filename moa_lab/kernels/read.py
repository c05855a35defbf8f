"""A packed ring's keys and values in its dtype, in Triton: for kernels that read no codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moa_lab.cache import PackedRing
from moa_lab.kernels.codes import CODES, grid_of, vectors


def ring_read(ring: PackedRing) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all slots as a `RingLayer` of this layout would hold them, (batch, layout.total, head_dim) each.

    Slots that were never written hold arbitrary values.
    """
    buffers = ring.buffers["plain"], ring.buffers["codes"], ring.buffers["grids"]
    return _read(*buffers, ring.table, ring.sides, ring.layout.total, int(ring.layout.slots.max()), ring.sample.shape[-1])


@triton.jit
def _load(target, numbers, codes, grids, side, slots, held, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """K or V of one head at `slots`, to `target`, where its first slot goes; as `moa_lab.cache.storage.values_at`."""
    bits = tl.load(side)
    first = tl.load(side + 1)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    at = target + slots[:, None] * HEAD_DIM + dims
    there = held[:, None] & (dims < HEAD_DIM)
    if bits == 16:
        tl.store(at, vectors(numbers + first, slots, held, HEAD_DIM, PADDED_DIM, 16, tl.float32), mask=there)
    else:
        smallest, step = grid_of(grids + tl.load(side + 2), slots, held)
        step = step[:, None] * CODES
        if bits == 8:
            found = vectors(codes + first, slots, held, HEAD_DIM, PADDED_DIM, 8, tl.float32)
            tl.store(at, (smallest[:, None] + step * found).to(target.dtype.element_ty), mask=there)
        else:
            found = vectors(codes + first, slots, held, HEAD_DIM, PADDED_DIM, 4, tl.float32)
            tl.store(at, (smallest[:, None] + step * found).to(target.dtype.element_ty), mask=there)


@triton.jit
def _read_kernel(
    keys, values, numbers, codes, grids, table, sides, numbers_batch, codes_batch, grids_batch, total, kv_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = tl.program_id(1) % kv_heads
    start = tl.load(table + head * 4)
    stop = tl.load(table + head * 4 + 4, mask=head + 1 < kv_heads, other=total)
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = slots < stop - start
    numbers += batch * numbers_batch
    codes += batch * codes_batch
    grids += batch * grids_batch
    # int64: rows times slots times head_dim can exceed 2^31.
    target = (batch * total + start) * HEAD_DIM
    side = sides + head * 6
    _load(keys + target, numbers, codes, grids, side, slots, held, HEAD_DIM, PADDED_DIM)
    _load(values + target, numbers, codes, grids, side + 3, slots, held, HEAD_DIM, PADDED_DIM)


@torch.library.custom_op("moa_lab::ring_read", mutates_args=())
def _read(
    numbers: torch.Tensor, codes: torch.Tensor, grids: torch.Tensor, table: torch.Tensor, sides: torch.Tensor,
    total: int, longest: int, head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """longest: slots of the head that has most."""
    batch, kv_heads = len(numbers), len(table)
    keys, values = (numbers.new_empty(batch, total, head_dim) for _ in range(2))
    padded_dim = max(triton.next_power_of_2(head_dim), 8)
    block = max(4096 // padded_dim, 1)
    _read_kernel[(triton.cdiv(longest, block), batch * kv_heads)](
        keys, values, numbers, codes, grids, table, sides, numbers.stride(0), codes.stride(0), grids.stride(0),
        total, kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return keys, values


@_read.register_fake
def _(
    numbers: torch.Tensor, codes: torch.Tensor, grids: torch.Tensor, table: torch.Tensor, sides: torch.Tensor,
    total: int, longest: int, head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    keys, values = (numbers.new_empty(len(numbers), total, head_dim) for _ in range(2))
    return keys, values
