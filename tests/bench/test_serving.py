"""vLLM's own cache and plans side by side: what is measured, what a record keeps, and what the table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moa_lab.bench import serving
from moa_lab.bench.serving import bench_serving, serving_table
from moa_lab.commands.app import app
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import uniform_plan
from moa_lab.storage import write_json

GEOMETRY = ModelGeometry(2, 4, 2, 16, 512)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return replace(uniform_plan(GEOMETRY, 0.5, sink_tokens=4, min_span=5), name="half").save(tmp_path / "half.json")


class Sides:
    """Stands for the processes: each side has a rate, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rates: dict[str, float | None]) -> None:
        self.rates, self.asked = rates, []
        monkeypatch.setattr(serving, "_measured", self.measured)

    def measured(self, peer: str, plan: Path | None, prompt: int, block_size: int | None, quick: bool) -> dict[str, Any]:
        self.asked.append((peer, prompt, block_size))
        rate = self.rates[peer]
        if rate is None:
            return {"failed": "error: no room"}
        found = {"batch": 8, "rate": rate, "ms": 8e3 / rate, "steps": 5} | ({} if plan is None else {"density": 0.5})
        return {**found, "session": {"device": "a GPU", "vllm": "0.26.0", "model": "tiny"}}


def test_every_side_is_measured_once_and_a_second_call_measures_what_failed(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sides = tmp_path / "serving.json", Sides(monkeypatch, {"vLLM-bf16": 100.0, "vLLM-fp8": None, "vLLM-plan": 190.0})
    record = bench_serving(out, [plan], [64, 128], block_size=32)
    assert sides.asked == [(peer, prompt, block) for prompt in (64, 128) for peer, block in
                           (("vLLM-bf16", None), ("vLLM-fp8", None), ("vLLM-plan", 32))]  # fmt: skip
    assert record["device"] == "a GPU"
    sides.asked.clear()
    sides.rates["vLLM-fp8"] = 150.0
    table = serving_table(bench_serving(out, [plan], [64, 128], block_size=32))
    assert sides.asked == [("vLLM-fp8", 64, None), ("vLLM-fp8", 128, None)]
    (line,) = [line for line in table.splitlines() if line.startswith("64 ") and "plan half" in line]
    shown = CliRunner().invoke(app, ["show", str(out)])
    assert table in shown.output
    assert line.split() == ["64", "plan", "half", "50%", "50.0%", "8", "190.0", "42.1", "1.90", "1.8"]


def test_rates_that_count_prompts_are_not_held_against_those_of_steps(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, sides = tmp_path / "serving.json", Sides(monkeypatch, {"vLLM-bf16": 100.0, "vLLM-fp8": 150.0, "vLLM-plan": 190.0})
    record = bench_serving(out, [plan], [64])
    (first,) = [row for row in record["rows"] if row["side"] == "vLLM-bf16"]
    del first["steps"]
    write_json(out, record)
    sides.asked.clear()
    bench_serving(out, [plan], [64])
    assert sides.asked == [("vLLM-bf16", 64, None)]


def test_a_side_that_fails_is_told_in_words(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sides(monkeypatch, {"vLLM-bf16": 100.0, "vLLM-fp8": None, "vLLM-plan": 190.0})
    assert "error: no room" in serving_table(bench_serving(tmp_path / "serving.json", [plan], [64]))


def test_plans_that_a_row_cannot_tell_apart_are_refused(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two of the plans have the same name and density: plan half 50%"):
        bench_serving(tmp_path / "serving.json", [plan, plan], [64])


def test_without_vllm_every_side_says_so(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serving.subprocess, "run", lambda *_, **__: type("Done", (), {"stderr": "error: No module named 'vllm'\n", "returncode": 2})
    )
    record = bench_serving(tmp_path / "serving.json", [plan], [64])
    assert {row["failed"] for row in record["rows"]} == {"error: No module named 'vllm'"}
