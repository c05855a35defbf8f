"""Attention's backward pass with influence in plain PyTorch, a block of rows at a time: what the kernel is held against."""

from __future__ import annotations

import math

import numpy as np
import torch

from moa_lab.kernels.reference import softmax_with_sink
from moa_lab.masks import KeyMask, visible
from moa_lab.profiling.influence import LayerInfluence, logit_slopes, pad_to_tiles, reduce_rows, span_effect
from moa_lab.records import BLOCK_TOKENS

# A row block holds a handful of (heads, rows, keys) arrays at once. Elements of each: small enough for a CPU's cache (four
# times as many took twice as long), 128 MiB of float32 on a GPU.
ROW_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}


def backward_by_row_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_gradient: torch.Tensor,
    mask: KeyMask,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    sink_tokens: int,
    windows: np.ndarray | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], LayerInfluence]:
    """Gradients of query, key and value, and the layer's influence.

    query, output_gradient: (batch, query_heads, tokens, head_dim); key, value: (batch, kv_heads, tokens, head_dim), all float32 or float64.
    windows: tokens per KV head that the output was computed with (a plan); None: the dense model.
    """
    batch, heads, n, head_dim = query.shape
    kv_heads, group = key.shape[1], heads // key.shape[1]
    # (batch * kv_heads, group, tokens, head_dim): a group's query heads share K and V without a copy.
    query, output_gradient = (x.reshape(-1, group, n, head_dim) for x in (query * scale, output_gradient))
    key, value = (x.reshape(-1, n, head_dim) for x in (key, value))
    query_gradient = torch.empty_like(query)
    # (batch * kv_heads, head_dim, tokens): a third faster to add products to than the other way round.
    key_gradient, value_gradient = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (key, value))
    # Broadcastable to the scores: (kv_heads, group, 1, 1).
    sinks = None if sink_logits is None else sink_logits.reshape(kv_heads, group, 1, 1)
    tiles = -(-n // BLOCK_TOKENS)
    result = LayerInfluence(
        blocks=query.new_zeros(batch, heads, tiles, tiles),
        distances=query.new_zeros(batch, heads, tiles),
        span_effects=query.new_zeros(batch, heads, tiles),
    )
    blocks = _row_blocks(n, batch * heads, query.device.type)
    scratch, one = _Scratch(query, batch * heads * blocks[0][1] * n), query.new_ones(())

    for start, stop in blocks:
        # Causal: no row of this block sees a key at `stop` or later.
        keys, values = key[:, :stop], value[:, :stop]
        # The rows of a group's heads one below the other: one product with the keys that they share.
        rows, gradient = (x[:, :, start:stop].reshape(-1, group * (stop - start), head_dim) for x in (query, output_gradient))
        flat, shape = (batch * kv_heads, group * (stop - start), stop), (batch, kv_heads, group, stop - start, stop)
        scores = torch.bmm(rows, keys.mT, out=scratch.array("scores", flat)).view(shape)
        slope = None
        if softcap is not None:
            capped = torch.tanh(scores / softcap)
            scores, slope = softcap * capped, 1 - capped**2
        _hide(scores, mask, start, stop)
        dense, left = _weights(scores, sinks, scratch.array("weights", shape))
        weights = dense
        if windows is not None:
            seen = _windowed(scores, mask, sink_tokens, windows, start, stop)
            weights, _ = _weights(seen, sinks, scratch.array("weights under the plan", shape))
        weights_gradient = torch.bmm(gradient, values.mT, out=scratch.array("scores", flat)).view(shape)
        scores_gradient, expected = logit_slopes(weights, weights_gradient, scratch.array("slopes", shape))
        dense_slopes = scores_gradient
        if windows is not None:
            dense_slopes, expected = logit_slopes(dense, weights_gradient)

        # |E|, as `influence` has it: the slope of a logit per weight that is left.
        rest = torch.sub(one, weights, out=scratch.array("scores", shape)).clamp_(min=torch.finfo(weights.dtype).eps)
        magnitude = torch.div(scores_gradient, rest, out=rest).abs_().view(batch, heads, stop - start, stop)
        reduce_rows(result, pad_to_tiles(magnitude), start, sink_tokens)
        turned = (scores_gradient if slope is None else slope.mul_(scores_gradient)).view(flat)
        query_gradient[:, :, start:stop] = (turned @ keys).view(-1, group, stop - start, head_dim)
        key_gradient[:, :, :stop].baddbmm_(rows.mT, turned)
        value_gradient[:, :, :stop].baddbmm_(gradient.mT, weights.view(flat))
        # Last, as it writes to what the products read.
        effect = span_effect(dense, dense_slopes, expected, start, sink_tokens, tiles, left)
        result.span_effects += effect.view(batch, heads, tiles)
    gradients = [x.mT.reshape(batch, kv_heads, n, head_dim) for x in (key_gradient, value_gradient)]
    return (query_gradient.mul_(scale).reshape(batch, heads, n, head_dim), gradients[0], gradients[1]), result


class _Scratch:
    """Memory for the arrays of a row block, which every block uses again: to a CPU, fresh memory costs as much as what is done in it."""

    def __init__(self, like: torch.Tensor, elements: int) -> None:
        self._like, self._elements = like, elements
        self._held: dict[str, torch.Tensor] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An array of `shape`, whatever it holds, in the place of the last one of this name."""
        if name not in self._held:
            self._held[name] = self._like.new_empty(self._elements)
        return self._held[name][: math.prod(shape)].view(shape)


def _hide(scores: torch.Tensor, mask: KeyMask, start: int, stop: int) -> None:
    """Set the scores (batch, kv_heads, group, rows, keys) of hidden keys to minus infinity."""
    if mask.is_causal:
        # Only among the block's own keys is one hidden from one of its rows.
        future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., start:].masked_fill_(future, float("-inf"))
    else:
        scores.masked_fill_(mask.positions[:, :, None, start:stop, :stop] < 0, float("-inf"))


def _windowed(scores: torch.Tensor, mask: KeyMask, sink_tokens: int, windows: np.ndarray, start: int, stop: int) -> torch.Tensor:
    """The scores without those that the plan hides, in place."""
    window = torch.from_numpy(windows).to(scores.device, torch.int32)[:, None, None, None]
    key_positions = mask.positions[:, :, None, start:stop, :stop]
    seen = visible(key_positions.amax(dim=-1, keepdim=True), key_positions, sink_tokens, window)
    return scores.masked_fill_(~seen, float("-inf"))


def _weights(scores: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax weights of the keys, in `out`, and of the sink logit: (..., rows, 1), None where there is none."""
    if sinks is None:
        return torch.softmax(scores, dim=-1, out=out), None
    weights, left = softmax_with_sink(scores, sinks)
    return out.copy_(weights), left


def _row_blocks(n: int, heads: int, device: str) -> list[tuple[int, int]]:
    elements = ROW_BLOCK_ELEMENTS.get(device, ROW_BLOCK_ELEMENTS["cpu"])
    rows = max(BLOCK_TOKENS, elements // (heads * n) // BLOCK_TOKENS * BLOCK_TOKENS)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]
