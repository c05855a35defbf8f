"""Labs for tests: where kernels run here, and one that takes every time for a GPU's."""

from __future__ import annotations

from typing import Any

import torch

from moa_lab.bench.lab import Lab
from moa_lab.bench.record import is_right
from moa_lab.bench.shapes import default_plans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


class TrustingLab(Lab):
    """One that takes its times for a GPU's, to see what else keeps a row from its goal."""

    def trusts(self, *found: Any) -> bool:
        return all(is_right(dict(each)) for each in found)


def plain_lab() -> Lab:
    """Ceilings of 1 GB/s."""
    return Lab(DEVICE, DTYPE, default_plans(), copy_bytes=1e9, read_bytes=1e9, matmul_flops=0.0)


def trusting_lab() -> Lab:
    """Copy and read so slow that any kernel is fast."""
    return TrustingLab(DEVICE, DTYPE, default_plans(), copy_bytes=1e-3, read_bytes=1e-3, matmul_flops=0.0)
