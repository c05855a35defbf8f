"""Budget and MILP against brute force."""

import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moa_lab.records import FORMS, LossTable
from moa_lab.search import (
    Goal,
    InfeasibleError,
    NoPlanError,
    default_goals,
    highs,
    limit_lengths,
    loss_table,
    mean_goal,
    milp,
    paper_goals,
    solve_budget,
    solve_milp,
)
from moa_lab.search.instance import Instance
from moa_lab.search.problem import Usage, allowed_rules, terms
from moa_lab.search.program import program
from tests.search.instances import skewed_profile, small_tables
from tests.search.tables import all_choices, keeps

DENSITIES = st.floats(0.3, 1.0)


def _goals_of(table: LossTable) -> list[Goal]:
    """The forms one by one, and a mean that mixes all three."""
    by_form = [Goal(form, {o.name: 1.0 + i for i, o in enumerate(table.objectives) if o.form == form}) for form in FORMS]
    return [*by_form, mean_goal(by_form)]


def _feasible(table: LossTable, density: float) -> list[np.ndarray]:
    lengths = limit_lengths(table)
    choices = all_choices(table)
    return list(choices[keeps(table, choices, dict.fromkeys(lengths, density))])


def _values(table: LossTable, goal: Goal, choices: list[np.ndarray]) -> list[float]:
    return [goal.value(table.predict(choice)) for choice in choices]


@settings(max_examples=25, deadline=None)
@given(small_tables(), DENSITIES, st.integers(1, 2), st.integers(0, 3))
def test_milp_with_few_rules_per_layer_equals_brute_force(table: LossTable, density: float, most: int, which: int) -> None:
    goal = _goals_of(table)[which]
    choices = [c for c in _feasible(table, density) if max(len(set(row)) for row in c.tolist()) <= most]
    assume(choices)
    answer = solve_milp(table, density, goal=goal, max_rules_per_layer=most, mip_gap=0.0)
    assert max(len(set(row)) for row in answer.choice.tolist()) <= most
    assert answer.value == pytest.approx(min(_values(table, goal, choices)), rel=1e-6, abs=1e-9)
    assert answer.bound <= answer.value


@settings(max_examples=25, deadline=None)
@given(small_tables(), DENSITIES, st.integers(0, 3), st.data())
def test_pinned_heads_keep_their_rule_and_the_rest_is_optimal(table: LossTable, density: float, which: int, data: st.DataObject) -> None:
    goal = _goals_of(table)[which]
    head = (data.draw(st.integers(0, table.geometry.layers - 1)), data.draw(st.integers(0, table.geometry.kv_heads - 1)))
    rule = data.draw(st.integers(0, 2))
    choices = [c for c in _feasible(table, density) if c[head] == rule]
    if not choices:
        with pytest.raises(InfeasibleError):
            solve_milp(table, density, goal=goal, pinned={head: rule})
        return
    best = min(_values(table, goal, choices))
    answer = solve_milp(table, density, goal=goal, pinned={head: rule}, mip_gap=0.0)
    assert answer.choice[head] == rule
    assert answer.value == pytest.approx(best, rel=1e-6, abs=1e-9)
    quick = solve_budget(table, density, goal=goal, pinned={head: rule})
    assert quick.choice[head] == rule
    assert quick.bound <= best + 1e-9 <= quick.value + 2e-9


def test_densities_may_differ_by_length() -> None:
    table = loss_table(skewed_profile(lengths=(512, 1024)))
    asked = {512: 0.9, 1024: 0.3, 4096: 0.5}
    for answer in (solve_milp(table, asked), solve_budget(table, asked)):
        for n, density in asked.items():
            assert table.density(answer.choice, n) <= density


def test_limit_lengths_add_one_extrapolated_length_within_the_models_maximum() -> None:
    table = loss_table(skewed_profile(lengths=(256, 512)))
    assert limit_lengths(table) == (256, 512, 1024)
    assert limit_lengths(table, [512]) == (512,)


def test_realistic_profiles_are_answered_within_one_per_cent_and_solved_exactly() -> None:
    table = loss_table(skewed_profile(30, 9, 3, (1024, 2048)))
    for goal in (None, mean_goal(paper_goals(table))):
        quick, exact = solve_budget(table, 0.5, goal=goal), solve_milp(table, 0.5, goal=goal)
        assert quick.gap <= 0.01
        assert exact.gap <= 1e-4
        assert quick.bound <= exact.value * (1 + 1e-9) <= quick.value * (1 + 2e-9)


@pytest.mark.parametrize("solve", [solve_budget, solve_milp])
def test_infeasible_budgets_name_the_length_that_binds_and_the_least_density(solve: object) -> None:
    table = loss_table(skewed_profile(lengths=(1024, 2048)))
    with pytest.raises(InfeasibleError, match=r"density 0\.1 at length 1024 is infeasible: min_span 128 needs at least 0\.125"):
        solve(table, 0.1)  # type: ignore[operator]
    with pytest.raises(InfeasibleError, match=r"at length 4096 .* needs at least 0\.0313"):
        solve(table, {1024: 0.2, 4096: 0.03})  # type: ignore[operator]
    least = solve(table, 0.125)  # type: ignore[operator]
    assert table.density(least.choice, 1024) == 0.125
    pinned = {(0, 0): len(table.rules) - 1}
    with pytest.raises(InfeasibleError, match=r"with the pinned heads needs at least 0\.3438"):
        solve(table, 0.3, pinned=pinned)  # type: ignore[operator]


def test_bad_arguments_of_the_solvers_are_named() -> None:
    table = loss_table(skewed_profile())
    for density in (0.0, 1.5, float("nan"), -1.0):
        with pytest.raises(ValueError, match="density must be a number above 0 and at most 1"):
            solve_milp(table, density)
        with pytest.raises(ValueError, match="density must be a number above 0 and at most 1"):
            solve_budget(table, density)
    with pytest.raises(ValueError, match=r"pinned: there is no \(layer 7"):
        solve_milp(table, 0.8, pinned={(7, 0): 0})
    with pytest.raises(ValueError, match="pinned: rule index 99"):
        solve_budget(table, 0.8, pinned={(0, 0): 99})
    with pytest.raises(ValueError, match="max_rules_per_layer must be at least 1"):
        solve_milp(table, 0.8, max_rules_per_layer=0)
    with pytest.raises(ValueError, match="layer 0 has heads pinned to 2 rules"):
        solve_milp(table, 0.8, max_rules_per_layer=1, pinned={(0, 0): 0, (0, 1): 1})
    with pytest.raises(ValueError, match="objective 'stories@256/sum' is not in the table"):
        solve_milp(table, 0.8, goal=Goal("stories", {"stories@256/sum": 1.0}))
    with pytest.raises(ValueError, match="weights must be at least 0"):
        Goal("none", {"questions@256/sum": 0.0})


def test_a_solver_process_gives_the_answer_of_this_process() -> None:
    table = loss_table(skewed_profile(6, 4, 2, (512, 1024)))
    problem = Instance(terms(table, None), Usage(table, (512, 1024)).limits({512: 0.5, 1024: 0.5}), (), allowed_rules(table, None), 6, None)
    model, _ = program(problem, problem.allowed, 10.0)
    here = highs._solve_here(model, 30.0, 0.0)
    apart = highs._solve_apart(model, 30.0, 0.0, threading.Event())
    assert (here.status, apart.status) == ("optimal", "optimal")
    assert here.x is not None
    assert apart.x is not None
    assert model.objective @ apart.x == pytest.approx(model.objective @ here.x)


def test_running_out_of_time_reports_a_valid_gap() -> None:
    table = loss_table(skewed_profile(60, 16, 8, (1024, 2048, 4096)))
    goal = mean_goal(default_goals(table, forms={"questions": "worst_distance"}))
    answer = solve_milp(table, 0.25, goal=goal, mip_gap=0.0, time_limit_s=1.0)
    assert answer.status == "time_limit"
    assert answer.gap == pytest.approx((answer.value - answer.bound) / answer.value)
    assert 0 < answer.gap < 0.05
    assert keeps(table, answer.choice[None], dict.fromkeys(limit_lengths(table), 0.25)).all()


def test_stopping_before_any_feasible_choice_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    table = loss_table(skewed_profile())
    monkeypatch.setattr(milp, "_solve", lambda *_: ("time_limit", None, 0.0))
    with pytest.raises(NoPlanError, match="raise time_limit_s"):
        solve_milp(table, 0.8)
