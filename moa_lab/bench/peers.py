"""Peer kernels to compare with; one that does not run here is recorded with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from moa_lab.bench.lab import Lab, timing_detail
from moa_lab.bench.record import errors, is_right
from moa_lab.bench.shapes import Shape, Spans
from moa_lab.bench.timing import time_calls
from moa_lab.masks import visible

Attend = Callable[[], torch.Tensor]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value: (batch, heads, n_tokens, head_dim)."""

BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PAGE_TOKENS = 16
FLASHINFER_WORKSPACE_BYTES = 128 * 2**20

logger = logging.getLogger(__name__)


def measured(
    name: str, make: Callable[[], Sequence[Attend]], work: float, lab: Lab, expected: torch.Tensor | None = None
) -> dict[str, Any]:
    """A peer's ms and rate (`work` of one call per second), or why it "failed".

    make: returns calls that do the same on copies of the inputs. expected: the result of the first, in any shape of as many elements;
    a peer with a wrong result counts as failed.
    """
    try:
        calls = make()
        found = {} if expected is None else errors(calls[0]().reshape(expected.shape), expected)
        if not is_right(found):
            return {"failed": f"wrong result: {found}"}
        timing = time_calls(calls, lab.device)
    # Any error of a third-party library, from a missing backend to a failed compilation: it must not end the run.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        logger.info("%s does not run here: %s: %s", name, type(error).__name__, reason)
        return {"failed": f"{type(error).__name__}: {reason}"[:300]}
    finally:
        lab.release()
    return {**timing_detail(timing), "rate": timing.rate(work), **found}


def sdpa(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, grouped: bool = False) -> torch.Tensor:
    """Scaled dot product attention by one backend. Raises RuntimeError where it does not support the inputs."""
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def sdpa_decode(backend: str, shape: Shape, tokens: int, copies: int, lab: Lab) -> list[Attend]:
    """Decode over a dense cache of `tokens` tokens a head.

    A group's query heads are passed as queries of one head, so that no backend needs GQA support and none reads a key twice.
    """

    def one(seed: int) -> Attend:
        query = lab.random(seed, shape.batch, shape.kv_heads, shape.group, shape.head_dim)
        key, value = (lab.random(seed + part, shape.batch, shape.kv_heads, tokens, shape.head_dim) for part in (1, 2))
        return lambda: sdpa(backend, query, key, value, causal=False)

    return [one(3 * copy) for copy in range(copies)]


def sdpa_prefill(backend: str, inputs: Sequence[Inputs]) -> list[Attend]:
    """Dense causal prefill; K and V are repeated beforehand where the backend has no GQA support."""
    query, key, value = inputs[0]
    group = query.shape[1] // key.shape[1]
    if group > 1 and not _takes_groups(backend, query, key, value):
        inputs = [(query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)) for query, key, value in inputs]
        group = 1

    def one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attend:
        return lambda: sdpa(backend, query, key, value, causal=True, grouped=group > 1)

    return [one(*tensors) for tensors in inputs]


def _takes_groups(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    try:
        sdpa(backend, query, key, value, causal=True, grouped=True)
    except RuntimeError:
        return False
    return True


def flex_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, compiled: bool = True) -> Attend:
    """FlexAttention of the newest token over a cache of all tokens, masked to the spans: (batch, kv_heads, group, head_dim).

    query: (batch, query_heads, 1, head_dim); key, value: (batch, kv_heads, n_tokens, head_dim). A group's query heads are passed
    as queries of one head: FlexAttention's decode kernel applies with one mask per KV head, not with one per query head.
    """
    kv_heads, n_tokens = key.shape[1:3]
    folded = query.reshape(len(query), kv_heads, -1, query.shape[-1])
    windows = torch.tensor(spans.windows, device=query.device)

    def mask(batch: torch.Tensor, head: torch.Tensor, asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        # All queries of a group are at the newest position; written with `asked`, as only pointwise arithmetic compiles here.
        return visible(asked * 0 + (n_tokens - 1), known, spans.sink_tokens, windows[head])

    blocks = create_block_mask(mask, None, kv_heads, folded.shape[2], n_tokens, device=query.device)
    attend = _flex(compiled)
    return lambda: attend(folded, key, value, block_mask=blocks)


def flex_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, compiled: bool = True) -> Attend:
    """FlexAttention with the mask of the spans: (batch, query_heads, n_tokens, head_dim)."""
    query_heads, n_tokens = query.shape[1:3]
    group = query_heads // key.shape[1]
    windows = torch.tensor(spans.windows, device=query.device).repeat_interleave(group)

    def mask(batch: torch.Tensor, head: torch.Tensor, asked: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return visible(asked, known, spans.sink_tokens, windows[head])

    # Compiled, the full mask is never materialised: at 16k it would take over 8 GB.
    create = torch.compile(create_block_mask) if compiled else create_block_mask
    blocks = create(mask, None, query_heads, n_tokens, n_tokens, device=query.device)
    attend = _flex(compiled)
    return lambda: attend(query, key, value, block_mask=blocks, enable_gqa=group > 1)


def flash4_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans) -> Attend:
    """FlashAttention-4 with the windows of the spans as a mask, lists of key blocks and all; ImportError where it is not installed."""
    from moa_lab.kernels.flash import flash_prefill

    return lambda: flash_prefill(query, key, value, spans.windows, spans.sink_tokens, query.shape[-1] ** -0.5)


def triton_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans) -> Attend:
    """Our own kernel, as a peer of one that is chosen before it."""
    from moa_lab.kernels.prefill import prefill_attention

    return lambda: prefill_attention(query, key, value, spans.windows, spans.sink_tokens, query.shape[-1] ** -0.5)


def _flex(compiled: bool) -> Callable[..., torch.Tensor]:
    if not compiled:
        return flex_attention
    # Each shape compiles anew, and torch allows only a few compilations.
    torch.compiler.reset()
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flashinfer_decode(shape: Shape, tokens: int, copies: int, lab: Lab) -> list[Attend]:
    """FlashInfer's paged decode over a dense cache of `tokens` tokens a head; ImportError where it is not installed."""
    flashinfer = import_module("flashinfer")
    pages = -(-tokens // PAGE_TOKENS)
    first = torch.arange(shape.batch + 1, dtype=torch.int32, device=lab.device) * pages
    indices = torch.arange(shape.batch * pages, dtype=torch.int32, device=lab.device)
    last = torch.full((shape.batch,), tokens - (pages - 1) * PAGE_TOKENS, dtype=torch.int32, device=lab.device)
    workspace = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=lab.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.group > 1)
    wrapper.plan(
        first, indices, last, shape.query_heads, shape.kv_heads, shape.head_dim, PAGE_TOKENS,
        q_data_type=lab.dtype, kv_data_type=lab.dtype,
    )  # fmt: skip

    def one(seed: int) -> Attend:
        query = lab.random(seed, shape.batch, shape.query_heads, shape.head_dim)
        cache = lab.random(seed + 1, shape.batch * pages, 2, PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        return lambda: wrapper.run(query, cache)

    return [one(2 * copy) for copy in range(copies)]
