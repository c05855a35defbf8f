"""Decode over stored codes by single warps, in Gluon: codes go from memory to tensor cores without leaving their registers.

Scores are computed as S^T = K Q^T and the output as O^T = V^T P^T, so that keys and values are the first operand of `mma`, whose rows are
16 slots or 16 dims. Which dim a row or a column of an operand stands for is free, as long as both operands agree: here a thread's part is
what a load of 16 bytes brings it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moa_lab.kernels import codes as _codes

CODES = _codes.CODES
LEAST = gl.constexpr(1e-30)
SHARE = gl.constexpr(16.0)
"""Of four numbers in 4 bits the last two are left where they lie in their byte: 16 times what they are."""


@gluon.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@gluon.constexpr_function
def key_run(head_dim, bits):
    """Neighbouring dims of a key that one thread loads at once."""
    return min(128 // bits, head_dim // 4)


@gluon.constexpr_function
def value_run(head_dim, bits):
    """Neighbouring dims of a value that one thread loads at once."""
    return min(128 // bits, head_dim // 8)


@gluon.constexpr_function
def _loaded(slots, width, run, lanes):
    """Layout (slots, width) of words or numbers as loaded: `run` neighbours a thread, `lanes` threads a slot (4: keys, 8: values)."""
    inner = [[0, 2**i] for i in range(_log2(run))]
    across = [[0, run * 2**i] for i in range(_log2(lanes))]
    chunks = [[0, run * lanes * 2**i] for i in range(_log2(width // (run * lanes)))]
    own = [[2**i, 0] for i in ((0, 1, 2) if lanes == 4 else (1, 2))]
    outer = [[2**i, 0] for i in range(_log2(slots)) if [2**i, 0] not in own]
    lane = across + own if lanes == 4 else own + across
    return gl.DistributedLinearLayout(inner + chunks + outer, lane, [], [], [slots, width])


@gluon.constexpr_function
def _paired(slots, width, run):
    """Layout (slots / 2, width, 2) of values' words as loaded: first the words of two slots."""
    loaded = _loaded(slots, width, run, 8)
    bases = [[[slot // 2, at, slot % 2] for slot, at in bases] for bases in (loaded.reg_bases, loaded.lane_bases)]
    return gl.DistributedLinearLayout(sorted(bases[0], key=lambda basis: -basis[2]), bases[1], [], [], [slots // 2, width, 2])


@gluon.jit
def _read(base, slots_from, high, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, IS_KEY: gl.constexpr):
    """Words, or numbers of 16 bits, of a tile as they lie."""
    NUMBERS: gl.constexpr = 1 if BITS == 16 else 32 // BITS
    WIDTH: gl.constexpr = HEAD_DIM // NUMBERS
    LANES: gl.constexpr = 4 if IS_KEY else 8
    RUN: gl.constexpr = (key_run(HEAD_DIM, BITS) if IS_KEY else value_run(HEAD_DIM, BITS)) // NUMBERS
    LAYOUT: gl.constexpr = _loaded(TILE, WIDTH, RUN, LANES)
    slots = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    at = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    places = base + slots_from * WIDTH + (slots[:, None] * WIDTH + at[None, :])
    held = (slots < high - slots_from)[:, None]
    # Codes are finite whatever they are; beyond `high` they count nothing.
    return gl.load(places, mask=held) if BITS < 16 else gl.load(places, mask=held, other=0)


@gluon.jit
def _halves(asm: gl.constexpr, found):
    """float16: one instruction on both numbers of a last dimension of two, whose results share 32 bits."""
    INPUTS: gl.constexpr = "=r,r,r" if found.dtype == gl.int32 else "=r,r"
    return gl.inline_asm_elementwise(asm, INPUTS, [found], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _bytes(asm: gl.constexpr, words):
    """int16, as `_halves` of words."""
    return gl.inline_asm_elementwise(asm, "=r,r,r", [words], dtype=gl.int16, is_pure=True, pack=2)


@gluon.jit
def _key_codes(words, BITS: gl.constexpr):
    """Codes of words (n, m): float16 (n, m * 32 / BITS), 2^-24 of each, times `SHARE` where the dim's bit 1 is set and BITS is 4."""
    both = gl.join(words, words)
    if BITS == 8:
        found = gl.join(
            _halves("and.b32 $0, $1, 0x00FF00FF;", both), _halves("prmt.b32 $0, $1, 0, 0x4341;", both)
        ).permute(0, 1, 3, 2)  # fmt: skip
    else:
        high = gl.join(words >> 8, words >> 8)
        low = gl.join(_halves("and.b32 $0, $1, 0x000F000F;", both), _halves("and.b32 $0, $1, 0x00F000F0;", both))
        high = gl.join(_halves("and.b32 $0, $1, 0x000F000F;", high), _halves("and.b32 $0, $1, 0x00F000F0;", high))
        # Number, of word: last, third and second bit of its place.
        found = gl.join(low, high).permute(0, 1, 4, 3, 2)
    return found.reshape(words.shape[0], words.shape[1] * (32 // BITS))


@gluon.jit
def _value_codes(words, RUN: gl.constexpr, BITS: gl.constexpr):
    """Codes of words (n, m) as `_key_codes`, (m * 32 / BITS, n): two slots' codes share 32 bits."""
    SLOTS: gl.constexpr = words.shape[0]
    LAYOUT: gl.constexpr = _paired(SLOTS, words.shape[1], RUN * BITS // 32)
    pairs = gl.convert_layout(words.reshape(SLOTS // 2, 2, words.shape[1]).permute(0, 2, 1), LAYOUT, assert_trivial=True)
    if BITS == 8:
        # Bytes 0 and 1, 2 and 3 of both words: numbers 0 and 2, 1 and 3.
        first = _bytes("prmt.b32 $0, $1, $2, 0x5140;", pairs)
        second = _bytes("prmt.b32 $0, $1, $2, 0x7362;", pairs)
        low = gl.join(_halves("prmt.b32 $0, $1, 0, 0x4140;", first), _halves("prmt.b32 $0, $1, 0, 0x4140;", second))
        high = gl.join(_halves("prmt.b32 $0, $1, 0, 0x4342;", first), _halves("prmt.b32 $0, $1, 0, 0x4342;", second))
        found = gl.join(low, high).permute(1, 4, 3, 0, 2)
    else:
        first = _bytes("prmt.b32 $0, $1, $2, 0x5410;", pairs)
        second = _bytes("prmt.b32 $0, $1, $2, 0x7632;", pairs)
        found = gl.join(_quarters(first), _quarters(second)).permute(1, 4, 3, 5, 0, 2)
    return found.reshape(words.shape[1] * (32 // BITS), SLOTS)


@gluon.jit
def _quarters(pairs):
    """The four numbers in each 16 bits of pairs (n, m, 2): (n, m, 2, 2, 2)."""
    low = gl.join(_halves("and.b32 $0, $1, 0x000F000F;", pairs), _halves("and.b32 $0, $1, 0x00F000F0;", pairs))
    high = gl.join(
        _halves("{.reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000F000F;}", pairs),
        _halves("{.reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00F000F0;}", pairs),
    )  # fmt: skip
    return gl.join(low, high)


@gluon.jit
def _key_operand(found, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Keys (TILE, HEAD_DIM) as the first operand, its columns in the order of `_key_dims`."""
    RUN: gl.constexpr = key_run(HEAD_DIM, BITS)
    if BITS < 16:
        found = _key_codes(found, BITS)
    apart = found.reshape(TILE, HEAD_DIM // (4 * RUN), 4, RUN // 2, 2).permute(0, 1, 3, 2, 4).reshape(TILE, HEAD_DIM)
    return gl.convert_layout(apart, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def _key_dims(column, HEAD_DIM: gl.constexpr, BITS: gl.constexpr):
    """The dim that a column of `_key_operand` stands for."""
    RUN: gl.constexpr = key_run(HEAD_DIM, BITS)
    rest = column // 8
    return rest // (RUN // 2) * (4 * RUN) + column // 2 % 4 * RUN + rest % (RUN // 2) * 2 + column % 2


@gluon.jit
def _value_operand(found, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Values (HEAD_DIM, TILE) as the first operand, its rows in the order of `_value_dims`."""
    RUN: gl.constexpr = value_run(HEAD_DIM, BITS)
    if BITS < 16:
        found = _value_codes(found, RUN, BITS)
    else:
        found = found.permute(1, 0)
    apart = found.reshape(HEAD_DIM // (8 * RUN), 8, RUN, TILE).permute(0, 2, 1, 3).reshape(HEAD_DIM, TILE)
    return gl.convert_layout(apart, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def _value_dims(row, HEAD_DIM: gl.constexpr, BITS: gl.constexpr):
    """The dim that a row of `_value_operand` stands for."""
    RUN: gl.constexpr = value_run(HEAD_DIM, BITS)
    rest = row // 8
    return rest // RUN * (8 * RUN) + row % 8 * RUN + rest % RUN


@gluon.jit
def _grid(grids, slots, held):
    """The smallest value and the step of every slot's grid: float32 (TILE,)."""
    both = gl.load(grids + slots, mask=held, other=0)
    smallest = both.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return smallest, (both >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _attend(
    query, key, key_grids, value, value_grids, low, high, length, sink, ring, window, part_output, part_max, part_sum,
    query_head, sink_tokens, reach, scale, softcap,
    GROUP: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, TILE: gl.constexpr,
    CAPPED: gl.constexpr, REACHES: gl.constexpr, KEY_BITS: gl.constexpr, VALUE_BITS: gl.constexpr,
):  # fmt: skip
    """As `decode_kernel._attend`, with scores (TILE, ROWS) and output (HEAD_DIM, ROWS)."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    SECOND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    SLOT: gl.constexpr = gl.SliceLayout(1, MMA)
    dims = _key_dims(gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(1, SECOND)), HEAD_DIM, KEY_BITS)
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
        shifted = asked_sum * factor
    scores_max = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW)
    scores_sum = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
    output = gl.full([HEAD_DIM, ROWS], 0.0, gl.float32, layout=MMA)
    none = gl.full([TILE, ROWS], 0.0, gl.float32, layout=MMA)
    if VALUE_BITS < 16:
        shift = gl.full([ROWS], 0.0, gl.float32, layout=ROW)
        # The greatest weight times step: what output is a multiple of, so that float16 holds its weights.
        unit = gl.full([ROWS], LEAST, gl.float32, layout=ROW)
    keys = _read(key, low, high, HEAD_DIM, TILE, KEY_BITS, True)
    values = _read(value, low, high, HEAD_DIM, TILE, VALUE_BITS, False)
    for at in range(low, high, TILE):
        slots = at + gl.arange(0, TILE, layout=SLOT)
        held = slots < high
        if KEY_BITS < 16:
            smallest, step = _grid(key_grids, slots, held)
        if VALUE_BITS < 16:
            value_smallest, value_step = _grid(value_grids, slots, held)
        scores = mma_v2(_key_operand(keys, HEAD_DIM, TILE, KEY_BITS, MMA), asked, none)
        # The next tile is on its way while this one is computed.
        keys = _read(key, at + TILE, high, HEAD_DIM, TILE, KEY_BITS, True)
        if KEY_BITS == 16:
            scores = scores * (scale * BASE)
        else:
            scores = scores * (step * CODES)[:, None] * factor[None, :] + smallest[:, None] * shifted[None, :]
        if CAPPED:
            # tanh.
            scores = softcap * 1.4426950408889634 * (2.0 / (1.0 + gl.exp2(scores * (-2.0 * 1.4426950408889634 / softcap))) - 1.0)
        if REACHES:
            turns = gl.where(slots < sink, 0, (length - 1 - slots) // ring)
            back = length - 1 - slots - turns * ring
            held = held & (back < reach) & ((back < window) | (length - 1 - back < sink_tokens))
        scores = gl.where(held[:, None], scores, float("-inf"))
        new_max = gl.maximum(scores_max, gl.max(scores, axis=0))
        # If the whole tile is hidden, there is no maximum to subtract.
        safe_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        weights = gl.exp2(scores - safe_max[None, :])
        shrink = gl.exp2(scores_max - safe_max)
        scores_sum = scores_sum * shrink + gl.sum(weights, axis=0)
        scores_max = new_max
        if VALUE_BITS < 16:
            shift = shift * shrink + gl.sum(weights * value_smallest[:, None], axis=0)
            weights = weights * value_step[:, None]
            greatest = gl.maximum(gl.maximum(unit * shrink, LEAST), gl.max(weights, axis=0))
            shrink = unit * shrink / greatest
            weights = (weights * (1.0 / greatest)[None, :]).to(gl.float16)
            unit = greatest
            near = _value_operand(values, HEAD_DIM, TILE, VALUE_BITS, MMA)
            output = mma_v2(near, gl.convert_layout(weights, SECOND), output * shrink[None, :])
        else:
            near = _value_operand(values, HEAD_DIM, TILE, VALUE_BITS, MMA)
            output = mma_v2(near, gl.convert_layout(weights.to(near.dtype), SECOND), output * shrink[None, :])
        values = _read(value, at + TILE, high, HEAD_DIM, TILE, VALUE_BITS, False)
    found = _value_dims(gl.arange(0, HEAD_DIM, layout=SLOT), HEAD_DIM, VALUE_BITS)
    if VALUE_BITS < 16:
        factors = gl.where(found // 2 % 2 == 1, 1.0 / SHARE, 1.0) if VALUE_BITS == 4 else gl.full([HEAD_DIM], 1.0, gl.float32, layout=SLOT)
        output = output * factors[:, None] * (unit * CODES)[None, :] + shift[None, :]
    gl.store(part_max + rows, scores_max, mask=rows < GROUP)
    gl.store(part_sum + rows, scores_sum, mask=rows < GROUP)
    gl.store(part_output + rows[None, :] * HEAD_DIM + found[:, None], output, mask=(rows < GROUP)[None, :])


@gluon.jit
def _first(numbers, codes, side, HEAD_DIM: gl.constexpr, ALIGNED: gl.constexpr, BITS: gl.constexpr):
    """The first vector of a head's K or V, in the buffer of its kind."""
    if BITS == 16:
        found = numbers + gl.multiple_of(gl.load(side + 1), HEAD_DIM)
    else:
        found = codes + gl.multiple_of(gl.load(side + 1), ALIGNED)
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
        place = segment.to(gl.int64) * GROUP
        side = sides + head * 6
        number = numbers + batch * numbers_batch
        words = codes + batch * codes_batch
        grid = grids + batch * grids_batch
        for pair in gl.static_range(len(PAIRS)):
            if (gl.load(side) == PAIRS[pair][0]) & (gl.load(side + 3) == PAIRS[pair][1]):
                _attend(
                    asking, _first(number, words, side, HEAD_DIM, ALIGNED, PAIRS[pair][0]), grid + gl.load(side + 2),
                    _first(number, words, side + 3, HEAD_DIM, ALIGNED, PAIRS[pair][1]), grid + gl.load(side + 5),
                    low, high, length, sink, ring, window,
                    part_output + place * HEAD_DIM, part_max + place, part_sum + place, query_head, sink_tokens, reach, scale, softcap,
                    GROUP, ROWS, HEAD_DIM, TILE, CAPPED, REACHES, PAIRS[pair][0], PAIRS[pair][1],
                )  # fmt: skip
