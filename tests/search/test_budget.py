"""The instant answer against every choice, and its speed."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.search import BudgetSolver, Goal, InfeasibleError, mean_goal, solve_budget, solve_milp
from tests.search.tables import all_choices, goal_values, keeps, large_table, random_table, task_goals

MIXED = (("questions", 1024, "all_or_nothing"), ("summaries", 2048, "sum"), ("summaries", 2048, "worst_distance"))
TARGETS = st.dictionaries(st.sampled_from([512, 1024, 2048, 3000, 4096]), st.floats(0.3, 1.0), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), TARGETS, st.booleans(), st.sampled_from([0, 1, 2, None]), st.booleans())
def test_the_bound_is_never_above_the_optimum_and_the_answer_is_feasible_at_every_length(
    seed: int, targets: dict[int, float], monotone: bool, which: int | None, pin: bool
) -> None:
    table = random_table(seed, objectives=MIXED, monotone=monotone)
    goal = mean_goal(task_goals(table)) if which is None else task_goals(table)[which]
    choices = all_choices(table)
    choices = choices[keeps(table, choices, targets)]
    pinned = {(1, 0): seed % len(table.rules)} if pin else {}
    for head, rule in pinned.items():
        choices = choices[choices[:, head[0], head[1]] == rule]
    if not len(choices):
        with pytest.raises(InfeasibleError):
            solve_budget(table, targets, goal=goal, pinned=pinned)
        return
    answer = solve_budget(table, targets, goal=goal, pinned=pinned)
    best = goal_values(table, goal, choices).min()
    assert answer.bound <= best + 1e-9
    assert keeps(table, answer.choice[None], targets).all()
    assert answer.value == pytest.approx(goal_values(table, goal, answer.choice[None])[0])
    assert answer.value >= best - 1e-9
    assert answer.gap == pytest.approx(max(answer.value - answer.bound, 0.0) / max(answer.value, 1e-9))
    assert all(answer.choice[head] == rule for head, rule in pinned.items())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(400, 8000))
def test_the_least_density_that_a_refusal_names_is_feasible(seed: int, length: int) -> None:
    table = random_table(seed)
    with pytest.raises(InfeasibleError, match=rf"at length {length} is infeasible: min_span 128") as refused:
        solve_budget(table, {length: 0.01})
    least = float(str(refused.value).split("at least ")[1].split(";")[0])
    answer = solve_budget(table, {length: least})
    assert (table.span_tokens(length)[np.arange(2)[:, None], answer.choice] == 128).all()
    assert least - answer.density[length] < 1e-4


def test_a_solver_gives_the_same_answer_whatever_it_was_asked_before() -> None:
    table = large_table(layers=4, kv_heads=4)
    slider = BudgetSolver(table)
    first = slider.solve(0.4)
    for density in (0.9, 0.2, 0.6):
        slider.solve(density)
    again, fresh = slider.solve(0.4), solve_budget(table, 0.4)
    for other in (again, fresh):
        np.testing.assert_array_equal(other.choice, first.choice)
        assert (other.value, other.bound) == (first.value, first.bound)


def test_more_density_never_costs_more_than_the_gap() -> None:
    slider = BudgetSolver(large_table(layers=8, kv_heads=4))
    answers = [slider.solve(density) for density in (0.15, 0.25, 0.5, 0.75, 1.0)]
    bounds = [answer.bound for answer in answers]
    assert bounds == sorted(bounds, reverse=True)
    assert answers[-1].value == pytest.approx(0.0)
    assert max(answer.value - answer.bound for answer in answers) < 0.01


def test_answers_of_a_worst_distance_goal_are_the_same_whatever_was_asked_before() -> None:
    table = large_table(layers=4, kv_heads=4, worst=True)
    goal = Goal("summaries", {objective.name: 1.0 for objective in table.objectives if objective.form == "worst_distance"})
    wandered = BudgetSolver(table, goal)
    moves = (0.9, 0.31, 0.5, 0.33, 0.31)
    found = {density: wandered.solve(density) for density in moves}
    for density in moves:
        fresh = BudgetSolver(table, goal).solve(density)
        assert fresh.bound <= solve_milp(table, density, goal=goal).value <= fresh.value + 1e-9
        assert (found[density].choice == fresh.choice).all()
        assert (found[density].value, found[density].bound) == (fresh.value, fresh.bound)


def test_a_worst_distance_goal_is_answered_within_its_bound() -> None:
    table = large_table(layers=4, kv_heads=4, worst=True)
    goal = Goal("summaries", {objective.name: 1.0 for objective in table.objectives if objective.form == "worst_distance"})
    quick = solve_budget(table, 0.4, goal=goal)
    exact = solve_milp(table, 0.4, goal=goal, mip_gap=0.02, time_limit_s=2)
    assert quick.bound <= exact.value * (1 + 1e-9)
    assert exact.value <= quick.value * (1 + 1e-9)


@pytest.mark.alone
def test_1024_heads_45_rules_and_3_lengths_are_answered_within_a_quarter_second() -> None:
    table = large_table()
    assert 40 <= len(table.rules) <= 50
    slider = BudgetSolver(table, lengths=(2048, 4096, 8192))
    seconds = []
    for density in (0.2, 0.3, 0.4, 0.5, 0.6):
        began = time.perf_counter()
        answer = slider.solve(density)
        seconds.append(time.perf_counter() - began)
        assert answer.gap < 0.02
    assert np.median(seconds) <= 0.25
