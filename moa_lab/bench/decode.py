"""Decode over full rings: bytes per second against a pure read (D1, D3), and the cost of unequal spans (D2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moa_lab.bench.filling import fill_ring
from moa_lab.bench.lab import READ, Lab, timing_detail
from moa_lab.bench.peers import flashinfer_decode, flex_decode, measured, sdpa_decode
from moa_lab.bench.record import GOALS, BenchRow, errors, judged
from moa_lab.bench.shapes import Shape, Spans, described, kv_bytes
from moa_lab.bench.timing import copies_past_cache, time_calls
from moa_lab.cache import LayerLayout, RingLayer, ring_layer
from moa_lab.kernels.dispatch import new_schedule
from moa_lab.kernels.ring_reference import newest_attention
from moa_lab.kernels.schedule import DecodeSchedule, decode_schedule
from moa_lab.plan import WHOLE_BITS

INTERPRETER_PROGRAMS = 5
GIGA = 1e9
FEW_BYTES = 10e6
"""Of D3: fewer than these are judged by the time of a step, most of which is launches."""
FEW_BYTES_US = 8.0


@dataclass(frozen=True)
class DecodeInputs:
    """One step's query (batch, query_heads, 1, head_dim), a ring in which every head is full, lengths int32 (batch,).

    dense: keys and values of all tokens, (batch, kv_heads, n_tokens, head_dim) each, of which the ring holds its part; None where
    no peer reads them: the ring then holds random numbers.
    """

    query: torch.Tensor
    ring: RingLayer
    lengths: torch.Tensor
    schedule: DecodeSchedule
    scale: float
    dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self) -> torch.Tensor:
        """Our kernel."""
        # Imported here: Triton may be missing.
        from moa_lab.kernels import decode

        return decode.decode_attention(self.query, self.ring, self.lengths, self.schedule, self.scale)

    def expected(self) -> torch.Tensor:
        """The reference in float32, on the same numbers."""
        return newest_attention(self.query.float(), self.ring.in_float32(), self.lengths, self.scale)


@dataclass(frozen=True)
class Measured:
    """Our kernel at one shape: milliseconds and useful bytes of a step, errors, how it was timed."""

    ms: float
    nbytes: int
    errors: dict[str, float | None]
    detail: dict[str, Any]

    @property
    def rate(self) -> float:
        """Useful bytes/s."""
        return self.nbytes / (self.ms * 1e-3)


def decode_inputs(shape: Shape, spans: Spans, lab: Lab, seed: int = 0, dense: bool = False) -> DecodeInputs:
    """Random inputs at full length, stored in the shape's bits. dense: keys and values of all tokens are made, and written to the ring."""
    layout = LayerLayout(spans.sink_tokens, spans.windows, None, shape.n_tokens)
    bits = None if shape.bits == WHOLE_BITS else (shape.bits,) * shape.kv_heads
    ring = ring_layer(layout, shape.batch, shape.head_dim, lab.dtype, lab.device, bits)
    lengths = torch.full((shape.batch,), shape.n_tokens, dtype=torch.int32, device=lab.device)
    query = lab.random(seed, shape.batch, shape.query_heads, 1, shape.head_dim)
    tokens = None
    if dense:
        size = (shape.batch, shape.kv_heads, shape.n_tokens, shape.head_dim)
        tokens = lab.random(seed + 1, *size), lab.random(seed + 2, *size)
        ring.write(*tokens, lengths, torch.zeros_like(lengths))
    else:
        fill_ring(ring, torch.Generator(lab.device).manual_seed(seed + 1))
    return DecodeInputs(query, ring, lengths, _schedule(ring), shape.scale, tokens)


def decode_row(row: str, shape: Shape, lab: Lab) -> BenchRow:
    """D1 or D3: useful bytes/s, as GB/s, against a pure read (D3 of fewer than `FEW_BYTES`: microseconds, against a limit).

    Peers read as many bytes of a dense cache.
    """
    spans = lab.spans(shape)
    inputs, ours = measure(shape, spans, lab, dense=shape.flex)
    peers = _peers(shape, spans, lab)
    if inputs.dense is not None:
        key, value = inputs.dense
        # Output by KV head and group: the order of query heads.
        peers["FlexAttention"] = measured(
            "FlexAttention", lambda: [flex_decode(inputs.query, key, value, spans)], ours.nbytes / GIGA, lab, inputs.expected()
        )
    trusted = lab.trusts(ours.errors)
    detail = {**ours.detail, "useful_bytes": ours.nbytes, "peers": peers}
    told = described(shape, spans)
    if ours.nbytes < FEW_BYTES and row == "D3":
        return judged(row, GOALS["D3 few bytes"], told, ours.ms * 1e3, FEW_BYTES_US, "limit", "us", trusted, detail)
    return judged(row, GOALS[row], told, ours.rate / GIGA, lab.read_bytes / GIGA, READ, "GB/s", trusted, detail)


def heterogeneity_row(shape: Shape, lab: Lab) -> BenchRow:
    """D2: milliseconds with a real plan's spans against equal spans of the same total bytes."""
    spans = lab.spans(shape)
    _, ours = measure(shape, spans, lab)
    lab.release()
    _, uniform = measure(shape, spans.uniform(), lab)
    trusted = lab.trusts(ours.errors, uniform.errors)
    detail = {**ours.detail, "useful_bytes": ours.nbytes, "uniform": uniform.detail}
    return judged("D2", GOALS["D2"], described(shape, spans), ours.ms, uniform.ms, "uniform", "ms", trusted, detail)


def measure(shape: Shape, spans: Spans, lab: Lab, dense: bool = False) -> tuple[DecodeInputs, Measured]:
    """Inputs, and our kernel measured and checked on them."""
    nbytes = kv_bytes(shape, sum(spans.tokens), lab.dtype.itemsize)
    inputs = decode_inputs(shape, spans, lab, dense=dense)
    if inputs.ring.allocated_bytes != nbytes:
        raise ValueError(f"the ring holds {inputs.ring.allocated_bytes} bytes, its spans take {nbytes}")
    found = errors(inputs.attend(), inputs.expected())
    lab.release()
    more = [decode_inputs(shape, spans, lab, seed=3 * index) for index in range(1, copies_past_cache(nbytes, lab.device))]
    timing = time_calls([each.attend for each in (inputs, *more)], lab.device)
    return inputs, Measured(timing.ms, nbytes, found, {**timing_detail(timing), **found})


def _peers(shape: Shape, spans: Spans, lab: Lab) -> dict[str, Any]:
    tokens = spans.mean
    nbytes = kv_bytes(shape, tokens * shape.kv_heads, lab.dtype.itemsize)
    copies = copies_past_cache(nbytes, lab.device)
    return {
        "SDPA flash": measured("SDPA flash", lambda: sdpa_decode("SDPA flash", shape, tokens, copies, lab), nbytes / GIGA, lab),
        "cuDNN": measured("cuDNN", lambda: sdpa_decode("cuDNN", shape, tokens, copies, lab), nbytes / GIGA, lab),
        "FlashInfer": measured("FlashInfer", lambda: flashinfer_decode(shape, tokens, copies, lab), nbytes / GIGA, lab),
    }


def _schedule(ring: RingLayer) -> DecodeSchedule:
    sample = ring.sample
    made = new_schedule(ring, len(sample))
    if made is not None:
        return made
    from moa_lab.kernels.decode import tile_slots

    return decode_schedule(ring.layout.slots, len(sample), tile_slots(ring), INTERPRETER_PROGRAMS, sample.device)
