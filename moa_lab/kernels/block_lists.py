"""Which key blocks the queries of a block see under per-head windows: lists for kernels that skip the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LANES = 64
"""Key blocks that a program looks at together."""


@dataclass(frozen=True)
class BlockLists:
    """Per query head and query block, in ascending order: the key blocks that are seen in part, and those that all its queries see whole.

    partial, whole: int32 (query_heads, query_blocks, key_blocks), of which the first `..._count`, int32 (query_heads, query_blocks), hold.
    """

    partial_count: torch.Tensor
    partial: torch.Tensor
    whole_count: torch.Tensor
    whole: torch.Tensor


def block_lists(table: torch.Tensor, n_tokens: int, block_m: int, block_n: int) -> BlockLists:
    """The lists for a prompt of n_tokens, of `block_m` queries by `block_n` keys. table: int32 (1 + query_heads,): the sink, then every
    query head's window, in tokens."""
    heads, rows, columns = len(table) - 1, triton.cdiv(n_tokens, block_m), triton.cdiv(n_tokens, block_n)
    counts = [torch.empty(heads, rows, dtype=torch.int32, device=table.device) for _ in range(2)]
    lists = [torch.empty(heads, rows, columns, dtype=torch.int32, device=table.device) for _ in range(2)]
    _fill[rows, heads](
        table, counts[0], lists[0], counts[1], lists[1], n_tokens, columns, BLOCK_M=block_m, BLOCK_N=block_n, LANES=LANES, num_warps=1
    )
    return BlockLists(counts[0], lists[0], counts[1], lists[1])


@triton.jit
def _fill(
    table, partial_count, partial, whole_count, whole, n_tokens, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr
):
    row, head, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    sink, window = tl.load(table), tl.load(table + 1 + head)
    first = row * BLOCK_M
    last = tl.minimum(first + BLOCK_M, n_tokens) - 1
    place = head * rows + row
    partly, wholly = 0, 0
    for start in range(0, tl.cdiv(last + 1, BLOCK_N), LANES):
        block = start + tl.arange(0, LANES)
        begin = block * BLOCK_N
        end = tl.minimum(begin + BLOCK_N, n_tokens) - 1
        shown = (begin <= last) & ((first - end < window) | (begin < sink))
        every = (begin <= last) & (end <= first) & ((last - tl.maximum(begin, sink) < window) | (end < sink))
        some = shown & (every == 0)
        tl.store(partial + place * columns + partly + tl.cumsum(some.to(tl.int32), 0) - 1, block, mask=some)
        tl.store(whole + place * columns + wholly + tl.cumsum(every.to(tl.int32), 0) - 1, block, mask=every)
        partly += tl.sum(some.to(tl.int32), 0)
        wholly += tl.sum(every.to(tl.int32), 0)
    tl.store(partial_count + place, partly)
    tl.store(whole_count + place, wholly)
