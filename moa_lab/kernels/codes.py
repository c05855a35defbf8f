"""The numbers of a packed ring in Triton: codes into 32-bit words and out of them, and grids.

A code needs no conversion to be a float16: its bits are those of the number 2^-24 times the code, a subnormal one, which tensor cores
multiply as exactly and as fast as others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moa_lab.cache.storage import GRID_MAX

CODES = tl.constexpr(2.0**24)
"""A code over the float16 with its bits."""
LIMIT = tl.constexpr(GRID_MAX)


@triton.jit
def words_of(places, BITS: tl.constexpr):
    """Places (n, m), whole numbers, packed as `moa_lab.cache.storage.pack` does: int32 (n, m * BITS / 32)."""
    NUMBERS: tl.constexpr = 32 // BITS
    number = tl.arange(0, NUMBERS)
    apart = places.reshape(places.shape[0], places.shape[1] // NUMBERS, NUMBERS)
    # No two share a bit: the sum is all of them.
    return tl.sum(apart << (number // 2 * BITS + number % 2 * 16)[None, None, :], axis=2)


@triton.jit
def on_grid(given, there, levels):
    """`moa_lab.cache.storage.places` of vectors (n, m), of which `there` are the numbers: int32 (n, m), float16 (n, 1) twice."""
    exact = tl.minimum(tl.maximum(given.to(tl.float32), -LIMIT), LIMIT)
    low = tl.min(tl.where(there, exact, LIMIT), axis=1, keep_dims=True).to(tl.float16)
    wide = exact - low.to(tl.float32)
    high = tl.max(tl.where(there, wide, -2 * LIMIT), axis=1, keep_dims=True)
    # Division must round to the nearest; Triton's own does not on a GPU.
    step = tl.div_rn(high, tl.zeros_like(high) + levels).to(tl.float16)
    found = tl.where(step > 0, tl.div_rn(wide, tl.where(step > 0, step.to(tl.float32), 1.0)), 0.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction: halves go to the even number, as in torch.
    found = tl.maximum(tl.minimum((found + 12582912.0) - 12582912.0, levels), 0.0)
    return tl.where(there, found, 0.0).to(tl.int32), low, step


@triton.jit
def store_words(target, words, slots, kept, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Words (n, m), of which the first are a vector's, to their slots (n, 1)."""
    WIDTH: tl.constexpr = (HEAD_DIM * BITS + 31) // 32
    at = tl.arange(0, words.shape[1])[None, :]
    tl.store(target + slots * WIDTH + at, words, mask=kept[:, None] & (at < WIDTH))


@triton.jit
def vectors(base, slots, held, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The vectors at `slots`, (TILE, PADDED_DIM): numbers as they are, or 2^-24 times their codes as DTYPE. base: one, or (TILE, 1)."""
    NUMBERS: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    WIDTH: tl.constexpr = (HEAD_DIM + NUMBERS - 1) // NUMBERS
    at = tl.arange(0, PADDED_DIM // NUMBERS)
    found = tl.load(base + slots[:, None] * WIDTH + at[None, :], mask=held[:, None] & (at[None, :] < WIDTH), other=0)
    if BITS < 16:
        found = codes_of(found, BITS).to(DTYPE)
    return found


@triton.jit
def codes_of(words, BITS: tl.constexpr):
    """The codes in words (n, m), as `moa_lab.cache.storage.pack` packs them: float16 (n, m * 32 / BITS), 2^-24 of each."""
    # Neighbours, in 16 bits each.
    if BITS == 8:
        pairs = tl.join(words & 0x00FF00FF, (words >> 8) & 0x00FF00FF)
    else:
        even = tl.join(words & 0x000F000F, (words >> 8) & 0x000F000F)
        odd = tl.join((words >> 4) & 0x000F000F, (words >> 12) & 0x000F000F)
        pairs = tl.join(even, odd)
    apart = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return apart.reshape(words.shape[0], words.shape[1] * (32 // BITS)).to(tl.float16, bitcast=True)


@triton.jit
def grid_word(smallest, step):
    """A word of two float16."""
    return (smallest.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (step.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def grid_of(grids, slots, held):
    """The smallest value and the step of every slot's grid: float32 (TILE,)."""
    both = tl.load(grids + slots, mask=held, other=0)
    smallest = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return smallest, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
