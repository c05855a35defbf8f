"""The profile's bench on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moa_lab.bench.profile import SAMPLES, bench_profile
from moa_lab.bench.record import BenchRecord
from moa_lab.commands.app import app


def test_a_quick_run_times_every_sample_but_the_first_and_meets_nothing() -> None:
    seen: list[int] = []
    seconds, memory = bench_profile(quick=True, progress=lambda done, total: seen.append(done)).select("C1")
    assert seen == list(range(SAMPLES + 2))
    assert (seconds.unit, memory.unit) == ("s", "GB")
    assert seconds.ours > 0
    assert not seconds.meets
    assert not memory.meets


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_whole_run_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        bench_profile()


def test_the_command_writes_the_record(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    shown = CliRunner().invoke(app, ["bench", "profile", "--quick", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert len(BenchRecord.load(out).rows) == 2
