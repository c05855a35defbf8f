"""Kernels as they are dispatched compile for chips that are not there, and what they take fits these chips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moa_lab.bench.compiled import COMPILED_SCHEMA
from moa_lab.storage import read_json

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

HERE = Path(__file__).parent
OLDEST = HERE.parents[1] / ".venv" / "oldest-triton"
RECORD = HERE.parents[1] / "data" / "benchmarks" / "compiled.json"
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
AMD = 65536
CASES = ("prefill bfloat16, 64", "prefill bfloat16, 128", "ring bfloat16, 64", "ring bfloat16, 128", "ring 128, bits [(8, 8), (8, 8)]",
         "ring 80, bits [(4, 4), (16, 8)]", "drawn 128", "influence 128", "pages 128",
         "pages 128, bits (8, 8)", "ring 128, many new tokens", "ring with all there is")  # fmt: skip
"""Of those that compile_everywhere.py knows, which takes some minutes a chip for all."""
KERNELS = {
    "prefill_kernel", "_write_kernel", "_write_packed_kernel", "decode_kernel", "merge_kernel", "_read_kernel", "_forward_kernel",
    "_rows_kernel", "_unroll_kernel",
    "columns_kernel", "influence_kernel", "paged_write_kernel", "paged_read_kernel", "paged_decode_kernel", "paged_merge_kernel",
}  # fmt: skip
FEW = 64
"""Bytes of a thread that a kernel may spill."""


def compiled(*arguments: str, triton: Path | None = None) -> list[dict[str, Any]]:
    """triton: where another one lies than the environment's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*([triton] if triton else []), HERE.parents[1], HERE.parent, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    told = subprocess.run(
        [sys.executable, str(HERE / "compile_everywhere.py"), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert told.returncode == 0, told.stderr[-2000:]
    return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100"])
def test_kernels_compile_and_fit(chip: str) -> None:
    found = compiled(chip, *CASES)
    # Waves of 32 lanes hold no block of 64 queries and keys, in which influence is added up.
    assert {row["kernel"] for row in found} >= KERNELS - ({"influence_kernel"} if chip == "gfx1100" else set())
    warped = {"decode_warps_kernel", "paged_decode_warps_kernel"}
    assert warped & {row["kernel"] for row in found} == (warped if chip in SHARED else set())
    for row in found:
        assert row["shared"] <= SHARED.get(chip, AMD), row
        assert row["spilled"] <= FEW, row


@pytest.mark.slow
@pytest.mark.skipif(not (OLDEST / "triton").is_dir(), reason="make test installs the oldest Triton beside the environment's own")
@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_kernels_compile_with_the_oldest_triton(chip: str) -> None:
    found = compiled(chip, *CASES, triton=OLDEST)
    assert {row["kernel"] for row in found} >= KERNELS
    assert all(row["shared"] <= SHARED.get(chip, AMD) for row in found), found


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_86", "sm_100", "gfx942", "gfx1100"])
def test_the_widest_heads_fit_small_chips(chip: str) -> None:
    found = compiled(chip, "prefill bfloat16, 256", "ring bfloat16, 256", "pages 256", "drawn 256", "ring 256, bits [(8, 8), (8, 8)]")
    assert {row["kernel"] for row in found} >= {"prefill_kernel", "decode_kernel"}
    assert all(row["shared"] <= SHARED.get(chip, AMD) for row in found), found
    # On Hopper the learning kernels of these heads spill as well, and so does prefill over a ring.
    over_ring = [(case, "prefill_kernel") for case in ("ring bfloat16, 256", "ring 256, bits [(8, 8), (8, 8)]")]
    on_hopper = [row for row in found if row["case"] == "drawn 256" or (row["case"], row["kernel"]) in over_ring]
    assert all(row["spilled"] <= FEW for row in found if row not in on_hopper), found


@pytest.mark.slow
def test_the_record_is_of_the_kernels_that_are_dispatched() -> None:
    record = read_json(RECORD, COMPILED_SCHEMA)
    taken = ("shared", "registers", "spilled")
    recorded = [{name: value for name, value in row.items() if name not in taken} for row in record["rows"]]
    assert sorted(recorded, key=json.dumps) == sorted(compiled("--list"), key=json.dumps)
    for row in record["rows"]:
        limits = record["chips"][row["chip"]]
        assert row["shared"] <= limits["shared"]
        assert row["registers"] <= limits["registers"]
    assert {chip: limits["shared"] for chip, limits in record["chips"].items() if chip in SHARED} == SHARED
