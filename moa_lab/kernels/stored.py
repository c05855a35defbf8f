"""K and V as they come back from a cache that stores them in fewer bits, in Triton: one pass over what a chunk brings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from moa_lab.kernels.codes import on_grid
from moa_lab.plan.bits import UNTOUCHED, Bits


def heads_as_stored(key: torch.Tensor, value: torch.Tensor, bits: Sequence[Bits]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moa_lab.cache.storage.heads_as_stored`, without gradients, computed in float32: (batch, kv_heads, tokens, head_dim)."""
    widths = _widths(tuple(bits), key.device)
    key, value = (
        given if min(head[part] for head in bits) == UNTOUCHED else _stored(given, widths[part]) for part, given in enumerate((key, value))
    )
    return key, value


@lru_cache(maxsize=4096)
def _widths(bits: tuple[Bits, ...], device: torch.device) -> torch.Tensor:
    """int32 (2, kv_heads). Cached: a copy to the device in every layer of every pass would mean a host synchronisation each."""
    return torch.tensor(bits, dtype=torch.int32, device=device).T.contiguous()


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["widths"])
def _stored_kernel(
    found, given, widths, given_batch, given_head, given_token, tokens, kv_heads,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head. found: contiguous."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    bits = tl.load(widths + head)
    these = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_DIM)[None, :]
    there = (these < tokens)[:, None] & (dims < HEAD_DIM)
    source = given + batch * given_batch + head * given_head + these[:, None].to(tl.int64) * given_token + dims
    target = found + ((batch * kv_heads + head) * tokens + these[:, None]) * HEAD_DIM + dims
    numbers = tl.load(source, mask=there, other=0.0)
    if bits < 16:
        places, low, step = on_grid(numbers, there, tl.where(bits == 8, 255.0, 15.0))
        numbers = (low.to(tl.float32) + step.to(tl.float32) * places.to(tl.float32)).to(numbers.dtype)
    tl.store(target, numbers, mask=there)


@torch.library.custom_op("moa_lab::stored", mutates_args=())
def _stored(given: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    given = given if given.stride(-1) == 1 else given.contiguous()
    batch, kv_heads, tokens, head_dim = given.shape
    found = torch.empty(given.shape, dtype=given.dtype, device=given.device)
    padded_dim = max(triton.next_power_of_2(head_dim), 16)
    block = min(16, max(1, 2048 // padded_dim))
    _stored_kernel[(triton.cdiv(tokens, block), batch * kv_heads)](
        found, given, widths, *given.stride()[:3], tokens, kv_heads, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK=block, num_warps=4
    )
    return found


@_stored.register_fake
def _(given: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    return torch.empty(given.shape, dtype=given.dtype, device=given.device)
