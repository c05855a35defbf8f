"""Devices and dtypes by name, checked before anything is loaded."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_of(device: str | int | torch.device | None = None) -> torch.device:
    """The device of that name; None: cuda where there is one, else the CPU.

    Raises ValueError for an unknown name, and for a device that this machine (or this build of PyTorch) does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is none that PyTorch knows; {_choice()}") from error
    if (found.index or 0) >= _count(found.type):
        raise ValueError(f"device {str(device)!r} is not on this machine, or not in this PyTorch ({torch.__version__}); {_choice()}")
    return found


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name, of `DTYPES`; None for None. Raises ValueError for another name or dtype."""
    if dtype is None:
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that has it, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _count(kind: str) -> int:
    """How many devices of a kind there are; 0 for kinds that nothing can be computed on ("meta")."""
    if kind == "cpu":
        return 1
    try:
        module = torch.get_device_module(kind)
    except (RuntimeError, AssertionError):
        return 0
    return int(module.device_count()) if module.is_available() else 0


def _choice() -> str:
    found = [f"{kind}:{index}" for kind in ("cuda", "xpu", "mps") for index in range(_count(kind))]
    return f"use one of: {', '.join(['cpu', *found])}"
