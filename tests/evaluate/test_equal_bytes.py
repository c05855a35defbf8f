"""Plans that are compared at a density keep it, or it is said which do not and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moa_lab.evaluate.equal_bytes import unequal_plans, unequal_rows
from moa_lab.evaluate.memory import memory_row
from moa_lab.evaluate.summary import summarise, table
from moa_lab.geometry import ModelGeometry
from moa_lab.plan import Plan, SpanRule, dense_plan, uniform_plan
from moa_lab.records import Measurements
from moa_lab.report import build_report
from moa_lab.report.facts import Facts
from moa_lab.studies.plans import equal_uniform

PLAIN = ModelGeometry(2, 4, 2, 8, 4096)
# As Gemma 3 270M: five layers of six with a window.
HYBRID = ModelGeometry(18, 4, 1, 256, 32768, tuple(None if layer % 6 == 5 else 512 for layer in range(18)))


def test_plans_that_keep_the_density_are_not_named() -> None:
    plans = [dense_plan(PLAIN), uniform_plan(PLAIN, 0.5), uniform_plan(HYBRID, 0.5)]
    assert unequal_plans(plans, 0.5, [1024, 2048]) == []


def test_a_floor_that_costs_more_than_the_density_is_named() -> None:
    (told,) = unequal_plans([uniform_plan(PLAIN, 0.1)], 0.1, [1024, 2048, 2048])
    assert told == "uniform keeps 12.5% at 1,024 tokens, not 10%: no head keeps fewer than the floor of 128 tokens"


def test_a_plan_that_spends_less_is_named() -> None:
    whole = Plan(PLAIN, ((SpanRule(192, 0), SpanRule(0, 1)),) * 2, name="ranked")
    (told,) = unequal_plans([whole], 0.6, [2048])
    assert told.startswith("ranked keeps 54.7% at 2,048 tokens, not 60%: its rules keep no more")


def test_a_length_that_was_not_measured_counts_where_the_plan_will_be_used_there() -> None:
    # One head of each layer keeps no more at 4,096 tokens than at 1,024.
    plan = Plan(PLAIN, ((SpanRule(512, 0), SpanRule(0, 0.5)),) * 2, name="moa", lengths=(1024, 4096))
    (told,) = unequal_plans([plan], 0.5, [1024])
    assert told == "moa keeps 31.2% at 4,096 tokens, not 50%: it does at 1,024 tokens, which binds"


def test_rounding_to_whole_tokens_is_named() -> None:
    (told,) = unequal_plans([uniform_plan(PLAIN, 0.3, sink_tokens=4, min_span=8)], 0.3, [63])
    assert told == "uniform keeps 28.6% at 63 tokens, not 30%: spans are whole tokens"


def test_stored_bits_are_named() -> None:
    (told,) = unequal_plans([uniform_plan(PLAIN, 0.5).with_bits(8)], 0.5, [4096])
    assert told.endswith("tokens, not 50%: it stores keys or values in fewer bits")
    (told,) = unequal_plans([uniform_plan(PLAIN, 1.0).with_bits(4)], 0.7, [4096])
    assert told.endswith("not 70%: it keeps every token, in fewer bits")
    # Spans that the bytes would have held in fewer bits are too short for another reason.
    (told,) = unequal_plans([uniform_plan(PLAIN, 0.6).with_bits(8)], 0.5, [4096])
    assert "fewer bits" not in told


def test_dense_spans_are_no_plan_of_the_density_in_any_bits() -> None:
    assert unequal_plans([dense_plan(PLAIN), dense_plan(PLAIN).with_bits(8), dense_plan(PLAIN).with_bits(4)], 0.25, [4096]) == []


def test_windows_that_lengths_on_both_sides_ask_for_are_named() -> None:
    (told,) = unequal_plans([uniform_plan(HYBRID, 0.5, [256, 1024, 4096])], 0.5, [256, 1024, 4096])
    assert "layers with windows of their own" in told


def test_a_plan_searched_for_an_engine_is_told_by_what_that_allocates() -> None:
    search = {"engine": {"name": "some", "limits": "", "allocated": {"2048": 0.5}}}
    (told,) = unequal_plans([uniform_plan(PLAIN, 0.45).renamed("moa", search=search)], 0.5, [2048])
    assert told == "moa keeps 45.0% at 2,048 tokens, not 50%: some, which it was searched for, allocates 50.0%"


@pytest.mark.parametrize("length", [300, 512, 1024, 4096])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.7])
def test_a_uniform_plan_of_equal_bytes_has_them_on_a_model_with_windows_too(length: int, density: float) -> None:
    plan = Plan(HYBRID, ((SpanRule(0, density),),) * 18, name="moa")
    same = equal_uniform(plan, length, "uniform")
    assert same.density(length) == pytest.approx(plan.density(length), rel=0.01)


def test_the_table_shows_every_density_and_says_which_plans_are_unequal() -> None:
    plans = [dense_plan(PLAIN), uniform_plan(PLAIN, 0.1)]
    rows = Measurements(tuple(memory_row(plan, length) for plan in plans for length in (1024, 4096)))
    lines = table(summarise(plans, rows, 4096, density=0.1)).splitlines()
    assert lines[0].split() == ["plan", "density", "KV", "MiB", "allocated", "density", "@1024"]
    assert lines[2].split()[::4] == ["uniform", "12.5%"]
    assert lines[-1].startswith("uniform keeps 12.5% at 1,024 tokens, not 10%")
    assert len(table(summarise(plans, rows, 4096)).splitlines()) == len(lines) - 1


def test_the_report_says_which_plans_are_unequal_and_knows_a_uniform_plan_with_windows() -> None:
    plan = uniform_plan(PLAIN, 0.2).renamed("moa")
    rows = Measurements(tuple(memory_row(each, 1024) for each in (plan, uniform_plan(PLAIN, 0.1))))
    page = build_report(plan, measurements=rows, baselines=[uniform_plan(PLAIN, 0.1)], density=0.1)
    assert "Not all keep the density asked for. uniform keeps 12.5% at 1,024 tokens" in page
    assert "Not all keep" not in build_report(plan, measurements=rows)
    rival = uniform_plan(HYBRID, 0.5)
    facts = Facts(rival.renamed("moa"), (rival,), None, None, Measurements(()), ())  # type: ignore[arg-type]
    assert facts.role("uniform") == "uniform window"


def test_measured_rows_of_unequal_plans_are_named() -> None:
    rows = [memory_row(plan, 2048) for plan in (dense_plan(PLAIN), uniform_plan(PLAIN, 0.5), uniform_plan(PLAIN, 0.25).renamed("moa"))]
    assert unequal_rows(rows) == "Not all keep the same bytes: at 2,048 tokens uniform 50.0%, moa 25.0%."
    assert unequal_rows(rows[:2]) == ""


def test_a_plan_below_the_density_is_told_a_reason_that_holds() -> None:
    floor, whole = SpanRule(128.0, 0.0), SpanRule(0.0, 1.0)
    ranked = replace(uniform_plan(PLAIN, 0.5, [1024]), rules=_rows(floor), search={"origin": "ranked"}, name="ranked")
    assert "no other head fits in whole" in unequal_plans([ranked], 0.5, [1024])[0]
    steps = replace(ranked, search={"origin": "paper"})
    assert "they come in steps" in unequal_plans([steps], 0.5, [1024])[0]
    growing = replace(ranked, rules=_rows(SpanRule(-512.0, 0.75)), search={"origin": "paper"})  # 0.25 at 1,024, 0.5 at 2,048
    assert "it does at 2,048 tokens, which binds" in unequal_plans([growing], 0.5, [1024])[0]
    assert not unequal_plans([replace(ranked, rules=_rows(whole))], 0.5, [1024])  # the dense plan


def _rows(rule: SpanRule) -> tuple[tuple[SpanRule, ...], ...]:
    return ((rule,) * PLAIN.kv_heads,) * PLAIN.layers
