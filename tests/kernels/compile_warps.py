"""Compile the kernel that reads codes by single warps for GPUs that are not there, and tell its PTX as JSON by case.

A process of its own: where Triton's interpreter is on, nothing compiles.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from moa_lab.kernels.decode_warps import decode_warps_kernel

POINTERS = {
    **dict.fromkeys(["query", "numbers"], "*bf16"), **dict.fromkeys(["part_output", "part_max", "part_sum"], "*fp32"),
    **dict.fromkeys(["codes", "grids", "table", "sides", "lengths", "segments", "bounds"], "*i32"),
}  # fmt: skip
NUMBERS = {
    **dict.fromkeys(["query_batch", "query_head", "sink_tokens", "reach"], "i32"), **dict.fromkeys(["scale", "softcap"], "fp32"),
    **dict.fromkeys(["numbers_batch", "codes_batch", "grids_batch"], "i64"),
}  # fmt: skip


def ptx_of(capability: int, head_dim: int, pairs: list[list[int]], group: int = 1, capped: bool = False, reaches: bool = False) -> str:
    """PTX of the kernel for an NVIDIA architecture, by its compute capability times 10."""
    names = decode_warps_kernel.arg_names
    fixed = {
        "GROUP": group, "ROWS": max(triton.next_power_of_2(group), 8), "HEAD_DIM": head_dim, "TILE": min(32, 4096 // head_dim),
        "CAPPED": capped, "REACHES": reaches, "PAIRS": tuple(map(tuple, pairs)), "ALIGNED": 8,
    }  # fmt: skip
    signature = {name: (POINTERS | NUMBERS).get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*POINTERS, "query_head", "codes_batch", "numbers_batch"]}
    source = GluonASTSource(decode_warps_kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1}).asm["ptx"])


if __name__ == "__main__":
    print(json.dumps([ptx_of(**case) for case in json.loads(sys.argv[1])]))
