"""Operands of matrix products from stored codes, in Gluon: how a warp loads a tile, and how its codes become fragments without leaving
their registers.

Which dim a row or a column of an operand stands for is free, as long as both operands agree: here a thread's part is what a load of 16
bytes brings it. As in `moa_lab.kernels.codes`, a code's bits are those of a float16, 2^-24 times the code.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def loaded_tile(base, slots_from, high, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, IS_KEY: gl.constexpr):
    """Words, or numbers of 16 bits, of a tile as they lie."""
    NUMBERS: gl.constexpr = 1 if BITS == 16 else 32 // BITS
    WIDTH: gl.constexpr = HEAD_DIM // NUMBERS
    RUN: gl.constexpr = (key_run(HEAD_DIM, BITS) if IS_KEY else value_run(HEAD_DIM, BITS)) // NUMBERS
    LAYOUT: gl.constexpr = _loaded(TILE, WIDTH, RUN, 4 if IS_KEY else 8)
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
def key_operand(found, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Keys (TILE, HEAD_DIM) as the first operand, its columns in the order of `key_dims`."""
    RUN: gl.constexpr = key_run(HEAD_DIM, BITS)
    if BITS < 16:
        found = _key_codes(found, BITS)
    apart = found.reshape(TILE, HEAD_DIM // (4 * RUN), 4, RUN // 2, 2).permute(0, 1, 3, 2, 4).reshape(TILE, HEAD_DIM)
    return gl.convert_layout(apart, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def key_dims(column, HEAD_DIM: gl.constexpr, BITS: gl.constexpr):
    """The dim that a column of `key_operand` stands for."""
    RUN: gl.constexpr = key_run(HEAD_DIM, BITS)
    rest = column // 8
    return rest // (RUN // 2) * (4 * RUN) + column // 2 % 4 * RUN + rest % (RUN // 2) * 2 + column % 2


@gluon.jit
def value_operand(found, HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Values (HEAD_DIM, TILE) as the first operand, its rows in the order of `value_dims`."""
    RUN: gl.constexpr = value_run(HEAD_DIM, BITS)
    found = _value_codes(found, RUN, BITS) if BITS < 16 else found.permute(1, 0)
    apart = found.reshape(HEAD_DIM // (8 * RUN), 8, RUN, TILE).permute(0, 2, 1, 3).reshape(HEAD_DIM, TILE)
    return gl.convert_layout(apart, gl.DotOperandLayout(0, LAYOUT, 2), assert_trivial=True)


@gluon.jit
def value_dims(row, HEAD_DIM: gl.constexpr, BITS: gl.constexpr):
    """The dim that a row of `value_operand` stands for."""
    RUN: gl.constexpr = value_run(HEAD_DIM, BITS)
    rest = row // 8
    return rest // RUN * (8 * RUN) + row % 8 * RUN + rest % RUN
