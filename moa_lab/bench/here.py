"""This machine's own GPU, as the calculator of capacities wants to know it."""

from __future__ import annotations

from functools import cache

import torch

from moa_lab.bench.timing import matmul_rate, read_rate
from moa_lab.capacity import Gpu, altered, gpu_of

HERE = "here"
"""The name that stands for this machine's GPU."""


def is_here() -> bool:
    """Whether this machine has a GPU."""
    return torch.cuda.is_available()


@cache
def this_gpu() -> Gpu:
    """The current GPU, its rates read off it, which takes some seconds, once. Raises ValueError where there is none."""
    if not is_here():
        raise ValueError(f"--gpu {HERE}: this machine has no GPU; name one, or say --memory-gb and --read-gb-s of another")
    device = torch.device("cuda", torch.cuda.current_device())
    told = torch.cuda.get_device_properties(device)
    return Gpu(f"{told.name} (here)", int(told.total_memory), read_rate(device), matmul_rate(device), measured=True)


def gpu_named(name: str, memory_gb: float | None = None, read_gb_s: float | None = None) -> Gpu:
    """As `gpu_of`; `HERE` is this machine's, with the memory and reading that are given instead of its own."""
    return altered(this_gpu(), memory_gb, read_gb_s) if name == HERE else gpu_of(name, memory_gb, read_gb_s)
