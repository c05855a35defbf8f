"""Kernel time on a GPU: replayed CUDA graphs, cold caches, medians; and the ceilings that rates are compared with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Literal

import torch

Call = Callable[[], object]

REPLAYS = 20
"""Timed replays, of which the median is taken."""

REPLAY_MS = 20.0
"""Length of a replay: long enough that launch overhead and clock resolution do not matter."""

WARM_UP_REPLAYS = 2
CACHES = 4
"""Working sets smaller than this many L2 caches take turns with copies of themselves."""

MAX_COPIES = 32
COPY_BYTES = 2 * 2**30
READ_BYTES = 2**30
MATMUL_SIDE = 8192

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call; `spread`: the quartiles' distance over the median.

    timer: "graph" where calls were replayed from a CUDA graph, "events" where they could not be captured, so that launches count,
    "clock" on a CPU, where the number is not meaningful.
    """

    ms: float
    spread: float
    timer: Literal["graph", "events", "clock"]

    def rate(self, work: float) -> float:
        """`work` of one call, per second."""
        return work / (self.ms * 1e-3)


def copies_past_cache(working_bytes: int, device: torch.device) -> int:
    """How many copies of inputs of `working_bytes` must take turns, so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(ceil(CACHES * cache / max(working_bytes, 1)), 1), MAX_COPIES)


def time_calls(calls: Sequence[Call], device: torch.device) -> Timing:
    """Time of one call, where `calls` do the same work on copies of the inputs and take turns."""
    if device.type != "cuda":
        return _by_clock(calls)
    rounds = _rounds(calls)

    def loop() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    graph = _captured(loop)
    run, timer = (loop, "events") if graph is None else (graph.replay, "graph")
    for _ in range(WARM_UP_REPLAYS):
        run()
    found = sorted(_elapsed(run) / (rounds * len(calls)) for _ in range(REPLAYS))
    middle = median(found)
    spread = (found[3 * len(found) // 4] - found[len(found) // 4]) / middle
    return Timing(middle, spread, "graph" if timer == "graph" else "events")


def copy_rate(device: torch.device, nbytes: int = COPY_BYTES) -> float:
    """Bytes/s, read and written, of a large copy within the device."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return time_calls([lambda: target.copy_(source)], device).rate(2 * nbytes)


def read_rate(device: torch.device, nbytes: int = READ_BYTES) -> float:
    """Bytes/s of a pure read: a sum over `nbytes` of bfloat16, of which one number is written."""
    source = torch.ones(nbytes // torch.bfloat16.itemsize, dtype=torch.bfloat16, device=device)
    return time_calls([source.sum], device).rate(nbytes)


def matmul_rate(device: torch.device, side: int = MATMUL_SIDE) -> float:
    """FLOP/s of a large bfloat16 product of random matrices."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
    return time_calls([lambda: left @ right], device).rate(2.0 * side**3)


def _by_clock(calls: Sequence[Call]) -> Timing:
    start = time.perf_counter()
    for call in calls:
        call()
    return Timing((time.perf_counter() - start) * 1e3 / len(calls), 0.0, "clock")


def _rounds(calls: Sequence[Call]) -> int:
    """Rounds over `calls` that take about `REPLAY_MS`; also compiles and warms up, on a side stream, as graph capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()
        once = _elapsed(lambda: [call() for call in calls])
    torch.cuda.current_stream().wait_stream(stream)
    return min(max(ceil(REPLAY_MS / max(once, 1e-3)), 1), 200)


def _captured(loop: Call) -> torch.cuda.CUDAGraph | None:
    """A graph of `loop`; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer context restores the stream, which a failed capture does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            loop()
    except RuntimeError as error:
        logger.info("not captured, timed by events: %s", error)
        torch.cuda.synchronize()
        return None
    return graph


def _elapsed(run: Call) -> float:
    """Milliseconds between two events around `run`."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
