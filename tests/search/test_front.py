"""Epsilon fronts and what compares them, beyond two goals."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from moa_lab.records import Front, LossTable
from moa_lab.search import (
    Goal,
    InfeasibleError,
    default_goals,
    epsilon_front,
    front_values,
    hypervolume,
    limit_lengths,
    non_dominated,
)
from tests.search.instances import small_tables
from tests.search.tables import all_choices, dominated, goal_values, keeps, random_table, task_goals

THREE = (("questions", 1024, "all_or_nothing"), ("stories", 1024, "worst_distance"), ("summaries", 1024, "sum"))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_three_goals_worst_distance_among_them_give_points_that_no_choice_dominates(seed: int, goals: int) -> None:
    table = random_table(seed, objectives=THREE)
    chosen = task_goals(table)[:goals]
    front = epsilon_front(table, {1024: 0.5, 2048: 0.6}, goals=chosen, intervals=2, mip_gap=0.0)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, {1024: 0.5, 2048: 0.6})]
    values = np.stack([goal_values(table, goal, choices) for goal in chosen], axis=1)
    found = front_values(front)
    assert not dominated(found)
    for row in found:
        assert not ((values <= row - 1e-9).all(axis=1)).any()
    np.testing.assert_allclose(found.min(axis=0), values.min(axis=0), rtol=5e-3, atol=5e-3)
    for point in front:
        assert keeps(table, table.choice(point.plan)[None], {1024: 0.5, 2048: 0.6}).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 4))
def test_what_is_not_dominated_has_the_hypervolume_of_everything(seed: int, count: int, objectives: int) -> None:
    values = np.random.default_rng(seed).integers(0, 5, (count, objectives)).astype(float)
    kept = non_dominated(values)
    assert np.flatnonzero(~kept).tolist() == dominated(values)
    assert hypervolume(values[kept], np.full(objectives, 6.0)) == pytest.approx(hypervolume(values, np.full(objectives, 6.0)))


def test_a_front_keeps_pinned_heads_and_few_rules_per_layer() -> None:
    table = random_table(4)
    front = epsilon_front(table, 0.6, intervals=3, max_rules_per_layer=1, pinned={(0, 0): 1})
    assert len(front) >= 1
    for point in front:
        assert point.plan.rules[0][0] == table.rules[1]
        assert all(len(set(row)) == 1 for row in point.plan.rules)


def test_goals_of_one_name_and_infeasible_densities_are_refused() -> None:
    table = random_table(0)
    goal = Goal("twice", {"summaries@2048/sum": 1.0})
    with pytest.raises(ValueError, match="goals must be one or more goals of different names"):
        epsilon_front(table, 0.5, goals=(goal, goal))
    with pytest.raises(ValueError, match="intervals must be at least 1"):
        epsilon_front(table, 0.5, intervals=0)
    with pytest.raises(InfeasibleError, match="at length 2048 is infeasible"):
        epsilon_front(table, 0.01)


@given(npst.arrays(float, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4).map(float)))
def test_non_dominated_equals_its_definition(values: np.ndarray) -> None:
    expected = [not any((a <= b).all() and (a < b).any() for a in values) for b in values]
    assert non_dominated(values).tolist() == expected


def test_hypervolume_is_the_area_below_the_reference() -> None:
    points = np.array([[1.0, 2.0], [2.0, 1.0], [9.0, 9.0]])
    assert hypervolume(points, (3.0, 3.0)) == pytest.approx(3.0)
    assert hypervolume(np.empty((0, 2)), (3.0, 3.0)) == 0.0


@settings(max_examples=10, deadline=None)
@given(small_tables(), st.floats(0.5, 0.95))
def test_epsilon_front_of_a_small_table_lies_on_the_brute_force_front(table: LossTable, density: float) -> None:
    goals = default_goals(table)
    front = epsilon_front(table, density, intervals=3, mip_gap=0.0)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, dict.fromkeys(limit_lengths(table), density))]
    values = np.array([[goal.value(table.predict(c)) for goal in goals] for c in choices])
    assert len(front) >= 1
    assert not dominated(front_values(front))
    for row in front_values(front):
        better = (values <= row + 1e-9).all(axis=1) & (values < row - 1e-6).any(axis=1)
        assert not better.any()
    # The ends of the front are the optima of the single goals.
    np.testing.assert_allclose(front_values(front).min(axis=0), values.min(axis=0), rtol=2e-3, atol=2e-3)


def test_epsilon_front_is_not_dominated_keeps_the_limits_and_repeats(table: LossTable) -> None:
    front = epsilon_front(table, 0.5, intervals=5)
    assert len(front) >= 4
    assert front.objectives == ("questions", "summaries")
    assert not dominated(front_values(front))
    assert all(density <= 0.5 for point in front for density in point.density.values())
    assert all(set(point.density) == {"512", "1024", "2048"} for point in front)
    assert all(point.gap is not None and point.gap <= 1e-3 for point in front)
    again = epsilon_front(table, 0.5, intervals=5)
    assert [point.plan.identity() for point in again] == [point.plan.identity() for point in front]


def test_epsilon_front_takes_one_goal_per_task_and_length(table: LossTable) -> None:
    goals = default_goals(table, "task_length")
    assert [goal.name for goal in goals] == [
        *(f"questions@{n}/all_or_nothing" for n in (512, 1024, 2048)), *(f"summaries@{n}/sum" for n in (512, 1024, 2048)),
    ]  # fmt: skip
    front = epsilon_front(table, 0.5, goals=goals, intervals=2)
    assert not dominated(front_values(front))
    assert set(front.objectives) <= set(front.points[0].predicted)


def test_cancelled_epsilon_front_returns_what_it_has(table: LossTable) -> None:
    cancel = threading.Event()
    front = epsilon_front(table, 0.5, progress=lambda done, total, message: cancel.set() if done == 1 else None, cancel=cancel)
    assert len(front) == 1
    assert front.settings["unsolved"] > 0


def test_fronts_survive_saving(table: LossTable, tmp_path: object) -> None:
    front = epsilon_front(table, 0.5, intervals=2)
    loaded = Front.load(front.save(f"{tmp_path}/front.json"))
    assert [point.plan.identity() for point in loaded] == [point.plan.identity() for point in front]
    assert loaded.settings["solver"] == "epsilon"
