from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moa_lab.evaluate.intervals import Interval
from moa_lab.plan import DENSE, EQUAL_BYTES, SpanRule
from moa_lab.search import rule_grid, solve_budget
from moa_lab.studies import StudyRecord
from moa_lab.studies.gains import Gain
from moa_lab.studies.searching.rules import (
    FAMILIES,
    CappedRule,
    Curve,
    LogarithmicRule,
    PowerRule,
    at_length,
    families,
    family_tables,
    rules_answer,
    solved_families,
)
from tests.search.tables import random_profile, small_geometry

LENGTHS = (2048, 4096)


@pytest.fixture(scope="module")
def record(records: dict[str, StudyRecord]) -> StudyRecord:
    return records["rules"]


def test_every_formula_is_what_its_name_says_clipped_to_floor_and_length() -> None:
    assert CappedRule(256.0, 0.25, 1000.0).span_tokens(2048) == 768
    assert CappedRule(256.0, 0.25, 1000.0).span_tokens(8192) == 1000
    assert PowerRule(coefficient=8.0, exponent=0.5).span_tokens(4096) == 512
    assert PowerRule(coefficient=8.0, exponent=0.5).span_tokens(100) == 100
    assert LogarithmicRule(coefficient=50.0).span_tokens(4096) == 600
    assert LogarithmicRule(coefficient=1.0).span_tokens(4096) == 128
    assert PowerRule(coefficient=0.9, exponent=1.0).span_tokens(1000, multiple=64) == 960
    assert PowerRule(coefficient=2.0, exponent=1.0).span_tokens(1000) == 1000


def test_a_cap_beyond_every_length_and_a_power_of_one_are_linear_rules() -> None:
    for n in (256, 1000, 2048, 8192):
        linear = SpanRule(-512.0, 0.5)
        assert CappedRule(-512.0, 0.5).span_tokens(n) == linear.span_tokens(n)
        assert PowerRule(coefficient=0.5).span_tokens(n) == SpanRule(0.0, 0.5).span_tokens(n)


def test_every_family_holds_the_floor_and_whole_heads_and_no_two_rules_alike() -> None:
    grids = families(LENGTHS, 8192)
    assert list(grids) == ["linear", "capped", "power", "logarithmic"]
    assert grids["linear"] == rule_grid(LENGTHS)
    for name, grid in grids.items():
        assert {SpanRule(128.0, 0.0), DENSE} <= set(grid), name
        spans = [tuple(rule.span_tokens(n) for n in (*LENGTHS, 8192)) for rule in grid]
        assert len(set(spans)) == len(spans), name
        assert len(grid) >= 30, name
    assert set(grids["linear"]) <= set(grids["capped"])


def test_only_capped_rules_keep_a_span_that_grows_and_then_stops() -> None:
    def bends(rule: SpanRule) -> bool:
        short, middle, long = (rule.span_tokens(n) for n in (*LENGTHS, 8192))
        return 128 < short < min(middle, LENGTHS[0]) and middle == long

    grids = families(LENGTHS, 8192)
    assert [name for name, grid in grids.items() if any(map(bends, grid))] == ["capped"]


def test_the_plan_at_a_length_keeps_what_the_choice_keeps_there() -> None:
    geometry = small_geometry(layers=3, layer_windows=(None, 512, None))
    tables = family_tables(random_profile(0, geometry=geometry), (512, 1024, 2048))
    for name, table in tables.items():
        choice = np.random.default_rng(0).integers(len(table.rules), size=(3, 2))
        choice[0, 0] = table.rules.index(DENSE)
        for length in (512, 1024, 2048):
            plan = at_length(table, choice, length, name)
            assert plan.density(length) == pytest.approx(table.density(choice, length))
            np.testing.assert_array_equal(plan.spans(length), np.take_along_axis(table.span_tokens(length), choice, axis=1))
            assert plan.rules[0][0] == DENSE
            assert not any(isinstance(rule, Curve) for row in plan.rules for rule in row)


def test_plans_of_unlike_rules_with_one_alpha_and_beta_have_identities_of_their_own() -> None:
    table = family_tables(random_profile(0), (512, 1024))["power"]
    one, other = (at_length(table, np.full((2, 2), index), 1024, "power") for index in (3, len(table.rules) - 3))
    assert one.identity() != other.identity()


def test_a_wider_family_predicts_no_more_loss_within_the_same_limits() -> None:
    tables = family_tables(random_profile(1, geometry=small_geometry(layers=6)), (512, 1024, 2048))
    answers = {name: solve_budget(table, {512: 0.5, 1024: 0.5, 2048: 0.5}) for name, table in tables.items()}
    assert answers["capped"].value <= answers["linear"].value * (1 + answers["capped"].gap) + 1e-9
    for answer in answers.values():
        assert max(answer.density.values()) <= 0.5 + 1e-9


def found(plan: str, task: str, low: float, high: float, density: float = 0.25) -> Gain:
    return Gain(plan, "linear", "needles_gained", task, (8192,), Interval((low + high) / 2, 9, low, high), density, 0.25)


def test_the_answer_says_yes_mixed_and_undecided() -> None:
    even = [found("capped", "needles", -0.1, 0.2), found("power", "needles", -0.3, -0.1, 0.2)]
    text = rules_answer(even, 8192, 4096)
    assert text.startswith(
        "No family is shown to beat linear rules, at 8,192 tokens (2 times the longest profiled length). Capped (25.0% kept): needles"
    )
    assert "needles not decided (+0.050" in text
    assert "power 20.0% and linear 25.0% at 8,192 tokens" in text
    win = rules_answer([*even, found("capped", "documents", 0.1, 0.2)], 8192, 4096)
    assert win.startswith("Better than linear rules: capped (1 of 2 comparisons won, none lost)")
    mixed = rules_answer([*even, found("power", "documents", 0.1, 0.2, 0.2)], 8192, 8192)
    assert mixed.startswith("No family is better than linear rules throughout (power")
    assert "(no longer than the profiled)" in mixed
    assert "could be compared" in rules_answer([], 8192, 4096)


def test_linear_rules_of_as_many_bytes_decide_where_there_are_some() -> None:
    short = [found("power", task, -0.3, -0.1, 0.2) for task in ("needles", "documents")]
    twins = [
        replace(found("power", task, 0.1, 0.3, 0.2), against="linear as power", against_density=0.2) for task in ("needles", "documents")
    ]
    text = rules_answer([*short, *twins], 8192, 4096)
    assert text.startswith("Better than linear rules: power (2 of 2 comparisons won, none lost), at 8,192 tokens")
    assert "equal bytes. Power (20.0% kept): needles better (+0.200" in text
    assert "-0.2" not in text
    assert "Not all keep the same" not in text


def test_a_family_that_leaves_bytes_gets_linear_rules_that_keep_no_more() -> None:
    tables = family_tables(random_profile(1, geometry=small_geometry(layers=6)), (512, 1024, 2048))
    solved, twins, left_out = solved_families(tables, {512: 0.5, 1024: 0.5, 2048: 0.5})
    assert not left_out
    short = {
        name for name in FAMILIES if any(solved["linear"].density[n] > kept * (1 + EQUAL_BYTES) for n, kept in solved[name].density.items())
    }
    assert "logarithmic" in short
    assert twins == {name: f"linear as {name}" for name in FAMILIES if name in short}
    for name, twin in twins.items():
        assert all(solved[twin].density[n] <= kept + 1e-9 for n, kept in solved[name].density.items())
    assert set(solved) == {"linear", *FAMILIES, *twins.values()}
    assert set(solved_families(tables, {512: 0.01})[2]) == {"linear", *FAMILIES}


def test_the_study_measures_every_family_at_every_length(record: StudyRecord) -> None:
    for name in ("linear", "capped", "power", "logarithmic"):
        rows = record.select(plan=name, task="needles", metric="retrieval")
        assert sorted(row.length for row in rows) == [512, 640]
        assert all(row.density <= 0.5 + 1e-9 for row in rows)
        told = record.settings["families"][name]
        assert math.isclose(told["density"]["512"], next(row.density for row in rows if row.length == 512))
    assert {row.plan for row in record.select(metric="nats_saved", length=640)} == {"capped", "power", "logarithmic"}
