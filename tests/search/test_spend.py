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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([(128, 0), (3072, 0), (0, 1), (0, 0.125), (512, 0), (-512, 0.5), (1024, 0.0)]), min_size=6, max_size=6),
    st.floats(0.3, 0.9), st.booleans(),
)  # fmt: skip
def test_rules_that_cannot_grow_alike_grow_by_lines_of_their_own(rules: list[tuple[float, float]], density: float, hybrid: bool) -> None:
    geometry = HYBRID if hybrid else small_geometry(layers=6, kv_heads=1, max_length=8192)
    plan = Plan(geometry=geometry, rules=tuple((SpanRule(float(alpha), float(beta)),) for alpha, beta in rules))
    grown = spend(plan, targets(density))
    for n in LENGTHS:
        assert (grown.spans(n) >= plan.spans(n)).all(), "no span shrinks"
        assert grown.density(n) <= max(density, plan.density(n)) + 1e-9
    for one in range(6):
        for other in range(one):
            if plan.rules[one] == plan.rules[other] and geometry.layer_windows[one] == geometry.layer_windows[other]:
                assert grown.rules[one] == grown.rules[other]


def test_a_budget_that_binds_at_one_length_is_spent_at_the_others() -> None:
    # Two heads see far: at 2048 the constant one is whole, at 4096 all is kept that may be.
    rules = [SpanRule(float(tokens), 0.0) for tokens in (128, 128, 3072, 128, 128, 0)]
    rules[5] = SpanRule(0.0, 1.0)
    plan = Plan(geometry=HYBRID, rules=tuple((rule,) for rule in rules))
    asked = {n: plan.density(4096) for n in (2048, 4096, 8192)}
    assert plan.density(8192) < 0.9 * asked[8192]
    grown = spend(plan, asked)
    assert grown.spans(4096).tolist() == plan.spans(4096).tolist()
    assert grown.density(8192) > 0.99 * asked[8192]
    assert grown.search["spent"]["bent_heads"] == 1


@pytest.mark.parametrize("spans", [SpanRule(128.0, 0.0), SpanRule(0.0, 0.25)])
def test_a_plan_that_exceeds_a_length_is_returned_as_it_is_also_where_nothing_may_be_kept(spans: SpanRule) -> None:
    plan = Plan(geometry=GEOMETRY, rules=((spans,) * 2,) * 6)
    for density in (0.01, 0.1):
        # At 2 tokens not one of 24 may be kept at 1%.
        asked = {2: density, 8192: 0.5}
        assert spend(plan, asked) is plan


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_lines_with_parts_of_tokens_find_room_where_one_length_is_full(seed: int) -> None:
    windows = tuple(None if layer % 6 == 5 else 1024 for layer in range(12))
    geometry = small_geometry(layers=12, kv_heads=4, max_length=16384, layer_windows=windows)
    rng = np.random.default_rng(seed)
    rules = tuple(tuple(SpanRule(float(rng.integers(128, 1000)), float(rng.random() * 0.3)) for _ in range(4)) for _ in range(12))
    plan = Plan(geometry=geometry, rules=rules)
    grown = spend(plan, dict.fromkeys((1024, 2048, 4096, 8192, 16384), 0.9))
    for n in (1024, 2048):
        assert 0.89 < grown.density(n) <= 0.9
    for n in (4096, 8192, 16384):
        assert (grown.spans(n) >= plan.spans(n)).all()
        assert grown.density(n) <= 0.9


def test_tokens_that_rounding_adds_to_full_lengths_take_no_room_from_heads_that_have_it_elsewhere() -> None:
    # Full at 384 and 768 tokens; at 600 there is room for 38 tokens, which the last head alone can take.
    rules = (
        (SpanRule(-12.0, 0.6142578125), SpanRule(116.0, 0.0517578125)),
        (SpanRule(-12.0, 0.3642578125), SpanRule(-268.0, 0.8017578125)),
    )
    plan = Plan(geometry=small_geometry(layers=2, kv_heads=2, max_length=2048), rules=rules)
    grown = spend(plan, {384: 0.4, 600: 0.4, 768: 0.4})
    assert plan.density(600) < 0.385
    assert grown.density(600) > 0.396
    for n in (384, 600, 768):
        assert (grown.spans(n) >= plan.spans(n)).all()
        assert grown.density(n) <= 0.4
