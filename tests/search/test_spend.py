"""Budgets that are spent at every length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.plan import Plan, SpanRule, full_or_floor_plan
from moa_lab.search.spend import spend
from tests.search.tables import small_geometry

LENGTHS = (1024, 2048, 4096, 8192)
GEOMETRY = small_geometry(layers=6, kv_heads=2, max_length=8192)
HYBRID = small_geometry(layers=6, kv_heads=1, max_length=8192, layer_windows=(512, 512, None, 512, 512, None))


def targets(density: float) -> dict[int, float]:
    return dict.fromkeys(LENGTHS, density)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=11), st.floats(0.15, 0.95), st.sampled_from([128, 192, 300]))
def test_whole_heads_over_a_floor_keep_what_was_asked_at_every_length_and_never_more(
    whole: set[tuple[int, int]], density: float, floor: int
) -> None:
    plan = full_or_floor_plan(GEOMETRY, whole, floor)
    grown = spend(plan, targets(density))
    for n in LENGTHS:
        if plan.density(n) <= density:
            assert grown.density(n) <= density + 1e-9
        assert (grown.spans(n) >= plan.spans(n)).all()
    if all(plan.density(n) <= density for n in LENGTHS):
        assert min(grown.density(n) / density for n in LENGTHS) > 0.99
    else:
        assert grown == plan


def test_heads_of_equal_rules_stay_equal_and_whole_heads_whole() -> None:
    plan = full_or_floor_plan(GEOMETRY, [(0, 0), (3, 1)])
    grown = spend(plan, targets(0.5))
    assert len({rule for row in grown.rules for rule in row}) == 2
    assert grown.rules[0][0] == plan.rules[0][0]
    assert grown.search["spent"]["beta"] > 0


def test_a_plan_that_keeps_its_budget_is_returned_as_it_is() -> None:
    rules = ((SpanRule(0.0, 0.5),) * 2,) * 6
    plan = Plan(geometry=GEOMETRY, rules=rules)
    assert spend(plan, targets(0.5)) is plan
    assert spend(plan, targets(0.504)) is plan


def test_only_the_heads_that_may_grow_do() -> None:
    mask = np.zeros((6, 1), dtype=bool)
    mask[[2, 5]] = True
    grown = spend(full_or_floor_plan(HYBRID, [], 128), targets(0.5), mask)
    spans = grown.spans(8192)
    assert (spans[~mask] == 128).all()
    assert spans[2, 0] == spans[5, 0] > 1024


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_in_a_hybrid_spans_may_shrink_with_the_length_where_long_inputs_leave_less(density: float) -> None:
    mask = np.zeros((6, 1), dtype=bool)
    mask[2] = True
    plan = spend(spend(full_or_floor_plan(HYBRID, [], 128), targets(density), mask), targets(density), ~mask)
    assert all(plan.density(n) <= density + 1e-9 for n in LENGTHS)
    assert min(plan.density(n) / density for n in LENGTHS) > 0.9
