"""The bits in which a cache stores keys and values, and the bytes that these take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

UNTOUCHED = 16
"""The width of the model's own type: values stay as they are."""
WIDTHS = (4, 8, UNTOUCHED)
GRID_BYTES = 4
"""What a token's vector in fewer bits takes beside its numbers: the smallest value and the step of its grid, in 16 bits each."""

Bits = tuple[int, int]
"""Of the K and of the V of one head."""


def code_words(head_dim: int, bits: int) -> int:
    """32-bit words that hold the numbers of one vector on its grid."""
    return -(-head_dim * bits // 32)


def vector_bytes(head_dim: int, bits: int, dtype_bytes: int = 2) -> int:
    """Bytes of one token's K or V of one head. dtype_bytes: of a number that is left untouched."""
    return head_dim * dtype_bytes if bits == UNTOUCHED else 4 * code_words(head_dim, bits) + GRID_BYTES


def read_bits(keys: Any, values: Any) -> tuple[tuple[Bits, ...], ...]:
    """Bits by layer and KV head from two nested lists of whole numbers. Raises ValueError for others, or of another shape."""
    try:
        found = np.stack([np.asarray(keys), np.asarray(values)], axis=-1)
    except ValueError as error:
        raise ValueError("bits must be a number for every layer and KV head, for keys and for values") from error
    if found.ndim != 3 or found.dtype.kind not in "iu" or not np.isin(found, WIDTHS).all():
        raise ValueError(f"bits must be {', '.join(map(str, WIDTHS))} for every layer and KV head")
    return as_bits(found)


def as_bits(widths: np.ndarray) -> tuple[tuple[Bits, ...], ...]:
    """Bits by layer and KV head from int (layers, kv_heads, 2); empty where all are untouched."""
    if (widths == UNTOUCHED).all():
        return ()
    return tuple(tuple((int(k), int(v)) for k, v in row) for row in widths)


def check_bits(bits: Sequence[Sequence[Bits]], layers: int, kv_heads: int) -> None:
    """Raise ValueError unless `bits` is empty, or holds known widths for every head."""
    if not bits:
        return
    if len(bits) != layers or {len(row) for row in bits} != {kv_heads}:
        raise ValueError(f"bits must be {layers} layers x {kv_heads} KV heads x (K, V)")
    for row in bits:
        for pair in row:
            if len(pair) != 2 or not all(width in WIDTHS for width in pair):
                raise ValueError(f"bits of K and V must be two of {', '.join(map(str, WIDTHS))}, got {pair}")
