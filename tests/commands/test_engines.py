"""moa-lab engines, and --engine of the commands that search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import exit_code

from moa_lab.calibration.samples import Sample, SampleSet
from moa_lab.capacity import gpu_of, kv_room
from moa_lab.engines import ENGINES, engine_of, held, meets
from moa_lab.plan import Plan
from moa_lab.records import Front

ROOT = Path(__file__).parents[2]
RUN = ROOT / "data/runs/standard-25"


def cells(line: str) -> list[str]:
    return [cell for cell in line.split("  ") if cell]


def test_the_table_has_every_engine_and_length_with_what_it_allocates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, "engines", RUN, "--tokens", "2048,8192", "--weights-gb", "20", "--memory-gb", "30") == 0
    lines = capsys.readouterr().out.splitlines()
    plan = Plan.load(RUN / "plan.json")
    rows = [[cell.strip() for cell in cells(line)] for line in lines[1 : 1 + 2 * len(ENGINES)]]
    assert [row[:2] for row in rows] == [[name, n] for name in ENGINES for n in ("2,048", "8,192")]
    for name, n, asked, allocated, windows, _, _, requests, dense in rows:
        found = held(plan, ENGINES[name], int(n.replace(",", "")))
        assert asked == "25.0%"
        assert allocated == f"{found.density:.1%}" + ("" if found.exact else " rounded")
        assert windows == str(found.windows)
        assert int(requests.replace(",", "")) == kv_room(gpu_of("h100", 30), 20 * 10**9) // found.kv_bytes
        assert int(requests.replace(",", "")) > int(dense.replace(",", ""))


def test_one_engine_may_be_described_in_numbers_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert exit_code(monkeypatch, "engines", RUN / "plan.json", "--engine", "windows_per_model=3", "--tokens", "8192") == 0
    found = held(Plan.load(RUN / "plan.json"), engine_of("windows_per_model=3"), 8192)
    assert f"{found.density:.1%} rounded" in capsys.readouterr().out
    assert exit_code(monkeypatch, "engines", RUN, "--engine", "ollama") == 2
    assert "engine must be one of moa-lab," in capsys.readouterr().err
    stored = Plan.load(RUN / "plan.json").with_bits(8).save(tmp_path / "plan.json")
    assert exit_code(monkeypatch, "engines", stored) == 0
    assert "vllm does not hold it: engine vllm knows no stored bits" in capsys.readouterr().out


def test_an_engine_that_cannot_hold_the_density_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    samples = tmp_path / "samples.safetensors"
    SampleSet((Sample("questions", np.arange(600), ((590, 600),)),)).save(samples)
    profile, card = ROOT / "data/runs/demo/profile.safetensors", ROOT / "data/runs/demo/plan.json"
    out, asked = tmp_path / "front.json", ("--density", "0.3", "--engine", "llama.cpp", "--model", "no/such-model")
    for command in (("learn", samples), ("refine", card, "--samples", samples)):
        assert exit_code(monkeypatch, *command, "--profile", profile, "--out", out, *asked) == 2
        assert "min_span 128 in llama.cpp" in capsys.readouterr().err


def test_searching_for_an_engine_finds_plans_that_it_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    profile, out = ROOT / "data/runs/demo/profile.safetensors", tmp_path / "front.json"
    asked = ("--density", "0.5", "--engine", "transformers", "--seconds", "2", "--points", "4")
    assert exit_code(monkeypatch, "search", profile, "--out", out, *asked) == 0
    front = Front.load(out)
    assert front.settings["engine"] == "transformers"
    for point in front:
        assert meets(point.plan, ENGINES["transformers"], {int(n): 0.5 for n in point.density})
    assert exit_code(monkeypatch, "search", profile, "--out", tmp_path / "other.json", "--engine", "vllm", "--bits", "8") == 2
    assert "engine vllm knows no stored bits" in capsys.readouterr().err
    assert exit_code(monkeypatch, "run", "--out", tmp_path / "run", "--engine", "vllm", "--bits", "16,8") == 2
    assert exit_code(monkeypatch, "run", "--out", tmp_path / "run", "--engine", "llama.cpp", "--lengths", "512", "--density", "0.3") == 2
    assert "min_span 128 in llama.cpp" in capsys.readouterr().err
