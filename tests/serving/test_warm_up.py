"""Once a server has warmed up, none of its passes compiles a kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_lab.cache import LayerLayout
from moa_lab.serving import RequestPages
from moa_lab.serving.page_layout import PageLayout
from moa_lab.serving.page_pool import page_bytes
from moa_lab.serving.paged import LayerHeads
from moa_lab.serving.step import Scoring
from moa_lab.serving.warm_up import warm_up

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


@pytest.mark.parametrize("longest", [1, 16, 20, 32])
def test_an_engine_of_shorter_requests_than_its_warm_up_has_starts(longest: int) -> None:
    cpu, layout = torch.device("cpu"), LayerLayout(4, (28, 1000), None, longest)
    pages = RequestPages((longest,), (PageLayout((layout,), 16),))
    kinds = [LayerHeads(alike, cpu) for alike in pages.of_layer(0)]
    warm_up(kinds, page_bytes(16, 16, torch.float32), (4, 2), 16, torch.float32, Scoring(0.1), cpu)
