"""New columns of tokens, some of which are padding in some rows."""

from __future__ import annotations

import torch

from moa_lab.masks import KeyMask


def padding_of(mask: KeyMask, tokens: int, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How many of the new columns are padding, int32 (batch,), and the order that brings it to the left, None where it is there."""
    if mask.real is None:
        return torch.zeros_like(lengths), None
    real = mask.real[:, -tokens:]
    padding = (tokens - real.sum(dim=1)).to(torch.int32)
    if tokens == 1 or not bool((real[:, :-1] & ~real[:, 1:]).any()):
        return padding, None
    return padding, real.int().argsort(dim=1, stable=True)


def ordered(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """`x` (batch, heads, tokens, head_dim) with each row's tokens in `order` (batch, tokens)."""
    return x if order is None else x.gather(2, order.to(x.device)[:, None, :, None].expand_as(x))
