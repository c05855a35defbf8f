"""The relaxation against linear programming, exchanges and the condensed program against every choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moa_lab.search import Goal, highs, lagrange, limit_lengths, mean_goal
from moa_lab.search.exchange import exchange
from moa_lab.search.instance import Instance
from moa_lab.search.problem import Limits, Terms, Usage, allowed_rules, terms
from moa_lab.search.program import condensed, decode, program
from moa_lab.search.relaxation import relax
from tests.search.tables import all_choices, goal_values, keeps, large_table, random_table, small_geometry, task_goals

MIXED = (("questions", 1024, "worst_distance"), ("summaries", 2048, "sum"), ("summaries", 2048, "worst_distance"))


def fractional_optimum(goal: Terms, limits: Limits) -> float:
    """The goal's least value when every head may share itself between rules: no relaxation by multipliers proves more."""
    heads, rules = goal.linear.shape
    rows = [row for term in goal.worst for row in term.rows]
    tops = np.repeat(np.eye(len(goal.worst)), [len(term.rows) for term in goal.worst], axis=0)
    usage = limits.usage.reshape(len(limits.limit), -1)
    above = np.block([[usage, np.zeros((len(usage), len(goal.worst)))], [np.reshape(rows, (len(rows), heads * rules)), -tops]])
    each = np.hstack([np.kron(np.eye(heads), np.ones(rules)), np.zeros((heads, len(goal.worst)))])
    found = linprog(
        np.append(goal.linear.ravel(), [term.weight for term in goal.worst]), A_ub=above,
        b_ub=np.append(limits.limit, np.zeros(len(rows))), A_eq=each, b_eq=np.ones(heads),
    )  # fmt: skip
    return float(found.fun)


@pytest.mark.parametrize("many", [lagrange.MANY, 400])
@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize("density", [0.15, 0.5, 0.8])
def test_the_bound_is_that_of_linear_programming_to_within_a_percent_and_with_effort_all_of_it(
    monkeypatch: pytest.MonkeyPatch, worst: bool, density: float, many: int
) -> None:
    # With 400, the curvature of the first steps is that of some heads, as in a large model.
    monkeypatch.setattr(lagrange, "MANY", many)
    table = large_table(layers=8, kv_heads=4, worst=worst)
    objectives = [objective.name for objective in table.objectives if (objective.form == "worst_distance") == worst]
    goal, targets = terms(table, Goal("mean", dict.fromkeys(objectives, 1.0))), dict.fromkeys(limit_lengths(table), density)
    limits = Usage(table, targets).limits(targets)
    best = fractional_optimum(goal, limits)
    for effort, gap in ((1, 0.01), (2, 1e-5)):
        found = relax(goal, limits, allowed_rules(table, None), effort)
        assert found.bound <= best * (1 + 1e-9)
        assert found.dual.bound >= best * (1 - gap)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 0.9))
def test_exchanges_keep_the_limits_and_find_the_best_of_two_heads(seed: int, density: float) -> None:
    table = random_table(seed, geometry=small_geometry(layers=1), objectives=MIXED, monotone=False)
    goal, targets = mean_goal(task_goals(table)), dict.fromkeys(limit_lengths(table), density)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, targets)]
    limits, arrays = Usage(table, targets).limits(targets), terms(table, goal)
    found = relax(arrays, limits, allowed_rules(table, None))
    best = goal_values(table, goal, choices).min()
    for choice in choices.reshape(len(choices), -1):
        improved = exchange(arrays, limits, found.relaxed, found.dual, choice)
        assert limits.met_by(improved)
        assert arrays.value(improved) == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.25, 0.9))
def test_a_condensed_program_has_the_optimum_of_the_whole_one(seed: int, density: float) -> None:
    table = random_table(seed, objectives=MIXED)
    goal, targets = mean_goal(task_goals(table)), dict.fromkeys(limit_lengths(table), density)
    limits, allowed = Usage(table, targets).limits(targets), allowed_rules(table, {(0, 1): seed % len(table.rules)} if seed % 2 else None)
    problem = Instance(terms(table, goal), limits, (), allowed, table.geometry.layers, None)
    whole, entries = program(problem, allowed, 10.0)
    short = condensed(whole, entries, np.random.default_rng(seed).random(allowed.shape))
    assert len(short.model.objective) == len(whole.objective) - len(allowed)
    expected, found = (highs.solve(model, time_limit_s=10, mip_gap=0.0) for model in (whole, short.model))
    assert found.status == expected.status
    if found.status == "optimal":
        choice = decode(short.whole(found.x), entries, allowed.shape)
        assert limits.met_by(choice)
        assert allowed[np.arange(len(choice)), choice].all()
        assert 10 * problem.goal.value(choice) == pytest.approx(expected.bound, abs=1e-5)
        assert found.bound == pytest.approx(expected.bound, abs=1e-5)


def test_what_choices_add_to_rows_is_the_same_head_by_head_as_over_all() -> None:
    random = np.random.default_rng(0)
    # As of layers, where rows come first in memory.
    rows = np.moveaxis(random.random((5, 7, 3)), 0, -1)
    relaxed, multipliers, shares = lagrange.Relaxed(random.random((7, 3)), rows, np.ones(5)), random.random(5), random.random((7, 3))
    np.testing.assert_allclose(relaxed.reduced(multipliers), relaxed.cost + np.einsum("hrk,k->hr", rows, multipliers), rtol=1e-12)
    np.testing.assert_allclose(relaxed.shared(shares), np.einsum("hr,hrk->k", shares, rows), rtol=1e-12)
