"""Prefill in chunks: new tokens over a ring against the same tokens over keys that are all there (P4)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moa_lab.bench.lab import Lab, timing_detail
from moa_lab.bench.prefill import TERA, all_inputs, expected_prefill
from moa_lab.bench.record import GOALS, BenchRow, errors, judged
from moa_lab.bench.shapes import Shape, described, prefill_flops
from moa_lab.bench.timing import time_calls
from moa_lab.cache import LayerLayout, RingLayer

CHUNKS = 4
"""Of a prompt; the last is measured."""
WHOLE = "the same without a ring"


def chunk_row(shape: Shape, lab: Lab) -> BenchRow:
    """P4: useful TFLOP/s, against those of the same tokens without a ring."""
    # Imported here: Triton may be missing.
    from moa_lab.kernels.prefill import chunk_attention, prefill_attention

    spans, past = lab.spans(shape), shape.n_tokens - shape.n_tokens // CHUNKS
    inputs = all_inputs(shape, lab)
    expected = expected_prefill(*inputs[0], spans, shape.scale)[:, :, past:]
    layout = LayerLayout(spans.sink_tokens, spans.windows, None, shape.n_tokens)
    lengths = torch.full((shape.batch,), shape.n_tokens, dtype=torch.int32, device=lab.device)
    padding, before = torch.zeros_like(lengths), torch.full_like(lengths, past)

    def over_ring(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        ring = RingLayer(layout, shape.batch, shape.head_dim, lab.dtype, lab.device)
        ring.write(key[:, :, :past], value[:, :, :past], before, padding)
        asked, new_key, new_value = (x[:, :, past:].contiguous() for x in (query, key, value))
        return partial(chunk_attention, asked, new_key, new_value, ring, lengths, padding, shape.scale)

    def without(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        return partial(prefill_attention, query[:, :, past:].contiguous(), key, value, spans.windows, spans.sink_tokens, shape.scale)

    calls = [over_ring(*each) for each in inputs]
    found = errors(calls[0](), expected)
    lab.release()
    ours = time_calls(calls, lab.device)
    del calls
    whole = time_calls([without(*each) for each in inputs], lab.device)
    work = prefill_flops(shape, spans) - prefill_flops(replace(shape, n_tokens=past), spans)
    rates = ours.rate(work / TERA), whole.rate(work / TERA)
    detail = {**timing_detail(ours), **found, "chunk": shape.n_tokens - past, "whole": timing_detail(whole)}
    return judged("P4", GOALS["P4"], described(shape, spans), *rates, WHOLE, "TFLOP/s", lab.trusts(found), detail)
