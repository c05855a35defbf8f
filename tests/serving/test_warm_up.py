"""Once a server has warmed up, none of its passes compiles a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize(
    ("chip", "head_dim", "bits", "kernels"),
    [("sm_90", 128, "[[16, 16], [16, 16]]", 5), ("sm_80", 80, "[[16, 16], [4, 4], [8, 4], [8, 4]]", 14), ("gfx942", 64, "[[8, 8]]", 6)],
)  # fmt: skip
def test_passes_of_any_size_launch_what_the_warm_up_compiled(chip: str, head_dim: int, bits: str, kernels: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [HERE.parents[1], HERE.parent, HERE.parent / "kernels"]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "launched_passes.py"), chip, str(head_dim), bits]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.split("\n", 1) == [str(kernels), "\n"]
