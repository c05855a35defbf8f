"""The kernel that reads codes by single warps compiles without a GPU; what it computes is tested with all other kernels, on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ring_attends import DEVICE

from moa_lab.cache import LayerLayout, RingLayer, ring_layer
from moa_lab.kernels import decode
from moa_lab.plan import Bits

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

HERE = Path(__file__).parent


def compiled(*cases: dict[str, Any]) -> list[str]:
    """PTX of the kernel, by case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    told = subprocess.run(
        [sys.executable, str(HERE / "compile_warps.py"), json.dumps(cases)], capture_output=True, text=True, env=environment, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return list(json.loads(told.stdout.splitlines()[0]))


@pytest.mark.slow
def test_it_compiles_for_every_head_dim_and_architecture() -> None:
    shapes = zip((80, 86, 89, 90), (64, 128, 256, 128), strict=True)
    cases = [{"capability": capability, "head_dim": head_dim, "pairs": [(8, 8), (4, 4)]} for capability, head_dim in shapes]
    for case, ptx in zip(cases, compiled(*cases), strict=True):
        # Products on tensor cores, and codes in no other place than registers.
        assert "mma.sync.aligned.m16n8k16" in ptx, case
        assert "ld.shared" not in ptx, case


@pytest.mark.slow
def test_it_compiles_for_every_mix_of_a_layer_and_every_group() -> None:
    mixes = [[(8, 4)], [(4, 8), (8, 16)], [(16, 8), (16, 16)]]
    found = compiled(
        *({"capability": 90, "head_dim": 128, "pairs": pairs, "group": 4, "capped": True, "reaches": True} for pairs in mixes),
        *({"capability": 90, "head_dim": 64, "pairs": [(8, 8)], "group": group} for group in (2, 8, 9, 32)),
    )
    assert all("mma.sync" in ptx for ptx in found)


def ring(head_dim: int, bits: list[Bits] | None, dtype: torch.dtype = torch.float16) -> RingLayer:
    return ring_layer(LayerLayout(4, (60, 4), None, 128), 2, head_dim, dtype, torch.device(DEVICE), bits)


@pytest.mark.skipif(DEVICE == "cpu", reason="a warp is a program on a GPU alone")
def test_a_warp_reads_codes_of_the_head_dims_that_it_knows() -> None:
    assert decode.by_warps(ring(64, [(8, 8), (4, 4)]).sample, True)
    assert not decode.by_warps(ring(80, [(8, 8), (4, 4)]).sample, True)
    assert not decode.by_warps(ring(64, None).sample, False)
    assert not decode.by_warps(ring(64, [(8, 8), (4, 4)], torch.float32).sample, True)


def test_on_a_cpu_a_program_is_never_a_warp() -> None:
    assert not decode.by_warps(torch.zeros(2, 4, 64, dtype=torch.float16), True)
