from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from tiny import tiny_model, tiny_tokenizer

from moa_lab.pipeline import Run
from moa_lab.plan import Plan, mix_of, mixes_of
from moa_lab.presets import PRESETS, SETTINGS_SCHEMA, Preset, RunSettings
from moa_lab.records import Front, InfluenceProfile, Measurements
from moa_lab.storage import to_json

STAGES = ("calibrate", "profile", "search", "validate draft", "refine", "validate moa", "evaluate")


def run(inputs: tuple[Path, Path], out: Path, stage: str | None = None) -> int:
    command = [sys.executable, str(Path(__file__).with_name("killed_run.py")), str(inputs[0]), str(inputs[1]), str(out)]
    result = subprocess.run([*command, *([stage] if stage else [])], capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode


def numbers(out: Path) -> Any:
    summary = json.loads((out / "summary.json").read_text())
    return summary["plans"]


@pytest.fixture(scope="module")
def unbroken(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(inputs, out) == 0
    return out


def test_a_run_killed_in_every_stage_finishes_with_the_same_numbers_and_computes_no_sample_twice(
    inputs: tuple[Path, Path], unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    finished: dict[Path, int] = {}
    for stage in (*STAGES, None):
        killed = run(inputs, out, stage)
        assert killed == (0 if stage is None else -signal.SIGKILL), stage
        parts = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*") if path.is_file() and not path.name.startswith(".")}
        assert all(parts[path] == when for path, when in finished.items()), stage
        finished = parts
    assert numbers(out) == numbers(unbroken)
    assert Plan.load(out / "plan.json").rules == Plan.load(unbroken / "plan.json").rules


def test_a_run_leaves_the_records_it_promises(unbroken: Path) -> None:
    plans = numbers(unbroken)
    assert set(plans) == {"dense", "uniform", "moa", "ranked", "paper"}
    for name, entry in plans.items():
        assert entry["kv_bytes_allocated"] == entry["kv_bytes"] > 0, name
        for score, value in (("retrieval", "accuracy"), ("cross_entropy", "value")):
            found = entry[score]["512"]
            assert found["low"] <= found[value] <= found["high"]
            assert found["n"] == 2
    assert plans["dense"]["density"] == 1.0
    assert plans["moa"]["density"] <= 0.6 + 1e-9
    plan = Plan.load(unbroken / "plan.json")
    assert plan.provenance.weights
    assert plan.scores
    assert len(Front.load(unbroken / "front.json")) > 1
    assert InfluenceProfile.load(unbroken / "profile.safetensors").lengths == (384, 512)
    assert Measurements.load(unbroken / "measurements.json").provenance.calibration
    assert "What was measured to choose it" in (unbroken / "report.html").read_text()


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"schema": SETTINGS_SCHEMA, **to_json(RunSettings(seed=6))}))
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(ValueError, match=r"holds a run with another seed \(6, now 5\)"):
        Run(tmp_path, RunSettings(seed=5))
    assert (tmp_path / "settings.json").read_text() == before


def test_a_run_asks_the_chat_template_before_anything_else(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer("{{ raise_exception('no chats here') }}").save_pretrained(tmp_path / "model")
    settings = RunSettings(model=str(tmp_path / "model"), preset="sketch", lengths=(512,))
    with pytest.raises(ValueError, match=r"no chats here; use plain prompts instead: --plain-prompts"):
        Run(tmp_path / "run", settings).begin()
    assert not (tmp_path / "run" / "settings.json").exists()
    Run(tmp_path / "run", replace(settings, plain_prompts=True)).begin()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        # Validated between the profiled lengths, where the model reaches no further.
        ({"lengths": (512,), "test_lengths": (512,), "max_length": 512}, "length 384 is too short for a 'questions' sample"),
        ({"lengths": (700,), "test_lengths": (700, 300), "preset": "study"}, "length 300 is too short"),
        ({"lengths": (700,), "supervision": "nobody"}, "supervision must be one of model, human, text"),
    ],
)
def test_a_run_that_cannot_make_its_samples_is_refused_before_the_model_answers(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_model("llama", max_length=changed.pop("max_length", 2048)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings = RunSettings(model=str(tmp_path / "model"), **{"preset": "sketch", "density": 0.9, **changed})
    stages: list[str] = []
    with pytest.raises(ValueError, match=message):
        Run(tmp_path / "run", settings, lambda stage, *_: stages.append(stage)).everything()
    assert set(stages) <= {"load model"}
    assert not (tmp_path / "run").exists()


def test_of_several_mixes_of_bits_spans_are_learned_in_the_one_whose_searched_plans_lose_least(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PRESETS["sketch"], lengths=(640,), test_lengths=(640,), learning_steps=2)
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), "sketch", small)
    columns = "text=text,summary=summary"
    settings = RunSettings(model=str(inputs[0]), density=0.4, preset="sketch", source=str(inputs[1]), columns=columns, bits="16,8,4")
    run = Run(tmp_path / "run", settings)
    learned = run.learned()
    searched = Front.load(run.records.place("front-search.json"))
    alike = replace(searched, points=tuple(point for point in searched if len(mixes_of(point.plan)) == 1))
    best = run.validation(alike, "best").best
    assert {mix_of(point.plan) for point in alike} == {(16, 16), (8, 8), (4, 4)}
    assert len(alike) < len(searched)
    assert {mix_of(point.plan) for point in learned} == {mix_of(best)}
