"""Keys and values drawn in several widths of bits, and a slope for every width: what the loss does as a head moves to it.

With u as drawn and q as a width stores it, the slope is the gradient at u times (q - u). To first order rounding errors of either sign
cancel; what is left is the curvature. Where q is worse than u by half the square of q - u, the slope at u misses that, and the slope at q
counts it twice. So slopes are right on the mean where the two are drawn alike. Fewer bits look cheaper than they are while they are rare,
and dearer once they are frequent; at rest they have more than half the chance exactly where the bytes that they save are worth what they
lose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moa_lab.cache.storage import as_stored
from moa_lab.plan import Bits

Widths = tuple[tuple[int, ...], tuple[int, ...]]
"""Bits that K and that V may have, ascending."""


def widths_of(mixes: Iterable[Bits]) -> Widths:
    """The widths that occur in `mixes`, of K and of V."""
    keys, values = zip(*mixes, strict=True)
    return tuple(sorted(set(keys))), tuple(sorted(set(values)))


def drawn_widths(values: torch.Tensor, shift: torch.Tensor, bits: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """`values` (batch, kv_heads, tokens, head_dim) as a cache of `bits`, int (batch, kv_heads), gives them back, `shift` towards others.

    shift: float32 (batch, kv_heads, len(widths)), all zeros; its slope says what each of `widths` would have changed. The gradient of
    `values` is passed straight through, as in `as_stored`.
    """
    found: torch.Tensor = _Drawn.apply(values, shift, bits, widths)
    return found


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, shift: torch.Tensor, bits: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(values, bits)
        ctx.widths = widths
        return as_stored(values.detach(), bits[..., None, None])

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[Any, ...]:
        values, bits = ctx.saved_tensors
        slope = slopes[0].float()
        # Rounded again, which takes less memory than keeping every width.
        here = as_stored(values, bits[..., None, None]).float()
        moved = [(slope * (as_stored(values, width).float() - here)).sum(dim=(-2, -1)) for width in ctx.widths]
        return slopes[0], torch.stack(moved, dim=-1), None, None
