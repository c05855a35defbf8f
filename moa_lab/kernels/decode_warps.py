"""Decode over stored codes by single warps, in Gluon: a program is a warp, and codes go from memory to tensor cores.

Scores are computed as S^T = K Q^T and the output as O^T = V^T P^T, so that keys and values are the first operand of `mma`, whose rows are
16 slots or 16 dims (see `moa_lab.kernels.operands`), and the few query heads of a group its 8 columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moa_lab.kernels.codes import CODES
from moa_lab.kernels.decode_kernel import pages_of
from moa_lab.kernels.operands import SHARE, key_dims, key_operand, loaded_tile, value_dims, value_operand

LEAST = gl.constexpr(2.0**-24)
"""The least step that a grid has, beside none."""


@gluon.jit
def _size(numbers):
    """Logarithms to base 2, roughly: of what needs no more."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [numbers], dtype=gl.float32, is_pure=True, pack=1)


@gluon.constexpr_function
def _strands(rows):
    """Layout (8, rows) of what each thread sums over its own slots."""
    return gl.DistributedLinearLayout(
        [[0, 1]] + [[0, 2**i] for i in range(3, (rows.bit_length() - 1))], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, rows]
    )  # fmt: skip


@gluon.jit
def _own_sum(numbers, LAYOUT: gl.constexpr):
    """Sums of numbers (slots, rows) over every thread's own slots: (8, rows)."""
    apart = numbers.reshape(numbers.shape[0] // 8, 8, numbers.shape[1])
    return gl.convert_layout(gl.sum(apart, axis=0), LAYOUT, assert_trivial=True)


@gluon.jit
def _grid(both):
    """The smallest value and the step of every slot's grid: float32 (TILE,)."""
    smallest = both.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return smallest, (both >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _moved(base, page, at, WIDTH: gl.constexpr, PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr):
    """`base`, of the first page, moved so that a head's slots from `at` on, of WIDTH elements each, lie as if all of them followed it."""
    if PAGE > 0:
        base += page * (PAGE_BYTES // (base.dtype.element_ty.primitive_bitwidth // 8)) - at // PAGE * PAGE * WIDTH
    return base


@gluon.jit
def attend(
    query, key, key_grids, value, value_grids, low, high, length, sink, ring, window, part_output, part_max, part_sum,
    query_head, sink_tokens, reach, scale, softcap, pages, steps, rank,
    GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr,
    CAPPED: gl.constexpr, REACHES: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
    PAGE: gl.constexpr, PAGE_BYTES: gl.constexpr,
):  # fmt: skip
    """As `decode_kernel.attend`, with scores (TILE, ROWS) and output (HEAD_DIM, ROWS)."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    SLOT: gl.constexpr = gl.SliceLayout(1, MMA)
    OWN: gl.constexpr = _strands(ROWS)
    KEY_WIDTH: gl.constexpr = HEAD_DIM if KEY_BITS == 16 else HEAD_DIM * KEY_BITS // 32
    VALUE_WIDTH: gl.constexpr = HEAD_DIM if VALUE_BITS == 16 else HEAD_DIM * VALUE_BITS // 32
    page = gl.to_tensor(0).to(gl.int64)
    if PAGE > 0:
        page = pages_of(pages, steps, rank, low, low < high, PAGE)
    # The first tile is on its way while the query is laid out.
    keys = loaded_tile(_moved(key, page, low, KEY_WIDTH, PAGE, PAGE_BYTES), low, high, HEAD_DIM, TILE, KEY_BITS, True)
    values = loaded_tile(_moved(value, page, low, VALUE_WIDTH, PAGE, PAGE_BYTES), low, high, HEAD_DIM, TILE, VALUE_BITS, False)
    slots = low + gl.arange(0, TILE, layout=SLOT)
    if KEY_BITS < 16:
        key_grid = gl.load(_moved(key_grids, page, low, 1, PAGE, PAGE_BYTES) + slots, mask=slots < high, other=0)
    if VALUE_BITS < 16:
        value_grid = gl.load(_moved(value_grids, page, low, 1, PAGE, PAGE_BYTES) + slots, mask=slots < high, other=0)
    if PAGE > 0:
        page = pages_of(pages, steps, rank, low + TILE, low + TILE < high, PAGE)
    dims = key_dims(gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, SECOND)), HEAD_DIM, KEY_BITS)
    asking = gl.arange(0, ROWS, layout=gl.SliceLayout(0, SECOND))
    # Scores are in base 2, but for those that are capped first.
    BASE: gl.constexpr = 1.0 if CAPPED else 1.4426950408889634
    asked = gl.load(query + asking[None, :].to(gl.int64) * query_head + dims[:, None], mask=(asking < GROUP)[None, :], other=0.0)
    rows = gl.arange(0, ROWS, layout=ROW)
    if KEY_BITS < 16:
        # Scaled to what float16 holds: queries may be bfloat16.
        exact = asked.to(gl.float32)
        largest = gl.max(gl.abs(exact), axis=0)
        exact = exact / gl.where(largest == 0.0, 1.0, largest)[None, :]
        asked_sum = gl.convert_layout(gl.sum(exact.to(gl.float16).to(gl.float32), axis=0), ROW)
        if KEY_BITS == 4:
            exact = gl.where(dims // 2 % 2 == 1, 1.0 / SHARE, 1.0)[:, None] * exact
        asked = exact.to(gl.float16)
        factor = gl.convert_layout(largest, ROW) * (scale * BASE)
    scores_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    scores_sum = gl.full([8, ROWS], 0.0, gl.float32, layout=OWN)
    output = gl.full([HEAD_DIM, ROWS], 0.0, gl.float32, layout=MMA)
    none = gl.full([TILE, ROWS], 0.0, gl.float32, layout=MMA)
    if VALUE_BITS < 16:
        shift = gl.full([8, ROWS], 0.0, gl.float32, layout=OWN)
    for at in range(low, high, TILE):
        held = slots < high
        # The next tile is on its way while this one is computed, and the page of the one behind it.
        after = slots + TILE
        here = page
        if PAGE > 0:
            page = pages_of(pages, steps, rank, at + 2 * TILE, at + 2 * TILE < high, PAGE)
        if KEY_BITS < 16:
            smallest, step = _grid(key_grid)
            key_grid = gl.load(_moved(key_grids, here, at + TILE, 1, PAGE, PAGE_BYTES) + after, mask=after < high, other=0)
        if VALUE_BITS < 16:
            value_smallest, value_step = _grid(value_grid)
            value_grid = gl.load(_moved(value_grids, here, at + TILE, 1, PAGE, PAGE_BYTES) + after, mask=after < high, other=0)
        scores = mma_v2(key_operand(keys, HEAD_DIM, TILE, KEY_BITS, MMA), asked, none)
        keys = loaded_tile(
            _moved(key, here, at + TILE, KEY_WIDTH, PAGE, PAGE_BYTES), at + TILE, high, HEAD_DIM, TILE, KEY_BITS, True
        )  # fmt: skip
        if KEY_BITS == 16:
            scores = scores * (scale * BASE)
        else:
            scores = (scores * (step * CODES)[:, None] + smallest[:, None] * asked_sum[None, :]) * factor[None, :]
        if CAPPED:
            # tanh.
            scores = softcap * 1.4426950408889634 * (2.0 / (1.0 + gl.exp2(scores * (-2.0 * 1.4426950408889634 / softcap))) - 1.0)
        if REACHES:
            turns = gl.where(slots < sink, 0, (length - 1 - slots) // ring)
            back = length - 1 - slots - turns * ring
            held = held & (back < reach) & ((back < window) | (length - 1 - back < sink_tokens))
        scores = gl.where(held[:, None], scores, float("-inf"))
        if VALUE_BITS == 16:
            new_max = gl.maximum(scores_max, gl.max(scores, axis=0))
        else:
            # Of weight times step, so that float16 holds that.
            new_max = gl.maximum(scores_max, gl.max(scores + _size(gl.maximum(value_step, LEAST))[:, None], axis=0))
        # If the whole tile is hidden, there is no maximum to subtract.
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        weights = gl.exp2(scores - safe_max[None, :])
        shrink = gl.exp2(scores_max - safe_max)
        own_shrink = gl.convert_layout(shrink, gl.SliceLayout(0, OWN))[None, :]
        scores_sum = scores_sum * own_shrink + _own_sum(weights, OWN)
        scores_max = new_max
        if VALUE_BITS < 16:
            shift = shift * own_shrink + _own_sum(weights * value_smallest[:, None], OWN)
            weights = weights * value_step[:, None]
        near = value_operand(values, HEAD_DIM, TILE, VALUE_BITS, MMA)
        output = mma_v2(near, gl.convert_layout(weights.to(near.dtype), SECOND), output * shrink[None, :])
        values = loaded_tile(
            _moved(value, here, at + TILE, VALUE_WIDTH, PAGE, PAGE_BYTES), at + TILE, high, HEAD_DIM, TILE, VALUE_BITS, False
        )  # fmt: skip
        slots = after
    found = value_dims(gl.arange(0, HEAD_DIM, layout=SLOT), HEAD_DIM, VALUE_BITS)
    if VALUE_BITS < 16:
        factors = gl.where(found // 2 % 2 == 1, 1.0 / SHARE, 1.0) if VALUE_BITS == 4 else gl.full([HEAD_DIM], 1.0, gl.float32, layout=SLOT)
        output = output * (factors * CODES)[:, None] + gl.convert_layout(gl.sum(shift, axis=0), ROW)[None, :]
    gl.store(part_max + rows, scores_max, mask=rows < GROUP)
    gl.store(part_sum + rows, gl.convert_layout(gl.sum(scores_sum, axis=0), ROW), mask=rows < GROUP)
    gl.store(part_output + rows[None, :] * HEAD_DIM + found[:, None], output, mask=(rows < GROUP)[None, :])


@gluon.jit
def _first(numbers, codes, side, HEAD_DIM: gl.constexpr, ALIGNED: gl.constexpr, BITS: gl.constexpr):
    """The first vector of a head's K or V, in the buffer of its kind."""
    found = numbers + gl.multiple_of(gl.load(side + 1), HEAD_DIM) if BITS == 16 else codes + gl.multiple_of(gl.load(side + 1), ALIGNED)
    return found


@gluon.jit
def decode_warps_kernel(
    query, numbers, codes, grids, table, sides, lengths, segments, bounds, part_output, part_max, part_sum,
    query_batch, query_head, numbers_batch, codes_batch, grids_batch, sink_tokens, reach, scale, softcap,
    GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr,
    CAPPED: gl.constexpr, REACHES: gl.constexpr, PAIRS: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """As `decode_kernel`, over a ring that has codes."""
    program = gl.program_id(0)
    for segment in range(gl.load(bounds + program), gl.load(bounds + program + 1)):
        batch = gl.load(segments + segment * 4).to(gl.int64)
        head = gl.load(segments + segment * 4 + 1)
        low = gl.load(segments + segment * 4 + 2)
        length = gl.load(lengths + batch)
        high = gl.minimum(gl.load(segments + segment * 4 + 3), length)
        sink = gl.load(table + head * 4 + 1)
        ring = gl.load(table + head * 4 + 2)
        window = gl.load(table + head * 4 + 3)
        asking = query + batch * query_batch + head.to(gl.int64) * GROUP * query_head
        place = gl.cast(segment, gl.int64) * GROUP
        side = sides + head * 6
        number = numbers + batch * numbers_batch
        words = codes + batch * codes_batch
        grid = grids + batch * grids_batch
        for pair in gl.static_range(len(PAIRS)):
            if (gl.load(side) == PAIRS[pair][0]) & (gl.load(side + 3) == PAIRS[pair][1]):
                attend(
                    asking, _first(number, words, side, HEAD_DIM, ALIGNED, PAIRS[pair][0]), grid + gl.load(side + 2),
                    _first(number, words, side + 3, HEAD_DIM, ALIGNED, PAIRS[pair][1]), grid + gl.load(side + 5),
                    low, high, length, sink, ring, window,
                    part_output + place * HEAD_DIM, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap,
                    table, table, 0,
                    GROUP, ROWS, HEAD_DIM, TILE, CAPPED, REACHES, PAIRS[pair][0], PAIRS[pair][1], 0, 0,
                )  # fmt: skip
