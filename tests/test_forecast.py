"""What a run foretells: it grows with the work, leaves out what is done, and is corrected as stages end."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moa_lab import forecast
from moa_lab.forecast import Forecast, Pace, minutes
from moa_lab.pipeline import Run
from moa_lab.presets import RunSettings
from moa_lab.profiling.estimate import Seconds


def run_of(inputs: tuple[Path, Path], folder: Path, preset: str = "sketch", **settings: Any) -> Run:
    model, documents = inputs
    return Run(
        folder,
        RunSettings(
            model=str(model), preset=preset, density=0.6, source=str(documents), columns="text=text,summary=summary",
            **{"lengths": (640,), "test_lengths": (640,), **settings},
        ),
    )  # fmt: skip


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=iter(times).__next__))


def test_seconds_pass_through_both_measured_lengths() -> None:
    found = Seconds.through((128, 512), (1.0, 10.0))
    assert (found(128), found(512)) == (pytest.approx(1.0), pytest.approx(10.0))
    assert found(1024) > 2 * found(512)
    assert Seconds.through((128, 512), (1.0, 2.0)).quadratic == 0, "a short pass that was slow in itself"


def test_every_stage_is_foretold_and_more_samples_and_longer_ones_take_longer(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Passes of a tiny model are too short to be timed twice alike.
    pace = Pace(Seconds(1e-5, 1e-9), Seconds(3e-5, 3e-9), Seconds(5e-5, 5e-9), token=0.01, at_once=2)
    monkeypatch.setattr(Pace, "of", lambda *_: pace)
    small = Forecast.of(run_of(inputs, tmp_path / "small"))
    assert set(small.foretold) == {"calibrate", "profile", "search", "lessons", "learn", "validate", "evaluate"}
    assert all(seconds > 0 for seconds in small.foretold.values())
    assert small.needed_bytes > 0
    large = Forecast.of(run_of(inputs, tmp_path / "large", "full"))
    assert set(large.foretold) == {"calibrate", "profile", "search", "lessons", "learn", "refine", "validate", "evaluate"}
    for stage in ("calibrate", "profile", "learn", "validate", "evaluate"):
        assert large.foretold[stage] > 3 * small.foretold[stage], stage
    # Refinement also stores every head that it measures in the other mixes; spans are learned in one of them.
    of_bits = run_of(inputs, tmp_path / "bits", "full", bits="16,8,4")
    heads, climbing = of_bits.geometry.layers * of_bits.geometry.kv_heads, forecast.CLIMBS * len(forecast.MOVES)
    told = Forecast.of(of_bits).foretold
    assert told["refine"] == pytest.approx(large.foretold["refine"] * (4 * heads + climbing) / (2 * heads + climbing))
    assert told["learn"] == large.foretold["learn"]


def test_a_run_foretells_itself_and_tells_what_is_left_after_every_stage(
    inputs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moa_lab"):
        run_of(inputs, tmp_path / "run").everything()
    told = [record.getMessage() for record in caplog.records if record.name in ("moa_lab.pipeline", "moa_lab.forecast")]
    assert told[0].startswith("about ")
    assert "GiB beyond the weights" in told[0]
    assert [text.split()[0] for text in told[1:]] == ["calibrate", "profile", "search", "lessons", "learn", "validate", "evaluate"]
    assert told[-1].endswith("about 0 s left")
    caplog.clear()
    again = run_of(inputs, tmp_path / "run")
    left = Forecast.of(again)
    assert left.foretold == {}
    with caplog.at_level(logging.INFO, logger="moa_lab"):
        again.everything()
    assert not [record for record in caplog.records if record.name == "moa_lab.forecast"], "nothing is left to tell"
    for record in ("plan.json", "measurements.json"):
        again.records.place(record).unlink()
    assert set(Forecast.of(again).foretold) == {"validate", "evaluate"}
    for record in ("front-search.json", "front-learned.json", "lessons.safetensors"):
        again.records.place(record).unlink()
    assert set(Forecast.of(again).foretold) == {"validate", "evaluate"}, "the front is there, and nothing else asks for those"


def test_a_stage_that_another_starts_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Forecast({"search": 10.0, "validate": 100.0, "evaluate": 50.0}, 0, 0)
    clock(monkeypatch, 0.0, 3.0, 25.0, 30.0)
    with told.timing("plan.json"), told.timing("front-search.json"), told.timing("table.safetensors"):
        assert told.left_s == 157.0
    assert told.taken == {"search": 22.0, "validate": 8.0}


def test_stages_that_took_long_correct_those_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Forecast({"calibrate": 100.0, "evaluate": 50.0}, 0, 0)
    clock(monkeypatch, 0.0, 200.0)
    with told.timing("samples.safetensors"):
        pass
    assert told.left_s == 100.0


def test_a_stage_that_failed_is_no_longer_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Forecast({"profile": 10.0, "search": 10.0}, 0, 0)
    clock(monkeypatch, 0.0, 3.0, 100.0, 105.0, 200.0, 204.0)
    with pytest.raises(KeyboardInterrupt), told.timing("profile.safetensors"):
        raise KeyboardInterrupt
    with told.timing("front-search.json"):
        pass
    with told.timing("profile.safetensors"):
        pass
    assert told.taken == {"profile": 7.0, "search": 5.0}


def test_the_rest_of_a_stage_that_was_stopped_says_nothing_of_those_to_come(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Forecast({"calibrate": 600.0, "profile": 100.0, "evaluate": 50.0}, 0, 0, resumed=True)
    clock(monkeypatch, 0.0, 30.0, 30.0, 230.0)
    with told.timing("samples.safetensors"):
        pass
    assert told.left_s == 150.0, "most of it was done before"
    with told.timing("profile.safetensors"):
        pass
    assert told.left_s == 100.0
    monkeypatch.undo()
    assert not Forecast.of(run_of(inputs, tmp_path)).resumed
    (tmp_path / "parts" / "answers").mkdir(parents=True)
    assert Forecast.of(run_of(inputs, tmp_path)).resumed


def test_a_search_that_ended_before_its_limit_says_nothing_of_the_stages_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Forecast({"search": 300.0, "learn": 3600.0}, 0, 0)
    clock(monkeypatch, 0.0, 30.0)
    with told.timing("front-search.json"):
        pass
    assert told.left_s == 3600.0


def test_durations_are_told_in_words() -> None:
    assert [minutes(seconds) for seconds in (0.2, 45, 480, 4800, 7322)] == ["0 s", "45 s", "8 min", "80 min", "2 h 2 min"]
