"""Fake quantisation: the model computes with the dequantised values of a narrower cache, or of narrower weights.

Round to nearest on an even grid between the smallest and the largest value of a group. A group would store its smallest value and
the step in 16 bits each, so both are rounded to float16. Nothing is packed and no memory is saved: this measures what the bits cost
in quality; `stored_bytes` counts bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from moa_lab.cache.storage import as_stored, heads_as_stored
from moa_lab.interface import AttentionCall, Handler, route_attention
from moa_lab.kernels.dispatch import span_attention
from moa_lab.plan import UNTOUCHED, Plan
from moa_lab.plan.bits import GRID_BYTES

WEIGHT_GROUP = 64
"""Neighbouring weights of one output that share a grid."""


def stored_bytes(numbers: int, groups: int, bits: int) -> float:
    """Bytes of `numbers` values of `bits` bits in `groups` groups; 16 bits need no groups."""
    return numbers * bits / 8 + (GRID_BYTES * groups if bits < UNTOUCHED else 0)


def fake_quantise(values: torch.Tensor, bits: torch.Tensor | int, group: int | None = None) -> torch.Tensor:
    """`values` (..., n) quantised to `bits` bits and back, in their dtype; 16 bits or more leave them unchanged.

    Every `group` neighbours along the last dimension share a grid (None: all n; the last group may be shorter). bits: a number, or an
    integer tensor that broadcasts with (..., 1), for instance (kv_heads, 1, 1), or with more dimensions in front, which the result gets.
    """
    if group is None:
        return as_stored(values, bits)
    n = values.shape[-1]
    spare = -n % group
    # Padding with a value of the group changes neither its minimum nor its maximum.
    padded = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], spare)], dim=-1) if spare else values
    widths = torch.as_tensor(bits, device=values.device)[..., None]
    return as_stored(padded.unflatten(-1, (-1, group)), widths).flatten(-2)[..., :n]


@contextlib.contextmanager
def quantised_cache(model: PreTrainedModel, widths: np.ndarray, plan: Plan, n_tokens: int) -> Iterator[None]:
    """The model under `plan` at length `n_tokens`, with K and V as a cache of these widths holds them; restored on exit.

    widths: int (layers, kv_heads, 2), the bits of K and of V. K is quantised after rotary embedding, each token's vector of a head by
    itself, so one pass over a sequence sees the same values as decoding token by token. Raises ValueError for another shape.
    """
    shape = (plan.geometry.layers, plan.geometry.kv_heads, 2)
    if widths.shape != shape:
        raise ValueError(f"widths must be (layers, kv_heads, 2) = {shape}, got {widths.shape}")
    windows = plan.windows(n_tokens)

    def handler(layer: int) -> Handler:
        bits = [(int(key), int(value)) for key, value in widths[layer]]

        def attend(call: AttentionCall) -> torch.Tensor:
            key, value = heads_as_stored(call.key, call.value, bits)
            return span_attention(
                call.query, key, value, call.mask, plan.sink_tokens, windows[layer], call.scale, call.softcap, call.sink_logits
            )

        return attend

    with route_attention(model, handler):
        yield


def linear_modules(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear modules of the decoder by name, without embeddings and output layer. Raises ValueError where there are none."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = (get_decoder() if get_decoder else None) or model
    output = model.get_output_embeddings()
    found = {
        name: module for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear) and module is not output
    }  # fmt: skip
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear modules in its decoder whose weights could be quantised")
    return found


@contextlib.contextmanager
def quantised_weights(model: PreTrainedModel, widths: Mapping[str, int]) -> Iterator[None]:
    """The model with the weights of these modules (names of `linear_modules`) in so many bits, in groups of 64 along their inputs.

    The original tensors are restored on exit, also after an exception. Raises ValueError for a name that is no linear module.
    """
    modules = linear_modules(model) if widths else {}
    unknown = set(widths) - set(modules)
    if unknown:
        raise ValueError(f"{type(model).__name__} has no linear module {min(unknown)!r}")
    before = {name: modules[name].weight.data for name in widths}
    try:
        for name, bits in widths.items():
            modules[name].weight.data = fake_quantise(before[name], bits, WEIGHT_GROUP)
        yield
    finally:
        for name, weight in before.items():
            modules[name].weight.data = weight
