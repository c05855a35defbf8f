"""Profiling the influence of a 7B model's heads: seconds and memory per sample against limits (C1)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, __version__

from moa_lab import processes
from moa_lab.bench.lab import bench_device, bench_dtype, device_name
from moa_lab.bench.models import LLAMA2_7B, TINY, ModelShape, random_model
from moa_lab.bench.record import GOALS, BenchRecord, errors, is_right, judged
from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.interface import AttentionCall
from moa_lab.masks import KeyMask
from moa_lab.plan import SINK_TOKENS
from moa_lab.profiling import estimate_cost, profile
from moa_lab.profiling.capture import capturing
from moa_lab.profiling.influence import LayerInfluence, naive_influence
from moa_lab.provenance import provenance
from moa_lab.records import BLOCK_TOKENS, InfluenceProfile

ROW = "C1"
TOKENS, QUICK_TOKENS = 4096, 128
CHECK_TOKENS = 512
SAMPLES = 4
ANSWER_TOKENS = 64
MOST_SECONDS, MOST_GB = 1.2, 12.0
"""Limits per sample: seconds, and GB of memory beside the weights."""


def bench_profile(quick: bool = False, progress: Callable[[int, int], None] | None = None) -> BenchRecord:
    """Profile random samples of 4096 tokens on a random model of the Llama-2-7B geometry, as `profile` does for a user; row C1, twice.

    Seconds per sample, and peak memory beside the weights, with the defaults of `profile`. The first sample, a warm-up, is not timed.
    Several processes (`moa_lab.processes.joined`) share the samples, as many for each as one has alone: seconds are those of all of them.
    quick: a tiny model, also without a GPU, where no row meets its goal and memory is the estimate.
    progress: called with samples done and samples in all. Raises ValueError without a GPU where not quick.
    """
    device = bench_device("bench_profile", quick)
    shape, tokens = (TINY, QUICK_TOKENS) if quick else (LLAMA2_7B, TOKENS)
    dtype = bench_dtype(device)
    right = influence_errors(shape, min(CHECK_TOKENS, tokens), device, dtype)
    model = random_model(shape, tokens, device, dtype)
    seconds, detail = _profiled(model, tokens, progress)
    detail |= right
    described = {
        "model": shape.name, "query_heads": shape.query_heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "batch": 1,
        "n_tokens": tokens, "plan": "none", "density": 1.0, "skew": 1.0,
    }  # fmt: skip
    trusted = device.type == "cuda" and not quick and detail["finite"] and is_right(right)
    gigabytes = (detail["peak_bytes"] - detail["weight_bytes"]) / 1e9
    rows = tuple(
        judged(ROW, GOALS[ROW], described, found, limit, "limit", unit, trusted, detail)
        for found, limit, unit in ((seconds, MOST_SECONDS, "s"), (gigabytes, MOST_GB, "GB"))
    )
    name = device_name(device)
    settings = {
        "device": name, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "transformers": __version__,
        "quick": quick, "weights": "random", "processes": processes.started(),
    }  # fmt: skip
    return BenchRecord(rows, settings, provenance(device=name, seed=0))


def _profiled(model: PreTrainedModel, tokens: int, progress: Callable[[int, int], None] | None) -> tuple[float, dict[str, Any]]:
    """Seconds per sample after the first, and details as JSON data."""
    device, on_gpu = model.device, model.device.type == "cuda"
    weights = sum(parameter.nbytes for parameter in model.parameters())
    samples = random_samples(model.config.vocab_size, tokens, processes.started())
    estimate = estimate_cost(model, samples)
    predicted = estimate.checkpointed_bytes if estimate.checkpoint else estimate.needed_bytes
    ticks: list[tuple[int, float]] = []

    def told(done: int, total: int) -> None:
        ticks.append((done, time.perf_counter()))
        if progress is not None:
            progress(done, total)

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    found = profile(model, SampleSet(samples), progress=told)
    times = seconds_each(after_rounds(ticks, processes.started()))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else weights + predicted
    detail = {
        "samples": len(times), "answer_tokens": len(samples[0].answer_positions), "seconds": times, "recomputed": estimate.checkpoint,
        "weight_bytes": weights, "peak_bytes": peak, "predicted_bytes": predicted,
        "counted_by": "torch.cuda" if on_gpu else "estimate", "finite": is_finite(found),
    }  # fmt: skip
    # What was done is told to the first process alone.
    return float(np.mean(times)) if times else math.nan, detail


def random_samples(vocabulary: int, tokens: int, processes: int = 1) -> tuple[Sample, ...]:
    """For each process one warm-up sample and the timed ones: random tokens, the last of them the answer."""
    random = np.random.default_rng(0)
    answer = ((tokens - min(ANSWER_TOKENS, tokens // 2), tokens),)
    return tuple(Sample("random", random.integers(vocabulary, size=tokens), answer) for _ in range(processes * (1 + SAMPLES)))


def after_rounds(ticks: list[tuple[int, float]], processes: int) -> list[tuple[int, float]]:
    """The first tick, and those after which every process had done as many batches: what they did is exchanged then, and told at once."""
    told = ticks[1:]
    return [*ticks[:1], *told[processes - 1 :: processes], *(told[-1:] if len(told) % processes else ())]


def seconds_each(ticks: list[tuple[int, float]]) -> list[float]:
    """Seconds of every sample after the first batch, a warm-up, from (samples done, time) at the start and after every batch.

    Samples of one batch share its time evenly; a single batch is timed itself.
    """
    times: list[float] = []
    timed = ticks[1:] if len(ticks) > 2 else ticks
    for (before, began), (done, ended) in pairwise(timed):
        times += [(ended - began) / (done - before)] * (done - before)
    return times


def is_finite(found: InfluenceProfile) -> bool:
    """True where a profile is finite and every head has some influence."""
    arrays = [*found.blocks.values(), *found.distances.values(), *found.span_effects.values()]
    return all(np.isfinite(array).all() for array in arrays) and all(
        bool((blocks.sum(axis=(-2, -1)) > 0).all()) for blocks in found.blocks.values()
    )


def influence_errors(shape: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, float | None]:
    """Errors of a layer's influence in 64 x 64 blocks against the naive full matrices in float32, on random values."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, shape.head_dim, generator=generator, device=device, dtype=dtype)

    query, key, value, gradient = drawn(shape.query_heads), drawn(shape.kv_heads), drawn(shape.kv_heads), drawn(shape.query_heads)
    inputs = tuple(tensor.requires_grad_() for tensor in (query, key, value))
    scale = shape.head_dim**-0.5
    call = AttentionCall(query, key, value, KeyMask(1, tokens, tokens, device), scale, softcap=None)
    received: dict[int, LayerInfluence] = {}
    torch.autograd.grad(capturing(0, received.__setitem__, SINK_TOKENS)(call), inputs, gradient)
    query, key, value, gradient = (tensor.detach().float() for tensor in (*inputs, gradient))
    full = naive_influence(query, key, value, gradient, call.positions >= 0, scale).abs()
    tiles = tokens // BLOCK_TOKENS
    expected = full.reshape(1, shape.query_heads, tiles, BLOCK_TOKENS, tiles, BLOCK_TOKENS).sum(dim=(3, 5))
    return errors(received[0].blocks, expected)
