"""Bytes that a plan's cache really allocates, to compare with those its spans predict."""

from __future__ import annotations

import torch

from moa_lab.cache import allocated_kv_bytes
from moa_lab.plan import Plan
from moa_lab.records import ALLOCATED, Measurement


def memory_row(plan: Plan, length: int, device: torch.device | str = "cpu") -> Measurement:
    """Bytes of K and V allocated for one sequence of `length` tokens, in bfloat16."""
    size = float(allocated_kv_bytes(plan, length, torch.bfloat16, device))
    return Measurement(plan.name, ALLOCATED, "cache", length, size, 1, size, size, plan.density(length))
