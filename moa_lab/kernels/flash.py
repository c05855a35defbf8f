"""Prefill under a plan by FlashAttention-4 (`pip install --pre flash-attn-4`), where it is installed: per-head windows as a mask.

Its kernels skip what a list of key blocks leaves out, and mask the blocks that are seen in part; the lists are made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moa_lab.kernels.block_lists import BlockLists, block_lists

LIBRARY = "flash_attn.cute"
NARROW = 64
"""head_dim up to which a tile has more queries."""
USUAL = 128


def flash_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Sequence[int], sink_tokens: int, scale: float
) -> torch.Tensor:
    """Causal attention of a whole prompt in which KV head g sees the sink and its own `windows[g]` tokens, in float16 or bfloat16.

    Shapes as in `prefill_attention`, as many queries as keys, nothing padded. Raises ImportError where FlashAttention-4 is missing.
    """
    flash: Any = import_module(LIBRARY)
    sparsity: Any = import_module(f"{LIBRARY}.block_sparsity")
    query_heads, n_tokens, head_dim = query.shape[1:]
    table = seen_by(tuple(windows), query_heads // key.shape[1], sink_tokens, query.device)
    lists = block_lists(table, n_tokens, *tile(head_dim))
    found, *_ = flash.flash_attn_func(
        *(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scale, mask_mod=_mask(), aux_tensors=[table],
        block_sparse_tensors=sparsity.BlockSparseTensorsTorch(*_told(lists), block_size=tile(head_dim)),
    )  # fmt: skip
    output: torch.Tensor = found.transpose(1, 2)
    return output


def tile(head_dim: int) -> tuple[int, int]:
    """Queries and keys of a tile, as the library's kernels for Hopper have them."""
    if head_dim <= NARROW:
        return 192, 128
    return (128, 128) if head_dim <= USUAL else (128, 80)


@cache
def seen_by(windows: tuple[int, ...], group: int, sink_tokens: int, device: torch.device) -> torch.Tensor:
    """int32 (1 + query_heads,): the sink, then every query head's window. Cached: a copy to the device waits for it."""
    return torch.tensor([sink_tokens, *(window for window in windows for _ in range(group))], dtype=torch.int32, device=device)


def _told(lists: BlockLists) -> tuple[torch.Tensor, ...]:
    return tuple(x[None] for x in (lists.partial_count, lists.partial, lists.whole_count, lists.whole))


@cache
def _mask() -> Callable[..., Any]:
    """Whether a query sees a key, in the language of the library's kernels."""
    cute: Any = import_module("cutlass.cute")
    cutlass: Any = import_module("cutlass")
    scalar: Any = import_module(f"{LIBRARY}.utils").scalar_to_ssa

    @cute.jit
    def seen(batch: Any, head: Any, query: Any, key: Any, info: Any, aux: Any) -> Any:
        table = aux[0]
        sink, window = (scalar(table[place], cutlass.Int32) for place in (0, head[0] + 1))
        distance = query - key
        return (distance >= scalar(cutlass.Int32(0), cutlass.Int32)) & ((distance < window) | (key < sink))

    found: Callable[..., Any] = seen
    return found
