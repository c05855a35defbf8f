"""`mixed_windows` in Triton for sampled windows: forward with one window per head, backward with the slopes of all windows.

Slope is short for derivative. Windows are whole blocks of 64 tokens, and a block is PARTS tiles of TILE tokens, so a tile is visible or
hidden as a whole, except where the model's own mask cuts through it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from moa_lab.kernels.devices import nvidia_capability, precision, room_for_tiles, wave_lanes
from moa_lab.kernels.mixture import BLOCK
from moa_lab.kernels.prefill import HOPPER, NO_REACH


@triton.jit
def tile_of_rows(
    base, tile, n_tokens,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, (TILE, PADDED_DIM); zeros past the end."""
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    return tl.load(base + rows[:, None] * HEAD_DIM + dims[None, :], mask=(rows[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def scores_of_tile(
    query, key, query_tile, key_tile, n_tokens, reach, scale, softcap,
    TILE: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, minus infinity where the model itself hides the key."""
    rows = query_tile * TILE + tl.arange(0, TILE)
    columns = key_tile * TILE + tl.arange(0, TILE)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if CAPPED:
        # tanh via sigmoid.
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    back = rows[:, None] - columns[None, :]
    return tl.where((back >= 0) & (back < reach) & (columns[None, :] < n_tokens), scores, float("-inf"))


@triton.jit
def _forward_kernel(
    query, key, value, counts, sink_logits, output, normaliser, n_tokens, sink_blocks, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tile // PARTS
    size = tl.cast(n_tokens, tl.int64) * HEAD_DIM
    asked = tile_of_rows(query + head * size, tile, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    key += head // GROUP * size
    value += head // GROUP * size
    first = tl.maximum(block + 1 - tl.load(counts + head // GROUP), 0) * PARTS
    sinks = tl.minimum(sink_blocks * PARTS, first)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    if SINK_LOGITS:
        # The sink logit is a key of this score and value 0 that every query sees.
        highest = tl.zeros((TILE,), tl.float32) + tl.load(sink_logits + head)
        total += 1.0
    found = tl.zeros((TILE, PADDED_DIM), tl.float32)
    for index in range(0, sinks + tile + 1 - first):
        near = tl.where(index < sinks, index, first + index - sinks)
        known = tile_of_rows(key, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        scores = scores_of_tile(asked, known, tile, near, n_tokens, reach, scale, softcap, TILE, CAPPED, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(highest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tile_of_rows(value, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        found = found * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        highest = higher
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    real = (rows[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM)
    # Rows past the end may see nothing.
    total = tl.maximum(total, 1e-30)
    tl.store(
        output + head * size + rows[:, None] * HEAD_DIM + dims[None, :], (found / total[:, None]).to(output.dtype.element_ty), mask=real
    )
    tl.store(normaliser + head * n_tokens + rows, highest + tl.log(total), mask=rows < n_tokens)


@triton.jit
def _rows_kernel(
    query, key, value, slope, counts, sink_logits, normaliser, expected, query_slope, window_slope, n_tokens, n_blocks, sink_blocks, reach,
    scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Slopes of a tile of queries; and slope . output, summed over these queries, for a window of 1, 2, .. blocks.

    After the sink the tiles of keys come nearest first: what has been added up after each block is a window's softmax.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tile // PARTS
    size = tl.cast(n_tokens, tl.int64) * HEAD_DIM
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    asked = tile_of_rows(query + head * size, tile, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    # Rows past the end have no slope, and add nothing.
    wanted = tile_of_rows(slope + head * size, tile, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    key += head // GROUP * size
    value += head // GROUP * size
    held = tl.load(normaliser + head * n_tokens + rows, mask=rows < n_tokens, other=0.0)
    mean = tl.load(expected + head * n_tokens + rows, mask=rows < n_tokens, other=0.0)
    first = tl.maximum(block + 1 - tl.load(counts + head // GROUP), 0) * PARTS
    sinks = tl.minimum(sink_blocks * PARTS, tile + 1)
    gathered = tl.zeros((TILE, PADDED_DIM), tl.float32)
    highest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    gained = tl.zeros((TILE,), tl.float32)
    if SINK_LOGITS:
        highest = tl.zeros((TILE,), tl.float32) + tl.load(sink_logits + head)
        total += 1.0
    window_slope += (tl.cast(head, tl.int64) * n_blocks * PARTS + tile) * n_blocks
    for index in range(0, tile + 1):
        near = tl.where(index < sinks, index, tile + sinks - index)
        known = tile_of_rows(key, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        values = tile_of_rows(value, near, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        scores = scores_of_tile(asked, known, tile, near, n_tokens, reach, scale, softcap, TILE, CAPPED, PRECISION)
        gain = tl.dot(wanted, tl.trans(values), input_precision=PRECISION)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(highest - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        gained = gained * shrink + tl.sum(weights * gain, axis=1)
        highest = higher
        closes = (index >= sinks) & (near % PARTS == 0)
        tl.store(window_slope + block - near // PARTS, tl.sum(gained / tl.maximum(total, 1e-30)), mask=closes)
        if (near >= first) | (near < sink_blocks * PARTS):
            change = tl.exp(scores - held[:, None]) * (gain - mean[:, None]) * scale
            if CAPPED:
                capped = tl.where(scores == float("-inf"), 0.0, scores) / softcap
                change *= 1.0 - capped * capped
            gathered += tl.dot(change.to(known.dtype), known, input_precision=PRECISION)
    # Longer windows see no more.
    whole = tl.sum(gained / tl.maximum(total, 1e-30))
    for start in range(block + 1 - tl.minimum(sink_blocks, block + 1), n_blocks, TILE):
        longer = start + tl.arange(0, TILE)
        tl.store(window_slope + longer, tl.zeros((TILE,), tl.float32) + whole, mask=longer < n_blocks)
    real = (rows[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM)
    places = head * size + rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(query_slope + places, gathered.to(query_slope.dtype.element_ty), mask=real)


@triton.jit
def columns_kernel(
    query, key, value, slope, counts, normaliser, expected, key_slope, value_slope, n_tokens, n_blocks, sink_blocks, reach, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Slopes of keys and values, for each query head separately."""
    tile, head = tl.program_id(0), tl.program_id(1)
    block = tile // PARTS
    size = tl.cast(n_tokens, tl.int64) * HEAD_DIM
    known = tile_of_rows(key + head // GROUP * size, tile, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    values = tile_of_rows(value + head // GROUP * size, tile, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
    query += head * size
    slope += head * size
    last = tl.where(block < sink_blocks, n_blocks, tl.minimum(block + tl.load(counts + head // GROUP), n_blocks)) * PARTS
    keys = tl.zeros((TILE, PADDED_DIM), tl.float32)
    answers = tl.zeros((TILE, PADDED_DIM), tl.float32)
    for at in range(tile, last):
        rows = at * TILE + tl.arange(0, TILE)
        asked = tile_of_rows(query, at, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        wanted = tile_of_rows(slope, at, n_tokens, HEAD_DIM, PADDED_DIM, TILE)
        held = tl.load(normaliser + head * n_tokens + rows, mask=rows < n_tokens, other=float("inf"))
        mean = tl.load(expected + head * n_tokens + rows, mask=rows < n_tokens, other=0.0)
        scores = scores_of_tile(asked, known, at, tile, n_tokens, reach, scale, softcap, TILE, CAPPED, PRECISION)
        weights = tl.exp(scores - held[:, None])
        answers += tl.dot(tl.trans(weights).to(wanted.dtype), wanted, input_precision=PRECISION)
        change = weights * (tl.dot(wanted, tl.trans(values), input_precision=PRECISION) - mean[:, None]) * scale
        if CAPPED:
            capped = tl.where(scores == float("-inf"), 0.0, scores) / softcap
            change *= 1.0 - capped * capped
        keys += tl.dot(tl.trans(change).to(asked.dtype), asked, input_precision=PRECISION)
    rows = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED_DIM)
    real = (rows[:, None] < n_tokens) & (dims[None, :] < HEAD_DIM)
    places = head * size + rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(key_slope + places, keys.to(key_slope.dtype.element_ty), mask=real)
    tl.store(value_slope + places, answers.to(value_slope.dtype.element_ty), mask=real)


def drawn_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shift: torch.Tensor,
    counts: torch.Tensor,
    sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    reach: int | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """`mixed_windows` whose weights are 1 for the last `counts` blocks, int32 (batch, kv_heads), plus `shift`: as `query`.

    shift: (batch, kv_heads, blocks), all zeros; its slope says what each other window would have changed. query:
    (batch, query_heads, tokens, head_dim); key, value: (batch, kv_heads, tokens, head_dim), without padding. reach: the model's own
    window in tokens. sink_logits: (query_heads, 1, 1), as in `masked_attention`.
    """
    return _Drawn.apply(query, key, value, shift, counts, sink_tokens, scale, softcap, reach, sink_logits)


def holds_tiles(query: torch.Tensor) -> bool:
    """Whether the device's shared memory holds what the kernels keep there of heads as wide as these: four tiles on NVIDIA's chips, where
    operands of a product lie in shared memory."""
    return nvidia_capability(query) is None or room_for_tiles(query) >= 4 * tiles_of(query)[0] * query.shape[-1] * query.itemsize


def tiles_of(query: torch.Tensor) -> tuple[int, int, int]:
    """Rows of a tile, which divide BLOCK; warps; stages."""
    padded_dim, wave = triton.next_power_of_2(query.shape[-1]), wave_lanes(query)
    if wave == 32:
        return (32 if padded_dim <= 64 else 16), 8, 1
    if wave is not None:
        # Four waves of 64 lanes have all registers there are, eight have half of them each.
        rows = BLOCK if padded_dim <= 128 else 32
        return rows, 4, (2 if room_for_tiles(query) >= 4 * rows * padded_dim * query.itemsize else 1)
    # Of wide heads, chips before Hopper keep too much in registers, and those after it in shared memory.
    wide = padded_dim > 128 and query.itemsize == 2 and (nvidia_capability(query) or HOPPER)[0] != HOPPER[0]
    return (32 if wide else BLOCK), (4 if padded_dim <= 64 else 8), 2


def launched_with(query: torch.Tensor, key: torch.Tensor, softcap: float | None) -> dict[str, Any]:
    """Settings of a launch that all kernels here have in common."""
    head_dim, (tile, warps, stages) = query.shape[-1], tiles_of(query)
    return {
        "GROUP": query.shape[1] // key.shape[1], "HEAD_DIM": head_dim, "PADDED_DIM": max(triton.next_power_of_2(head_dim), 16),
        "TILE": tile, "PARTS": BLOCK // tile, "CAPPED": softcap is not None, "PRECISION": precision(query),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shift: torch.Tensor, counts: torch.Tensor,
        sink_tokens: int, scale: float, softcap: float | None, reach: int | None, sink_logits: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        batch, heads, n_tokens, _ = query.shape
        output = torch.empty_like(query)
        normaliser = query.new_empty(batch, heads, n_tokens, dtype=torch.float32)
        settings = launched_with(query, key, softcap)
        numbers = (-(-sink_tokens // BLOCK), reach or NO_REACH, scale, softcap or 1.0)
        grid = (shift.shape[-1] * settings["PARTS"], batch * heads)
        counts = counts.to(query.device, torch.int32).contiguous()
        # One per row and head, in the order of the grid.
        logits = None if sink_logits is None else sink_logits.float().flatten().repeat(batch)
        _forward_kernel[grid](
            query, key, value, counts, normaliser if logits is None else logits, output, normaliser, n_tokens, *numbers,
            SINK_LOGITS=logits is not None, **settings,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, counts, output, normaliser, logits)
        ctx.grid, ctx.numbers, ctx.settings = grid, numbers, settings
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, counts, output, normaliser, logits = ctx.saved_tensors
        slope = slopes[0].contiguous()
        batch, heads, n_tokens, _ = query.shape
        tiles, group = ctx.grid[0], ctx.settings["GROUP"]
        blocks = tiles // ctx.settings["PARTS"]
        expected = (slope.float() * output.float()).sum(dim=-1)
        query_slope, key_slope, value_slope = (torch.empty_like(query) for _ in range(3))
        window_slope = normaliser.new_empty(batch, heads, tiles, blocks)
        known, told, numbers = (query, key, value, slope, counts), (normaliser, expected), (n_tokens, blocks, *ctx.numbers)
        _rows_kernel[ctx.grid](
            *known, normaliser if logits is None else logits, *told, query_slope, window_slope, *numbers,
            SINK_LOGITS=logits is not None, **ctx.settings,
        )  # fmt: skip
        columns_kernel[ctx.grid](*known, *told, key_slope, value_slope, *numbers, **ctx.settings)
        per_group = (batch, heads // group, group)
        key_slope, value_slope = (x.unflatten(1, per_group[1:]).sum(dim=2) for x in (key_slope, value_slope))
        found = window_slope.sum(dim=2).unflatten(1, per_group[1:]).sum(dim=2)
        return query_slope, key_slope, value_slope, found, None, None, None, None, None, None
