"""What a cache stores of keys and values in 16, 8 or 4 bits.

A token's vector of one head shares a grid: its smallest value and the step, a float16 each, and of every number the place on that grid,
rounded to the nearest. Quantising and dequantising in float32, as here, is the definition that kernels are held against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moa_lab.plan.bits import UNTOUCHED, Bits

GRID_MAX = torch.finfo(torch.float16).max / 2
"""Half of what float16 holds, so that the distance between two such values is held as well."""


def places(values: torch.Tensor, bits: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the numbers of `values` (..., n) lie on a grid of 2^bits places: float32 (..., n), and float16 (..., 1) smallest value and
    step. bits: a number, or a tensor that broadcasts with (..., 1)."""
    # Beyond the range of a grid's float16 values saturate.
    exact = values.to(torch.promote_types(values.dtype, torch.float32)).clamp(-GRID_MAX, GRID_MAX)
    levels = torch.as_tensor(2.0**bits - 1, device=values.device)
    low, high = exact.aminmax(dim=-1, keepdim=True)
    low = low.half()
    step = ((high - low.to(exact.dtype)) / levels).half()
    # A vector of equal values has no step.
    found = torch.where(step > 0, (exact - low.to(exact.dtype)) / step.to(exact.dtype), 0.0)
    return found.round().minimum(levels.to(exact.dtype)).clamp(min=0), low, step


def values_at(where: torch.Tensor, low: torch.Tensor, step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The numbers at places of a grid, computed in float32."""
    wide = torch.promote_types(dtype, torch.float32)
    return (low.to(wide) + step.to(wide) * where.to(wide)).to(dtype)


def as_stored(values: torch.Tensor, bits: torch.Tensor | int) -> torch.Tensor:
    """`values` (..., n) as they come back from a cache of so many bits, in their dtype; 16 leave them unchanged.

    Rounding has no slope: the gradient is passed straight through, as if nothing had been rounded.
    """
    bits = torch.as_tensor(bits, device=values.device)
    exact = values.detach()
    found = torch.where(bits >= UNTOUCHED, exact, values_at(*places(exact, bits), values.dtype))
    return found + (values - exact) if values.requires_grad else found


def heads_as_stored(key: torch.Tensor, value: torch.Tensor, bits: Sequence[Bits] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (batch, kv_heads, tokens, head_dim) as they come back from a layer's cache. bits: per KV head; None: untouched."""
    if bits is None:
        return key, value
    found = []
    for part, given in enumerate((key, value)):
        widths = [head[part] for head in bits]
        if min(widths) < UNTOUCHED:
            given = as_stored(given, torch.tensor(widths, device=given.device)[:, None, None])
        found.append(given)
    return found[0], found[1]


def pack(where: torch.Tensor, bits: int) -> torch.Tensor:
    """Places (..., n) as int32 (..., code_words): the even ones of a word's numbers in its lower 16 bits, the odd ones in the upper,
    each from the lowest bits on. A shift and a mask then leave two neighbours as 16-bit numbers, which is how kernels read them."""
    codes = torch.nn.functional.pad(where.to(torch.uint8), (0, -where.shape[-1] % (32 // bits)))
    codes = codes.unflatten(-1, (-1, 16 // bits, 2)).transpose(-1, -2)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.flatten(-3).contiguous().view(torch.int32)


def unpack(codes: torch.Tensor, bits: int, head_dim: int) -> torch.Tensor:
    """The places that `pack` packed: uint8 (..., head_dim)."""
    found = codes.contiguous().view(torch.uint8).unflatten(-1, (-1, 2, 2))
    if bits == 4:
        found = torch.stack([found & 15, found >> 4], dim=-1).flatten(-2)
    return found.transpose(-1, -2).flatten(-3)[..., :head_dim]
