"""Plans searched for an engine against plans rounded up to it: both within the budget, and the searched ones predicted no worse."""

from __future__ import annotations

import pytest

from moa_lab.engines import engine_of, fits, held
from moa_lab.evaluate.intervals import Interval
from moa_lab.search import loss_table
from moa_lab.studies import StudyRecord
from moa_lab.studies.gains import Gain
from moa_lab.studies.searching.engines import LIMITS, engine_plans, engines_answer, predicted_loss
from tests.search.tables import random_profile, small_geometry


def test_searched_plans_are_predicted_about_as_good_as_rounded_ones_or_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_lab.studies.searching.engines.DENSITIES_TRIED", 12)
    density = 0.4
    table = loss_table(random_profile(4, geometry=small_geometry(layers=4, kv_heads=3)), use_lengths=(2048,))
    plans, left_out = engine_plans(table, density, 2048, 5.0)
    assert not left_out
    assert list(plans) == [f"{kind}-{word}" for word in LIMITS for kind in ("searched", "rounded")]
    for word, text in LIMITS.items():
        engine = engine_of(text)
        for kind in ("searched", "rounded"):
            plan = plans[f"{kind}-{word}"]
            assert fits(plan, engine, 2048)
            assert held(plan, engine, 2048).density == pytest.approx(plan.search["allocated"])
            assert plan.search["allocated"] <= density + 1e-9
        searched, rounded = (predicted_loss(table, plans[f"{kind}-{word}"], 2048) for kind in ("searched", "rounded"))
        # Rounded plans have spans between those of the grid, and here are so few heads that this tells.
        assert searched <= rounded * 1.1


def test_an_engine_that_holds_nothing_at_the_density_is_left_out_with_the_reason() -> None:
    table = loss_table(random_profile(4), use_lengths=(2048,))
    plans, left_out = engine_plans(table, 0.05, 2048, 1.0)
    assert not plans
    assert all("density 0.05" in why for why in left_out.values())
    assert engines_answer([], {}, 2048, 0.05) == "At a density of 5% no engine holds a plan."


def test_the_answer_tells_prediction_and_measurement_of_every_pair() -> None:
    one = Gain("searched-one", "rounded-one", "needles_gained", "needles", (2048,), Interval(0.25, 16, 0.1, 0.4), 0.25, 0.24)
    told = engines_answer([one], {"searched-one": 0.5, "rounded-one": 0.6}, 2048, 0.25)
    assert "one: predicted loss 0.500 against 0.600, needles better (+0.250 [0.100, 0.400])" in told
    assert "Not all keep the same" in told


def test_the_record_says_what_was_allocated(records: dict[str, StudyRecord]) -> None:
    record = records["engines"]
    for name, share in record.settings["allocated"].items():
        assert share <= record.settings["density"] + 1e-9
        assert record.select(plan=name)


def test_the_record_says_which_windows_each_plan_has_and_how_well_it_was_solved(records: dict[str, StudyRecord]) -> None:
    record = records["engines"]
    length = max(record.settings["test_lengths"])
    assert set(record.settings["solved"]) == set(record.settings["allocated"])
    for name, told in record.settings["solved"].items():
        heads = {int(span): count for span, count in told["heads"].items()}
        kept = sum(span * count for span, count in heads.items()) / (length * sum(heads.values()))
        (row,) = record.select(plan=name, metric="retrieval")
        assert kept == pytest.approx(row.density)
        windows = set(heads) - {length}
        assert len(windows) <= {"layers": len(heads), "one": 1, "three": 3}[name.rpartition("-")[2]]
        assert ("gap" in told) == name.startswith("searched") != ("before" in told)
