"""The recorded times of the density slider in a browser: what the record says is what it holds, and its goals are met."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from moa_lab.bench.record import GOALS, BenchRecord
from moa_lab.records import LossTable
from tests.workbench.slider import LIMIT_MS, MOVES, run_of

RECORD = Path(__file__).resolve().parents[2] / "data" / "benchmarks" / "slider.json"


def test_the_recorded_times_meet_their_goals_and_name_the_command_that_made_them() -> None:
    record = BenchRecord.load(RECORD)
    assert [row.id for row in record] == list(LIMIT_MS)
    for row in record:
        assert row.meets
        assert (row.unit, row.peer_name, row.peer, row.goal) == ("ms", "limit", LIMIT_MS[row.id], GOALS[row.id].ratio)
        assert len(row.detail["moves"]) == MOVES
        assert abs(row.ours - median(row.detail["moves"])) < 0.1
        assert 0 < row.detail["fastest_ms"] <= row.ours <= row.detail["slowest_ms"]
    assert record.provenance.command == "python -m tests.workbench.slider data/benchmarks/slider.json"
    assert record.provenance.created


def test_the_rows_are_about_the_embedded_model_and_as_many_heads_as_a_7b_model_has(tmp_path: Path) -> None:
    for row in BenchRecord.load(RECORD):
        table = LossTable.load(run_of(row.id, tmp_path) / "table.safetensors")
        assert (row.shape["layers"], row.shape["kv_heads"]) == (table.geometry.layers, table.geometry.kv_heads)
        assert row.shape["rules"] == len(table.rules)
    assert (table.geometry.layers, table.geometry.kv_heads) == (32, 32)
