"""Attention whose backward pass also yields influence, one row block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moa_lab.interface import AttentionCall, Handler
from moa_lab.kernels.reference import dense_attention, softmax_with_sink, windowed_attention
from moa_lab.masks import visible
from moa_lab.profiling.influence import LayerInfluence, pad_to_tiles, reduce_rows, span_effect
from moa_lab.records import BLOCK_TOKENS

# A row block holds a handful of (heads, rows, keys) arrays at once. Elements of each: small enough for a CPU's cache (four
# times as many took twice as long), 128 MiB of float32 on a GPU.
ROW_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}

Receiver = Callable[[int, LayerInfluence], None]
"""Takes a layer number and its reduced influence, while the backward pass runs."""


def capturing(layer: int, receive: Receiver, sink_tokens: int, windows: np.ndarray | None = None) -> Handler:
    """An attention handler that computes the layer's output, and sends its influence to `receive` during backward.

    windows: tokens per KV head that the output is computed with (a plan); None: the dense model.
    Raises ValueError (when called) for a call that continues a cache: influence needs every query of the sequence.
    """

    def handler(call: AttentionCall) -> torch.Tensor:
        if not call.is_prefill:
            raise ValueError("influence is profiled on whole sequences; call the model with use_cache=False")
        wanted = _Wanted(layer, receive, sink_tokens, windows)
        return _CapturedAttention.apply(call.query, call.key, call.value, call, wanted)

    return handler


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `capturing`."""

    layer: int
    receive: Receiver
    sink_tokens: int
    windows: np.ndarray | None


class _CapturedAttention(torch.autograd.Function):
    """Saves q, k, v only; backward recomputes the weights per row block and takes both gradients and influence from them."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall, wanted: _Wanted
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, call.positions, call.query_positions, call.sink_logits)
        ctx.scale, ctx.softcap, ctx.wanted = call.scale, call.softcap, wanted
        if wanted.windows is None:
            return dense_attention(query, key, value, call.mask, call.scale, call.softcap, call.sink_logits)
        return windowed_attention(
            query,
            key,
            value,
            call.query_positions,
            call.positions,
            wanted.sink_tokens,
            wanted.windows,
            call.scale,
            call.softcap,
            sink_logits=call.sink_logits,
        )

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, positions, query_positions, sink_logits = ctx.saved_tensors
        work_dtype = torch.promote_types(query.dtype, torch.float32)
        gradients, reduced = _backward_by_row_blocks(
            query.to(work_dtype), key.to(work_dtype), value.to(work_dtype), output_gradients[0].to(work_dtype),
            positions, query_positions, ctx.scale, ctx.softcap, sink_logits, ctx.wanted,
        )  # fmt: skip
        ctx.wanted.receive(ctx.wanted.layer, reduced)
        return (*(gradient.to(query.dtype) for gradient in gradients), None, None)


def _backward_by_row_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_gradient: torch.Tensor,
    positions: torch.Tensor,
    query_positions: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    wanted: _Wanted,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], LayerInfluence]:
    batch, heads, n, head_dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    # (batch, kv_heads, group, tokens, head_dim): a group's query heads share K and V without a copy.
    query, output_gradient = (x.reshape(batch, kv_heads, group, n, head_dim) for x in (query * scale, output_gradient))
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)
    window = None
    if wanted.windows is not None:
        window = torch.from_numpy(wanted.windows).to(query.device, torch.int32)[:, None, None, None]
    # Broadcastable to the scores: (kv_heads, group, 1, 1).
    sinks = None if sink_logits is None else sink_logits.reshape(kv_heads, heads // kv_heads, 1, 1)
    tiles = -(-n // BLOCK_TOKENS)
    result = LayerInfluence(
        blocks=query.new_zeros(batch, heads, tiles, tiles),
        distances=query.new_zeros(batch, heads, tiles),
        span_effects=query.new_zeros(batch, heads, tiles),
    )

    for start, stop in _row_blocks(n, batch * heads, query.device.type):
        # Causal: no row of this block sees a key at `stop` or later.
        keys, values = key[:, :, :stop], value[:, :, :stop]
        # The rows of a group's heads one below the other: one product with the keys that they share.
        rows, gradient = (x[..., start:stop, :].reshape(batch, kv_heads, -1, head_dim) for x in (query, output_gradient))
        shape = (batch, kv_heads, group, stop - start, stop)
        scores = (rows @ keys.transpose(-1, -2)).reshape(shape)
        slope = None
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            scores, slope = softcap * capped, 1 - capped**2
        key_positions = positions[:, :, None, start:stop, :stop]
        scores.masked_fill_(key_positions < 0, float("-inf"))
        dense, left = _weights(scores, sinks)
        weights = dense
        if window is not None:
            seen = visible(query_positions[:, :, None, start:stop], key_positions, wanted.sink_tokens, window)
            weights, _ = _weights(scores.masked_fill_(~seen, float("-inf")), sinks)
        weights_gradient = (gradient @ values.transpose(-1, -2)).reshape(shape)
        pairs = weights * weights_gradient
        effect = span_effect(dense, weights_gradient, start, wanted.sink_tokens, tiles, pairs if window is None else None, left)
        result.span_effects += effect.reshape(batch, heads, tiles)

        scores_gradient = torch.addcmul(pairs, weights, pairs.sum(dim=-1, keepdim=True), value=-1)
        # |E|, as `influence` has it: the slope of a logit per weight that is left.
        rest = torch.rsub(weights, 1.0).clamp_(min=torch.finfo(weights.dtype).eps)
        magnitude = torch.div(scores_gradient, rest, out=rest).abs_().reshape(batch, heads, stop - start, stop)
        reduce_rows(result, pad_to_tiles(magnitude), start, wanted.sink_tokens)
        if slope is not None:
            scores_gradient *= slope
        turned, weights = scores_gradient.reshape(batch, kv_heads, -1, stop), weights.reshape(batch, kv_heads, -1, stop)
        query_gradient[..., start:stop, :] = (turned @ keys).reshape(batch, kv_heads, group, stop - start, head_dim)
        key_gradient[:, :, :stop] += turned.transpose(-1, -2) @ rows
        value_gradient[:, :, :stop] += weights.transpose(-1, -2) @ gradient
    return (query_gradient.mul_(scale).reshape(batch, heads, n, head_dim), key_gradient, value_gradient), result


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax weights of the keys, and of the sink logit: (..., rows, 1), None where there is none."""
    return (scores.softmax(dim=-1), None) if sinks is None else softmax_with_sink(scores, sinks)


def _row_blocks(n: int, heads: int, device: str) -> list[tuple[int, int]]:
    elements = ROW_BLOCK_ELEMENTS.get(device, ROW_BLOCK_ELEMENTS["cpu"])
    rows = max(BLOCK_TOKENS, elements // (heads * n) // BLOCK_TOKENS * BLOCK_TOKENS)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]
