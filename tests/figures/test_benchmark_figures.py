"""The figure of a benchmark: every measured row, on the right side of the line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from command_line import exit_code

from moa_lab import figures
from moa_lab.bench import BenchRecord

RECORDS = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
OTHERS = {"serving.json", "compiled.json"}
"""Records of other kinds: not rows with a goal each."""


@pytest.mark.parametrize("name", sorted({path.name for path in RECORDS.glob("*.json")} - OTHERS))
def test_every_measured_row_stands_on_its_side_of_the_line(name: str) -> None:
    record = BenchRecord.load(RECORDS / name)
    fig = figures.goal_ratios(record)
    drawn = {trace.name: list(trace.x) for trace in fig.data}
    measured = [row for row in record if row.ratio]
    assert sum(map(len, drawn.values())) == len(measured)
    assert all(x >= 1 for x in drawn.get("meets its goal", []))
    wrong = [row for row in measured if not row.meets]
    assert len(drawn.get("does not", [])) == len(wrong)
    # No two rows share a place.
    assert len({label for trace in fig.data for label in trace.y}) == len(measured)
    assert "goal" in fig.layout.xaxis.title.text


def test_a_limit_is_met_from_below() -> None:
    record = BenchRecord.load(RECORDS / "generate.json")
    limit = next(row for row in record if row.at_most and row.meets)
    (trace,) = figures.goal_ratios(BenchRecord((limit,))).data
    assert trace.x[0] == pytest.approx(limit.goal / (limit.ratio or 0))


def test_a_record_without_peers_is_refused() -> None:
    row = next(iter(BenchRecord.load(RECORDS / "generate.json")))
    with pytest.raises(ValueError, match="no row"):
        figures.goal_ratios(BenchRecord((replace(row, ratio=None, meets=False),)))


def shown(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code(monkeypatch, "show", *arguments)


def test_the_command_draws_a_benchmark_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figure.html"
    assert shown(monkeypatch, RECORDS / "profile.json", "--figure", out) == 0
    assert "meets its goal" in out.read_text()
    assert figures.CONFIG["plotlyServerURL"] == "", "plotly takes entries out of what it is given"
    assert shown(monkeypatch, RECORDS / "profile.json", "--figure", out) != 0
    assert "--force" in capsys.readouterr().err
    assert shown(monkeypatch, RECORDS.parent / "runs" / "standard-50" / "plan.json", "--figure", tmp_path / "plan.html") != 0
    assert "only benchmarks are drawn" in capsys.readouterr().err
