"""The setup that all measurements of a record share: device, plans, ceilings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moa_lab.bench.record import is_right
from moa_lab.bench.shapes import Shape, Spans, default_plans, stretched_spans
from moa_lab.bench.timing import READ_BYTES, Timing, copy_rate, matmul_rate, read_rate
from moa_lab.plan import Plan, PlanOrPath, as_plan

INTERPRETER = "interpreter"
TINY_COPY_BYTES = 2**16
READ = "read, not copy"
"""A peer: `Lab.read_bytes`."""


@dataclass(frozen=True)
class Lab:
    """device: a GPU, or the CPU under Triton's interpreter. dtype: of queries, keys and values.

    plans: by name. copy_bytes: bytes/s of a copy, read and written; read_bytes: bytes/s of a pure read; matmul_flops: FLOP/s of a
    product, 0 under the interpreter.
    """

    device: torch.device
    dtype: torch.dtype
    plans: Mapping[str, Plan]
    copy_bytes: float
    read_bytes: float
    matmul_flops: float

    @property
    def is_gpu(self) -> bool:
        """True on a GPU: times under the interpreter are not meaningful."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """The GPU's name, or "interpreter"."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else INTERPRETER

    @property
    def architecture(self) -> str | None:
        """What kernels are compiled for, as "sm_90" or "gfx942"; None under the interpreter."""
        if not self.is_gpu:
            return None
        if torch.version.hip is not None:
            return str(torch.cuda.get_device_properties(self.device).gcnArchName).split(":")[0]
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    @property
    def read_by(self) -> str:
        """What `read_bytes` was measured with."""
        return f"sum over {(READ_BYTES if self.is_gpu else TINY_COPY_BYTES) // 2**10} KiB of bfloat16"

    def spans(self, shape: Shape) -> Spans:
        """The spans of a shape's heads."""
        return stretched_spans(self.plans[shape.plan], shape.kv_heads, shape.n_tokens)

    def trusts(self, *errors: Mapping[str, float | None]) -> bool:
        """True where a row may meet its goal: timed on a GPU, with errors within the tolerance."""
        return self.is_gpu and all(is_right(dict(found)) for found in errors)

    def random(self, seed: int, *size: int) -> torch.Tensor:
        """Normal numbers in the lab's dtype."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(size, generator=generator, device=self.device, dtype=self.dtype)

    def release(self) -> None:
        """Return cached memory to the GPU, so that the next shape can use all of it."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def open_lab(quick: bool, plan: PlanOrPath | None) -> Lab:
    """The lab of this machine. Raises ValueError where nothing can be measured: no GPU, and not quick under Triton's interpreter."""
    plans = default_plans() if plan is None else _own(plan)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available() and not interpreted:
        device = torch.device("cuda", torch.cuda.current_device())
        return Lab(device, torch.bfloat16, plans, copy_rate(device), read_rate(device), matmul_rate(device))
    if not (quick and interpreted):
        raise ValueError("bench_kernels needs a GPU; without one, quick=True under TRITON_INTERPRET=1 runs all of it on tiny shapes")
    device = torch.device("cpu")
    # float16: Triton's interpreter multiplies bfloat16 wrongly.
    return Lab(device, torch.float16, plans, copy_rate(device, TINY_COPY_BYTES), read_rate(device, TINY_COPY_BYTES), 0.0)


def bench_device(name: str, quick: bool) -> torch.device:
    """The GPU, or, quick, the CPU where there is none. Raises ValueError, naming the benchmark, without a GPU if not quick."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not quick:
        raise ValueError(f"{name} needs a GPU; without one, quick=True runs all of it on a tiny model")
    return torch.device("cpu")


def bench_dtype(device: torch.device) -> torch.dtype:
    """The dtype that a model is measured in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def timing_detail(timing: Timing) -> dict[str, Any]:
    """A timing as JSON data."""
    return {"ms": timing.ms, "spread": timing.spread, "timer": timing.timer}


def _own(plan: PlanOrPath) -> dict[str, Plan]:
    loaded = as_plan(plan)
    return {loaded.name: loaded}
