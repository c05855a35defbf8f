"""A measurement that may fail: what others' libraries, compilers and memory refuse must not end a benchmark."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


def tried_run(run: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The result of `run`, or why it "failed", and whether it was "out_of_memory"; all its memory is freed."""
    try:
        found = run()
    except Exception as error:
        reason = " ".join(str(error).split())
        logger.info("a side did not run: %s: %s", type(error).__name__, reason)
        short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower() or "ALLOC_FAILED" in str(error)
        found = {"failed": f"{type(error).__name__}: {reason}"[:300], "out_of_memory": short}
    release(device)
    return found


def release(device: torch.device) -> None:
    """Forget what was compiled, and give memory that nobody uses back to the device."""
    torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
