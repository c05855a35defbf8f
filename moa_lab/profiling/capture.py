"""Attention whose backward pass also yields influence, by a kernel where one runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from moa_lab.interface import AttentionCall, Handler
from moa_lab.kernels.dispatch import kernel_applies
from moa_lab.kernels.reference import dense_attention, windowed_attention
from moa_lab.masks import KeyMask
from moa_lab.profiling.influence import LayerInfluence
from moa_lab.profiling.rounding import rounding_losses
from moa_lab.profiling.row_blocks import backward_by_row_blocks
from moa_lab.text import one_line

CLOSE = 3e-2
"""How far the kernel's sums and gradients may be from plain PyTorch's, relative to the greatest, in half precision."""

logger = logging.getLogger(__name__)

Receiver = Callable[[int, LayerInfluence], None]
"""Takes a layer number and its reduced influence, while the backward pass runs."""


def capturing(layer: int, receive: Receiver, sink_tokens: int, windows: np.ndarray | None = None, rounding: bool = False) -> Handler:
    """An attention handler that computes the layer's output, and sends its influence to `receive` during backward.

    windows: tokens per KV head that the output is computed with (a plan); None: the dense model. rounding: send what fewer bits cost too.
    Raises ValueError (when called) for a call that continues a cache: influence needs every query of the sequence.
    """

    def handler(call: AttentionCall) -> torch.Tensor:
        if not call.is_prefill:
            raise ValueError("influence is profiled on whole sequences; call the model with use_cache=False")
        wanted = _Wanted(layer, receive, sink_tokens, windows, rounding)
        return _CapturedAttention.apply(call.query, call.key, call.value, call, wanted)

    return handler


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `capturing`."""

    layer: int
    receive: Receiver
    sink_tokens: int
    windows: np.ndarray | None
    rounding: bool


class _CapturedAttention(torch.autograd.Function):
    """Saves q, k, v only; backward recomputes the weights and takes both gradients and influence from them."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall, wanted: _Wanted
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, call.sink_logits)
        ctx.mask, ctx.scale, ctx.softcap, ctx.wanted = call.mask, call.scale, call.softcap, wanted
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
        query, key, value, sink_logits = ctx.saved_tensors
        wanted, tensors = ctx.wanted, (query, key, value, output_gradients[0])
        if by_kernel(query, ctx.mask, wanted.windows):
            # Imported here: Triton may be missing.
            from moa_lab.kernels.influence import backward_with_influence

            gradients: Sequence[torch.Tensor]
            gradients, sums = backward_with_influence(*tensors, wanted.sink_tokens, ctx.scale, ctx.softcap, ctx.mask.reach, sink_logits)
            reduced = LayerInfluence(*sums)
        else:
            gradients, reduced = _by_row_blocks(tensors, ctx.mask, ctx.scale, ctx.softcap, sink_logits, wanted.sink_tokens, wanted.windows)
        if wanted.rounding:
            reduced.rounding = torch.stack([rounding_losses(*pair) for pair in zip((key, value), gradients[1:], strict=True)], dim=-1)
        wanted.receive(wanted.layer, reduced)
        return (*(gradient.to(query.dtype) for gradient in gradients), None, None)


def by_kernel(query: torch.Tensor, mask: KeyMask, windows: np.ndarray | None) -> bool:
    """Whether one kernel does the backward pass: where kernels run, of a dense model, over whole sequences without padding."""
    whole = mask.explicit is None and mask.real is None and mask.n_queries == mask.n_keys
    if windows is not None or not whole or not kernel_applies(query):
        return False
    # Imported here: Triton may be missing.
    from moa_lab.kernels.influence import holds_blocks

    return holds_blocks(query) and works(query.device, query.dtype, query.shape[-1])


@cache
def works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel finds what plain PyTorch finds, tried once on a short sequence. If not, the log says why."""
    from moa_lab.kernels.influence import backward_with_influence

    generator, scale, sink_tokens = torch.Generator().manual_seed(0), head_dim**-0.5, 10
    shapes = [(1, heads, 200, head_dim) for heads in (4, 2, 2, 4)]
    query, key, value, slope = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    try:
        gradients, sums = backward_with_influence(query, key, value, slope, sink_tokens, scale)
        wanted, result = _by_row_blocks((query, key, value, slope), KeyMask(1, 200, 200, device), scale, None, None, sink_tokens)
        for found, expected in zip((*gradients, *sums), (*wanted, result.blocks, result.distances, result.span_effects), strict=True):
            torch.testing.assert_close(found, expected, atol=CLOSE * float(expected.abs().max()), rtol=CLOSE)
    # Whatever keeps a compiler from a device that nobody has tried, PyTorch runs there.
    except Exception as error:
        logger.warning("influence is computed by plain PyTorch, which takes longer: the kernel cannot be used here: %s", one_line(error))
        return False
    return True


def _by_row_blocks(tensors: Sequence[torch.Tensor], *settings: Any) -> tuple[tuple[torch.Tensor, ...], LayerInfluence]:
    work_dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    query, key, value, gradient = (tensor.to(work_dtype) for tensor in tensors)
    return backward_by_row_blocks(query, key, value, gradient, *settings)
