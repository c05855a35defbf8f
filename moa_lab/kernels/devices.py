"""What a device says of itself, by which tiles, stages and kernels are chosen; never its name."""

from __future__ import annotations

from functools import cache

import torch
import triton

UNLIMITED = 2**40
"""Bytes of shared memory in Triton's interpreter."""
SPARE = 12 * 1024
"""Bytes of shared memory for what is no tile: reductions, and numbers that change hands between threads."""


def room_for_tiles(tensor: torch.Tensor) -> int:
    """Bytes of shared memory for tiles of keys and values in a program on the tensor's device."""
    return (_shared_memory(tensor.device.index) if tensor.is_cuda else UNLIMITED) - SPARE


def nvidia_capability(tensor: torch.Tensor) -> tuple[int, int] | None:
    """NVIDIA's compute capability of the tensor's device; None elsewhere (PyTorch tells AMD's devices by numbers of the same kind)."""
    if not tensor.is_cuda or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability(tensor.device)


def wave_lanes(tensor: torch.Tensor) -> int | None:
    """Lanes of a wave on a chip of AMD's, None elsewhere. A program of as many waves of 32 holds half of what fits in the registers of one
    of 64, and its products hold their operands twice."""
    if not tensor.is_cuda or torch.version.hip is None:
        return None
    return int(torch.cuda.get_device_properties(tensor.device).warp_size)


def precision(tensor: torch.Tensor) -> str:
    """How a dot product takes numbers of the tensor's dtype: float32 as they are; what is narrower is never rounded, and not all devices
    know another word for it."""
    return "ieee" if tensor.dtype == torch.float32 or nvidia_capability(tensor) is None else "tf32"


@cache
def _shared_memory(device: int) -> int:
    # Cached, since every layer of every prefill asks.
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])
