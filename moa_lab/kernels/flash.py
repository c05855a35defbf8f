"""Prefill under a plan by FlashAttention-4 (`pip install --pre flash-attn-4`), where it is installed: per-head windows as a mask.

Its kernels skip what a list of key blocks leaves out, and mask the blocks that are seen in part; the lists are made here. It is chosen
where it was measured to be faster than our own kernel, and once it has given the same in this process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moa_lab.kernels.block_lists import BlockLists, block_lists
from moa_lab.kernels.devices import nvidia_capability
from moa_lab.kernels.prefill import empty_like, prefill_attention
from moa_lab.text import one_line

logger = logging.getLogger(__name__)

LIBRARY = "flash_attn.cute"
FEWEST = {64: 16384, 128: 8192, 256: 8192}
"""By head_dim, tokens of a prompt from which on it is faster: on an H200 by 8 to 17%, in longer ones by up to 30%. In shorter ones it is
as fast as our own kernel or slower (P1 and P3 of `data/benchmarks/prefill.json`)."""
CAPABILITY = (9, 0)
"""The chips that it was run on."""
CLOSE = 3e-2
"""How far its output may be from that of our kernel, for numbers around 1 in half precision."""
NARROW = 64
"""head_dim up to which a tile has more queries."""
USUAL = 128


@torch.library.custom_op("moa_lab::prompt", mutates_args=())
def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Sequence[int], sink_tokens: int, scale: float
) -> torch.Tensor:
    """`moa_lab.kernels.prefill.prefill_attention` of a whole prompt without padding, by the faster of the two kernels."""
    attend = flash_prefill if flash_applies(query, key) else prefill_attention
    return attend(query, key, value, windows, sink_tokens, scale)


@prompt_attention.register_fake
def _(query: torch.Tensor, *_: object) -> torch.Tensor:
    return empty_like(query)


def flash_applies(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether FlashAttention-4 is the faster one for a prompt, and works here. Shapes as in `flash_prefill`."""
    fewest = FEWEST.get(query.shape[3])
    long = fewest is not None and query.shape[2] == key.shape[2] >= fewest
    fits = long and query.dtype in (torch.float16, torch.bfloat16)
    return fits and nvidia_capability(query) == CAPABILITY and works(query.device, query.dtype, query.shape[3])


@cache
def works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it gives what our kernel gives, tried once on a short prompt. If not, the log says why."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    settings: tuple[Any, ...] = ([100, 300], 4, head_dim**-0.5)
    try:
        found, wanted = (attend(query, key, value, *settings) for attend in (flash_prefill, prefill_attention))
        torch.testing.assert_close(found.float(), wanted.float(), atol=CLOSE, rtol=CLOSE)
    # Whatever keeps a library of somebody else's from running, there is a kernel that does.
    except Exception as error:
        logger.warning("FlashAttention-4 is installed and cannot be used here, so that prompts take our own kernel: %s", one_line(error))
        return False
    return True


def flash_prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, windows: Sequence[int], sink_tokens: int, scale: float
) -> torch.Tensor:
    """Causal attention of a whole prompt in which KV head g sees the sink and its own `windows[g]` tokens, in float16 or bfloat16.

    Shapes as in `prefill_attention`, as many queries as keys, nothing padded. Raises ImportError where FlashAttention-4 is missing.
    """
    flash: Any = import_module(LIBRARY)
    sparsity: Any = import_module(f"{LIBRARY}.block_sparsity")
    query_heads, n_tokens, head_dim = query.shape[1:]
    # Spans may be longer than 32 bits tell.
    table = seen_by(tuple(min(window, n_tokens) for window in windows), query_heads // key.shape[1], sink_tokens, query.device)
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
