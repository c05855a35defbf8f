"""Writing new tokens to a ring in Triton: all heads of a layer in one launch, without host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moa_lab.cache import PackedRing, RingLayer
from moa_lab.kernels.codes import grid_word, on_grid, store_words, words_of


def ring_write(key: torch.Tensor, value: torch.Tensor, ring: RingLayer, lengths: torch.Tensor, padding: torch.Tensor) -> None:
    """`RingLayer.write` in one kernel; what a `PackedRing` stores is equal to the last bit."""
    if isinstance(ring, PackedRing):
        buffers = ring.buffers["plain"], ring.buffers["codes"], ring.buffers["grids"]
        _write_packed(key, value, *buffers, ring.table, ring.sides, lengths, padding)
    else:
        _write(key, value, ring.keys, ring.values, ring.table, lengths, padding)


@triton.jit
def kept_slots(at, length, sink, ring):
    """Which positions `at` a head holds once the sequence has `length` tokens, and their slots. What later ones would overwrite is
    skipped: the order of writes to one slot is undefined."""
    return (at < sink) | (at >= length - ring), tl.where(at < sink, at, sink + (at - sink) % ring)


@triton.jit
def held_positions(slots, length, sink, ring):
    """The positions that the tokens in `slots` of a head have once the sequence has `length` tokens; of slots that are filled."""
    return tl.where(slots < sink, slots, slots + tl.maximum(length - 1 - slots, 0) // ring * ring)


@triton.jit
def _slots(table, lengths, padding, batch, head, columns, tokens):
    """Which of the new tokens, by column, are written, and to which slots of their head."""
    length = tl.load(lengths + batch)
    sink = tl.load(table + head * 4 + 1)
    ring = tl.load(table + head * 4 + 2)
    kept, slots = kept_slots(length - tokens + columns, length, sink, ring)
    return kept & (columns < tokens) & (columns >= tl.load(padding + batch)), slots


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
    kept, slots = _slots(table, lengths, padding, batch, head, columns, tokens)
    slots += tl.load(table + head * 4)
    there = kept[:, None] & (dims[None, :] < HEAD_DIM)
    target = batch * ring_batch + slots[:, None].to(tl.int64) * HEAD_DIM + dims[None, :]
    source = key + batch * key_batch + head * key_head + columns[:, None].to(tl.int64) * key_token + dims[None, :]
    tl.store(keys + target, tl.load(source, mask=there, other=0.0), mask=there)
    source = value + batch * value_batch + head * value_head + columns[:, None].to(tl.int64) * value_token + dims[None, :]
    tl.store(values + target, tl.load(source, mask=there, other=0.0), mask=there)


@triton.jit
def _store(
    source, numbers, codes, grids, side, slots, kept, columns, token,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """K or V of one head at `columns`, which lie `token` elements apart, to their slots."""
    bits = tl.load(side)
    first = tl.load(side + 1)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    there = kept[:, None] & (dims < HEAD_DIM)
    slots = slots[:, None].to(tl.int64)
    given = tl.load(source + columns[:, None].to(tl.int64) * token + dims, mask=there, other=0.0)
    if bits == 16:
        tl.store(numbers + first + slots * HEAD_DIM + dims, given, mask=there)
    else:
        places, low, step = on_grid(given, there, tl.where(bits == 8, 255.0, 15.0))
        tl.store(grids + tl.load(side + 2) + slots, grid_word(low, step), mask=kept[:, None])
        if bits == 8:
            store_words(codes + first, words_of(places, 8), slots, kept, HEAD_DIM, 8)
        else:
            store_words(codes + first, words_of(places, 4), slots, kept, HEAD_DIM, 4)


@triton.jit
def _write_packed_kernel(
    key, value, numbers, codes, grids, table, sides, lengths, padding,
    key_batch, key_head, key_token, value_batch, value_head, value_token, numbers_batch, codes_batch, grids_batch, tokens, kv_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept, slots = _slots(table, lengths, padding, batch, head, columns, tokens)
    numbers += batch * numbers_batch
    codes += batch * codes_batch
    grids += batch * grids_batch
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    side = sides + head * 6
    _store(key, numbers, codes, grids, side, slots, kept, columns, key_token, HEAD_DIM, PADDED_DIM)
    _store(value, numbers, codes, grids, side + 3, slots, kept, columns, value_token, HEAD_DIM, PADDED_DIM)


@torch.library.custom_op("moa_lab::ring_write", mutates_args=("keys", "values"))
def _write(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
    lengths: torch.Tensor, padding: torch.Tensor,
) -> None:  # fmt: skip
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, kv_heads, tokens, head_dim = key.shape
    padded_dim = triton.next_power_of_2(head_dim)
    block = _block(tokens, padded_dim, 4096)
    _write_kernel[(triton.cdiv(tokens, block), batch * kv_heads)](
        key, value, keys, values, table, lengths, padding, *key.stride()[:3], *value.stride()[:3], keys.stride(0),
        tokens, kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("moa_lab::ring_write_packed", mutates_args=("numbers", "codes", "grids"))
def _write_packed(
    key: torch.Tensor, value: torch.Tensor, numbers: torch.Tensor, codes: torch.Tensor, grids: torch.Tensor, table: torch.Tensor,
    sides: torch.Tensor, lengths: torch.Tensor, padding: torch.Tensor,
) -> None:  # fmt: skip
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, kv_heads, tokens, head_dim = key.shape
    # At least the numbers of a word.
    padded_dim = max(triton.next_power_of_2(head_dim), 8)
    # A quarter of what a copy moves at once: quantising takes registers.
    block = _block(tokens, padded_dim, 1024)
    _write_packed_kernel[(triton.cdiv(tokens, block), batch * kv_heads)](
        key, value, numbers, codes, grids, table, sides, lengths, padding, *key.stride()[:3], *value.stride()[:3],
        numbers.stride(0), codes.stride(0), grids.stride(0), tokens, kv_heads,
        HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=1 if block == 1 else 4,
    )  # fmt: skip


def _block(tokens: int, padded_dim: int, most: int) -> int:
    """Tokens per program, which moves up to `most` numbers at once."""
    return min(triton.next_power_of_2(tokens), max(most // padded_dim, 1))
