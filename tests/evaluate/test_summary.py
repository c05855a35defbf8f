"""The table of a run: its JSON has the promised keys, its text every score with its interval."""

import json

import pytest

from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.summary import summarise, table
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, dense_plan, uniform_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Measurement, Measurements

LENGTHS = (2048, 4096)


def plans_of(geometry: ModelGeometry) -> list[Plan]:
    return [dense_plan(geometry), uniform_plan(geometry, 0.5), uniform_plan(geometry, 0.4).renamed("moa")]


def measured(plans: list[Plan]) -> Measurements:
    rows = []
    for plan in plans:
        for length in LENGTHS:
            for metric, task, value in (
                ("retrieval", "needles", 0.875), ("retrieval", "lines", 0.5), ("cross_entropy", "summaries", 1.25),
                ("cross_entropy", "documents", 2.5), ("cross_entropy", "needles", 9.0),
            ):  # fmt: skip
                rows.append(Measurement(plan.name, metric, task, length, value, 64, value - 0.125, value + 0.125, plan.density(length)))
    return Measurements(tuple(rows), provenance=Provenance(model="tiny", weights="abc", seed=1))


def test_the_json_has_the_promised_keys(geometry: ModelGeometry) -> None:
    plans = plans_of(geometry)
    found = json.loads(json.dumps(summarise(plans, measured(plans), 4096), allow_nan=False))
    assert {"plans", "provenance"} <= set(found)
    assert set(found["plans"]) == {"dense", "uniform", "moa"}
    assert found["provenance"]["weights"] == "abc"
    for plan in plans:
        entry = found["plans"][plan.name]
        assert entry["density"] == plan.density(4096)
        assert entry["kv_bytes"] == plan.kv_bytes(4096)
        assert set(entry["retrieval"]) == set(entry["cross_entropy"]) == {"2048", "4096"}
        for length in ("2048", "4096"):
            assert entry["retrieval"][length] == {"accuracy": 0.875, "n": 64, "low": 0.75, "high": 1.0}
            assert entry["cross_entropy"][length] == {"value": 1.25, "n": 64, "low": 1.125, "high": 1.375}


def test_other_test_sets_stand_under_names_of_their_own(geometry: ModelGeometry) -> None:
    plans = plans_of(geometry)
    entry = summarise(plans, measured(plans), 4096)["plans"]["moa"]
    assert entry["line_retrieval"]["2048"]["accuracy"] == 0.5
    assert entry["document_cross_entropy"]["2048"]["value"] == 2.5
    assert entry["density_by_length"] == {"2048": plans[2].density(2048), "4096": plans[2].density(4096)}


def test_predicted_and_allocated_bytes_stand_side_by_side(geometry: ModelGeometry) -> None:
    plans = plans_of(geometry)
    allocated = [memory_row(plan, length) for plan in plans for length in LENGTHS]
    summary = summarise(plans, measured(plans).plus(allocated), 4096)
    assert all(summary["plans"][plan.name]["kv_bytes_allocated"] == plan.kv_bytes(4096) for plan in plans)
    size = f"{plans[1].kv_bytes(4096) / 2**20:.1f}"
    lines = table(summary).splitlines()
    assert lines[0].split()[:5] == ["plan", "density", "KV", "MiB", "allocated"]
    assert lines[2].split()[2:4] == [size, size]
    assert "allocated" in lines[-1]
    assert "allocated" not in table(summarise(plans, measured(plans), 4096)).splitlines()[0]


def test_the_text_has_a_row_per_plan_and_every_score_with_its_interval(geometry: ModelGeometry) -> None:
    plans = plans_of(geometry)
    lines = table(summarise(plans, measured(plans), 4096)).splitlines()
    assert len(lines) == 1 + 3 + 1
    assert [line.split()[0] for line in lines[:4]] == ["plan", "dense", "uniform", "moa"]
    for heading in ("retrieval @2048", "line retrieval @4096", "cross entropy @2048", "document cross entropy @4096"):
        assert heading in lines[0]
    assert all(line.count("0.875 [0.75, 1.00]") == 2 and line.count("1.250 [1.12, 1.38]") == 2 for line in lines[1:4])
    assert "50.0%" in lines[2] or f"{plans[1].density(4096):.1%}" in lines[2]
    assert "n = 64 (retrieval)" in lines[-1]


def test_a_score_that_was_not_measured_is_a_dash(geometry: ModelGeometry) -> None:
    plans = plans_of(geometry)
    rows = tuple(row for row in measured(plans) if not (row.plan == "uniform" and row.metric == "retrieval"))
    summary = summarise(plans, Measurements(rows), 4096)
    assert "retrieval" not in summary["plans"]["uniform"]
    uniform = table(summary).splitlines()[2]
    assert uniform.count(" - ") + uniform.endswith(" -") == 4


def test_different_plans_of_one_name_have_no_table(geometry: ModelGeometry) -> None:
    dense = dense_plan(geometry)
    with pytest.raises(ValueError, match="two different plans are named 'dense'"):
        summarise([dense, dense.with_bits(8)], Measurements(()), 4096)
