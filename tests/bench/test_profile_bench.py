"""The profile's bench on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moa_lab.bench import profile
from moa_lab.bench.profile import SAMPLES, after_rounds, bench_profile, seconds_each
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


def test_what_several_processes_did_is_timed_from_round_to_round() -> None:
    """Two processes, two samples a batch: 4 samples in 4 seconds, and the last batch, which one of them does, in 3."""
    ticks = [(0, 0.0), (2, 9.0), (4, 9.0), (6, 13.0), (8, 13.0), (10, 16.0)]
    assert seconds_each(after_rounds(ticks, 2)) == [1.0] * 4 + [1.5] * 2
    assert after_rounds(ticks, 1) == ticks
    assert seconds_each(after_rounds(ticks[:5], 2)) == [1.0] * 4


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_process_that_is_told_of_no_sample_times_none(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = profile.profile
    monkeypatch.setattr(profile, "profile", lambda model, samples, progress: progress(0, len(samples)) or whole(model, samples))
    seconds, _ = bench_profile(quick=True).select("C1")
    assert seconds.ours != seconds.ours


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_whole_run_asks_for_a_gpu() -> None:
    with pytest.raises(ValueError, match="needs a GPU"):
        bench_profile()


def test_the_command_writes_the_record(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    shown = CliRunner().invoke(app, ["bench", "profile", "--quick", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert len(BenchRecord.load(out).rows) == 2
