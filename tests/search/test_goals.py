"""Weighted means of objectives."""

from __future__ import annotations

import pytest

from moa_lab.records import LossTable
from moa_lab.search import (
    Goal,
    default_goals,
    loss_table,
    mean_goal,
    paper_goals,
)
from tests.search.instances import skewed_profile
from tests.search.tables import random_table

OBJECTIVES = (
    ("questions", 1024, "sum"), ("questions", 1024, "all_or_nothing"), ("questions", 2048, "all_or_nothing"), ("summaries", 2048, "sum"),
)  # fmt: skip


def test_questions_are_counted_all_or_nothing_and_other_tasks_by_their_sum() -> None:
    goals = {goal.name: goal for goal in default_goals(random_table(objectives=OBJECTIVES))}
    assert set(goals) == {"questions", "summaries"}
    assert goals["questions"].shares == {"questions@1024/all_or_nothing": 0.5, "questions@2048/all_or_nothing": 0.5}
    assert goals["summaries"].shares == {"summaries@2048/sum": 1.0}


def test_the_papers_goals_are_sums_alone() -> None:
    assert [dict(goal.weights) for goal in paper_goals(random_table(objectives=OBJECTIVES))] == [
        {"questions@1024/sum": 1.0},
        {"summaries@2048/sum": 1.0},
    ]


def test_a_weight_of_nothing_leaves_an_objective_out() -> None:
    weights = {"questions@1024/all_or_nothing": 0.0}
    table = random_table(objectives=OBJECTIVES)
    assert default_goals(table, weights=weights)[0].shares == {"questions@2048/all_or_nothing": 1.0}
    names = [goal.name for goal in default_goals(table, "task_length", weights=weights)]
    assert names == ["questions@2048/all_or_nothing", "summaries@2048/sum"]


def test_the_value_of_a_goal_is_the_weighted_mean_of_its_objectives() -> None:
    goal = Goal("mixed", {"a": 3.0, "b": 1.0, "c": 0.0})
    assert goal.value({"a": 1.0, "b": 5.0, "c": 100.0}) == pytest.approx(2.0)
    mean = mean_goal([Goal("one", {"a": 2.0}), Goal("two", {"a": 1.0, "b": 1.0})])
    assert mean.shares == pytest.approx({"a": 0.75, "b": 0.25})


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 1.0, "b": -0.1}])
def test_weights_below_nothing_or_without_a_sum_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weights must be at least 0 with a sum above 0"):
        Goal("bad", weights)


def test_default_goals_take_weights_and_forms_and_refuse_unknown_names(table: LossTable) -> None:
    weighted = default_goals(table, weights={"summaries@512/sum": 3.0})
    assert weighted[1].shares == {"summaries@512/sum": 0.6, "summaries@1024/sum": 0.2, "summaries@2048/sum": 0.2}
    assert default_goals(table, forms={"questions": "sum"})[0].shares == pytest.approx(
        {f"questions@{n}/sum": 1 / 3 for n in (512, 1024, 2048)}
    )
    assert mean_goal(weighted, {"questions": 3.0}).shares["questions@512/all_or_nothing"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="forms: 'poems' is not in the table"):
        default_goals(table, forms={"poems": "sum"})
    with pytest.raises(ValueError, match="weights: 'summaries@9/sum'"):
        default_goals(table, weights={"summaries@9/sum": 1.0})
    sums_only = loss_table(skewed_profile(), forms=("sum",))
    assert set(default_goals(sums_only)[0].weights) == {"questions@256/sum", "questions@512/sum", "questions@1024/sum"}
