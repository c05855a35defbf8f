"""Prefill under a plan: useful FLOP/s against FlexAttention and dense attention (P1; P3 at other head_dims), and
wall clock against dense (P2)."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np
import torch

from moa_lab.bench.lab import Lab, timing_detail
from moa_lab.bench.peers import Inputs, flash4_prefill, flex_prefill, measured, sdpa_prefill, triton_prefill
from moa_lab.bench.record import GOALS, BenchRow, errors, judged
from moa_lab.bench.shapes import Shape, Spans, dense_flops, described, prefill_flops
from moa_lab.bench.timing import copies_past_cache, time_calls
from moa_lab.kernels.dispatch import HAS_FLASH
from moa_lab.kernels.reference import windowed_attention

TERA = 1e12
TRITON, FLASH = "our Triton kernel", "FlashAttention-4"


def prefill_rows(shape: Shape, lab: Lab, rows: Collection[str]) -> list[BenchRow]:
    """The rows of `rows` (P1, P2, P3) from one measurement of `shape`."""
    spans = lab.spans(shape)
    inputs = all_inputs(shape, lab)
    expected, work = expected_prefill(*inputs[0], spans, shape.scale), prefill_flops(shape, spans) / TERA
    ours, trusted = _ours(shape, spans, inputs, expected, lab)
    peers = _dense_peers(shape, inputs, lab)
    # Beside the one of the two that is taken, the other.
    other, attend = (FLASH, flash4_prefill) if ours["kernel"] == TRITON else (TRITON, triton_prefill)
    peers[other] = measured(other, lambda: [attend(*each, spans) for each in inputs], work, lab, expected)
    if shape.flex and "P1" in rows:
        peers["FlexAttention"] = measured("FlexAttention", lambda: [flex_prefill(*each, spans) for each in inputs[:1]], work, lab, expected)
    detail = {**ours, "useful_flops": prefill_flops(shape, spans), "peers": peers}
    names = ("cuDNN", "FlexAttention") if shape.flex else ("cuDNN",)
    found = [_rate_row("P1", shape, spans, name, detail, trusted) for name in names if "P1" in rows]
    found += [_wall_clock_row(shape, spans, detail, trusted)] if "P2" in rows else []
    return found + ([_rate_row("P3", shape, spans, "cuDNN", detail, trusted)] if "P3" in rows else [])


def expected_prefill(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float) -> torch.Tensor:
    """The reference in float32, on the same numbers: (batch, query_heads, n_tokens, head_dim)."""
    n_tokens = query.shape[2]
    index = torch.arange(n_tokens, device=query.device, dtype=torch.int32)
    # A view: a stored position for every pair would take gigabytes. The reference hides future keys by itself.
    positions = index.expand(1, 1, n_tokens, n_tokens)
    return windowed_attention(
        query.float(), key.float(), value.float(), index[None, None, :, None], positions, spans.sink_tokens, np.array(spans.windows), scale
    )  # fmt: skip


def all_inputs(shape: Shape, lab: Lab) -> list[Inputs]:
    """Random numbers, with as many copies as take turns past the cache."""
    heads = (shape.query_heads, shape.kv_heads, shape.kv_heads)
    nbytes = 2 * (shape.query_heads + shape.kv_heads) * shape.batch * shape.n_tokens * shape.head_dim * lab.dtype.itemsize

    def one(seed: int) -> Inputs:
        query, key, value = (lab.random(seed + part, shape.batch, n, shape.n_tokens, shape.head_dim) for part, n in enumerate(heads))
        return query, key, value

    return [one(3 * copy) for copy in range(copies_past_cache(nbytes, lab.device))]


def _ours(shape: Shape, spans: Spans, inputs: list[Inputs], expected: torch.Tensor, lab: Lab) -> tuple[dict[str, Any], bool]:
    """What a prompt takes: its time, rate and errors, by which kernel, and whether rows may meet their goals (`Lab.trusts`)."""
    # Imported here: Triton may be missing.
    from moa_lab.kernels import flash, prefill

    taken = HAS_FLASH and flash.flash_applies(*inputs[0][:2])
    kernel: Any = flash.prompt_attention if taken else prefill.prefill_attention

    def attend(each: Inputs) -> torch.Tensor:
        found: torch.Tensor = kernel(*each, spans.windows, spans.sink_tokens, shape.scale)
        return found

    found = errors(attend(inputs[0]), expected)
    lab.release()
    timing = time_calls([partial(attend, each) for each in inputs], lab.device)
    rate = timing.rate(prefill_flops(shape, spans) / TERA)
    named = {"kernel": FLASH if taken else TRITON}
    return {**timing_detail(timing), "rate": rate, **named, **found}, lab.trusts(found)


def _dense_peers(shape: Shape, inputs: list[Inputs], lab: Lab) -> dict[str, Any]:
    """Dense causal attention; its rate counts the FLOPs of all causal pairs."""
    work = dense_flops(shape) / TERA
    return {
        "SDPA flash": measured("SDPA flash", lambda: sdpa_prefill("SDPA flash", inputs), work, lab),
        "cuDNN": measured("cuDNN", lambda: sdpa_prefill("cuDNN", inputs), work, lab),
    }


def _rate_row(row: str, shape: Shape, spans: Spans, name: str, detail: dict[str, Any], trusted: bool) -> BenchRow:
    """P1 or P3: useful TFLOP/s against a peer's."""
    goal, peer = GOALS[f"{row} {name}"], detail["peers"][name].get("rate")
    return judged(row, goal, described(shape, spans), detail["rate"], peer, name, "TFLOP/s", trusted, detail)


def _wall_clock_row(shape: Shape, spans: Spans, detail: dict[str, Any], trusted: bool) -> BenchRow:
    """P2: milliseconds against cuDNN's for all causal pairs."""
    peer = detail["peers"]["cuDNN"].get("ms")
    return judged("P2", GOALS["P2"], described(shape, spans), detail["ms"], peer, "cuDNN", "ms", trusted, detail)
