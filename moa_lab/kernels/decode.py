"""Decode attention in Triton: one new query per row over the ring cache, limited by memory bandwidth."""

from __future__ import annotations

from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
import triton

from moa_lab.cache import PackedRing, RingLayer
from moa_lab.kernels.decode_kernel import decode_kernel, merge_kernel
from moa_lab.kernels.devices import nvidia_capability, precision, room_for_tiles, wave_lanes
from moa_lab.kernels.schedule import DecodeSchedule
from moa_lab.plan.bits import UNTOUCHED, code_words

PROGRAMS_PER_CORE = 3
"""Most programs per streaming multiprocessor."""
TILES_PER_PROGRAM = 32
"""Fewest tiles per program, where there are several per multiprocessor: each program adds a partial result to merge."""

HAS_GLUON = find_spec("triton.experimental") is not None and find_spec("triton.experimental.gluon") is not None
WARP_DIMS = (64, 128, 256)
"""head_dim that a warp reads codes of."""
TILES_PER_WARP = 8
"""As `TILES_PER_PROGRAM`, where a program is a warp."""
REGISTERS = 16384
"""Of a quarter of a multiprocessor, which runs whole warps."""


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
    Sums are in float32, in a fixed order. Codes of a `PackedRing` are read as they lie; what they stand for is not rounded to the ring's
    dtype first.
    Source: split-KV decoding as in Flash-Decoding (Dao et al., 2023), over heads of unequal spans.
    """
    batch, kv_heads = len(query), len(ring.layout.windows)
    if len(schedule.firsts) != batch * kv_heads + 1 or len(ring.sample) != batch:
        raise ValueError(f"the schedule and the ring must be for {batch} rows and {kv_heads} KV heads")
    held: tuple[Any, ...]
    if isinstance(ring, PackedRing):
        numbers = ring.buffers["plain"]
        held = numbers, numbers, ring.buffers["codes"], ring.buffers["grids"], ring.sides, ring.widths
    else:
        held = ring.keys, ring.values, None, None, None, []
    return _decode(
        query, *held, ring.table, lengths, schedule.segments, schedule.bounds, schedule.firsts, schedule.tile,
        ring.layout.sink_tokens, ring.layout.reach or 0, scale, softcap or 0.0, sink_logits,
    )  # fmt: skip


@torch.library.custom_op("moa_lab::decode", mutates_args=())
def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, codes: torch.Tensor | None, grids: torch.Tensor | None,
    sides: torch.Tensor | None, widths: list[int], table: torch.Tensor, lengths: torch.Tensor,
    segments: torch.Tensor, bounds: torch.Tensor, firsts: torch.Tensor, tile: int,
    sink_tokens: int, reach: int, scale: float, softcap: float, sink_logits: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """codes, grids, sides: of a packed ring, whose numbers are `keys` and `values` both. widths: bits of K and V by turns, of every pair
    that its heads have. reach, softcap: 0 for none."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, query_heads, _, head_dim = query.shape
    group = query_heads // len(table)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    # transformers expects (batch, tokens, heads, head_dim) in memory, which is the same for one token.
    output = torch.empty(batch, query_heads, 1, head_dim, dtype=query.dtype, device=query.device)
    part_output = torch.empty(len(segments), group, padded_dim, dtype=torch.float32, device=query.device)
    part_max, part_sum = torch.empty(2, len(segments), group, dtype=torch.float32, device=query.device)
    if codes is None or grids is None or sides is None:
        codes, grids, sides = keys, keys, table
    common = {"GROUP": group, "HEAD_DIM": head_dim, "TILE": tile, "CAPPED": softcap != 0, "REACHES": reach != 0}
    packed = {
        "PAIRS": tuple(zip(widths[::2], widths[1::2], strict=True)),
        "ALIGNED": gcd(16, *(code_words(head_dim, bits) for bits in widths if bits != UNTOUCHED)),
    }
    if by_warps(query, bool(widths)):
        # Imported here: Gluon is newer than Triton itself.
        from moa_lab.kernels.decode_warps import decode_warps_kernel

        decode_warps_kernel[(len(bounds) - 1,)](
            query, keys, codes, grids, table, sides, lengths, segments, bounds, part_output, part_max, part_sum,
            query.stride(0), query.stride(1), keys.stride(0), codes.stride(0), grids.stride(0), sink_tokens, reach, scale, softcap or 1.0,
            ROWS=max(triton.next_power_of_2(group), 8), **common, **packed,
            num_warps=1, maxnreg=warp_registers(head_dim, max(widths)),
        )  # fmt: skip
    else:
        decode_kernel[(len(bounds) - 1,)](
            query, keys, values, codes, grids, table, sides, lengths, segments, bounds, part_output, part_max, part_sum,
            query.stride(0), query.stride(1), keys.stride(0), codes.stride(0), grids.stride(0), sink_tokens, reach, scale, softcap or 1.0,
            ROWS=max(triton.next_power_of_2(group), 16), PADDED_DIM=padded_dim,
            PRECISION=precision(query),
            **common, **packed, num_warps=warps(query), num_stages=stages(query, tile, max(widths, default=UNTOUCHED)),
        )  # fmt: skip
    merge_kernel[(batch * query_heads,)](
        part_output, part_max, part_sum, firsts, part_max if sink_logits is None else sink_logits.contiguous(),
        output, output.stride(0), output.stride(1), query_heads,
        GROUP=group, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=16, SINK_LOGITS=sink_logits is not None, num_warps=4,
    )  # fmt: skip
    return output


@_decode.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape)


def by_warps(sample: torch.Tensor, packed: bool) -> bool:
    """Whether a single warp is a program: over codes, on NVIDIA's tensor cores. sample: of the ring's device, dtype and head_dim."""
    fits = packed and sample.dtype in (torch.float16, torch.bfloat16) and sample.shape[-1] in WARP_DIMS
    capability = nvidia_capability(sample)
    return fits and HAS_GLUON and capability is not None and capability >= (8, 0)


def tile_slots(ring: RingLayer) -> int:
    """Slots per tile, which a program reads at once."""
    sample = ring.sample
    if by_warps(sample, isinstance(ring, PackedRing)):
        return slots_of_warp(sample.shape[-1])
    size = 4 if sample.dtype == torch.float32 else 2 if ring.most_bits == UNTOUCHED else 1
    return tile_of(sample, size)


def slots_of_warp(head_dim: int) -> int:
    """Slots per tile of codes that a warp reads."""
    return min(32, 4096 // head_dim)


def tile_of(sample: torch.Tensor, itemsize: int) -> int:
    """Slots per tile of vectors of numbers of so many bytes, or of codes. sample: of their device and head_dim."""
    width = triton.next_power_of_2(sample.shape[-1])
    if wave_lanes(sample) == 32:
        # A tile lies in registers, where codes take as much as numbers of 16 bits.
        return max(16, min(32, 8192 // (width * max(itemsize, 2))))
    return max(16, min(128, 16384 // (width * itemsize)))


def programs_for(ring: RingLayer, tiles: int, cores: int) -> int:
    """How many programs read `tiles` tiles on a GPU of `cores` streaming multiprocessors."""
    if by_warps(ring.sample, isinstance(ring, PackedRing)):
        # As many as run at once: one more would run alone, after all others.
        at_once = 4 * (REGISTERS // (32 * warp_registers(ring.sample.shape[-1], ring.most_bits)))
        return min(max(tiles // TILES_PER_WARP, cores), at_once * cores)
    return min(max(tiles // TILES_PER_PROGRAM, cores), PROGRAMS_PER_CORE * cores)


def warp_registers(head_dim: int, bits: int) -> int:
    """Registers of a thread: fewer let more warps run at once, more let a warp have more on its way. bits: the most that a head stores."""
    return 255 if head_dim >= 128 and head_dim * bits >= 1024 else 168


def warps(sample: torch.Tensor) -> int:
    """Warps of a program over numbers, or over codes where it has several."""
    return 8 if wave_lanes(sample) == 32 else 4


def stages(sample: torch.Tensor, tile: int, bits: int) -> int:
    """Tiles of `tile` keys, and of as many values, that are loaded or read at a time: all but the one that is read lie in shared memory.

    bits: as in `tile_slots`, which makes tiles of codes larger.
    """
    if sample.dtype == torch.float32 or wave_lanes(sample) == 32:
        return 1
    tiles = 2 * tile * triton.next_power_of_2(sample.shape[-1]) * (sample.itemsize if bits == UNTOUCHED else 1)
    return max(1, min(3 if bits == UNTOUCHED else 2, 1 + room_for_tiles(sample) // tiles))
