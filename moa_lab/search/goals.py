"""Goals: the weighted means of objectives that span a front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moa_lab.records import Form, LossTable

QUESTIONS = "questions"
By = Literal["task", "task_length"]
BUDGET_SHARES = (0.25, 0.5, 0.75, 0.95)
"""Weights of the first of two goals in `weighings`; validation decides which is right."""


@dataclass(frozen=True)
class Goal:
    """Weighted mean of objectives, by `Objective.name`; linear in the choice unless a worst_distance objective is in it."""

    name: str
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"goal {self.name!r}: weights must be at least 0 with a sum above 0, got {dict(self.weights)}")

    @property
    def shares(self) -> dict[str, float]:
        """The weights that are not zero, scaled to a sum of 1."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items() if weight > 0}

    def value(self, predicted: Mapping[str, float]) -> float:
        """The goal's value for a plan of the given objective values (`LossTable.predict`)."""
        return sum(share * predicted[name] for name, share in self.shares.items())


def default_goals(
    table: LossTable,
    by: By = "task",
    *,
    forms: Mapping[str, Form] | None = None,
    weights: Mapping[str, float] | None = None,
) -> tuple[Goal, ...]:
    """One goal per task, or per (task, length).

    Questions are counted all-or-nothing (a needle needs *all* heads that carry it), every other task by the sum of lost
    influence; `forms` overrides that per task. Lengths weigh the same unless `weights` (per objective name, default 1)
    says otherwise. Where the table lacks the default form, the form it has is taken. Raises ValueError for a task or
    objective that the table does not hold.
    """
    forms, weights = dict(forms or {}), dict(weights or {})
    names = {objective.name for objective in table.objectives}
    _refuse_unknown("weights", weights, names)
    _refuse_unknown("forms", forms, {objective.task for objective in table.objectives})
    goals = []
    for task in sorted({objective.task for objective in table.objectives}):
        form = forms.get(task) or _default_form(table, task)
        chosen = [o.name for o in table.objectives if o.task == task and o.form == form]
        if not chosen:
            raise ValueError(f"forms: the table holds no {form!r} objective of task {task!r}; build it with that form")
        weighted = {name: weights.get(name, 1.0) for name in chosen}
        goals += [Goal(task, weighted)] if by == "task" else [Goal(name, {name: 1.0}) for name, w in weighted.items() if w > 0]
    return tuple(goals)


def paper_goals(table: LossTable, by: By = "task") -> tuple[Goal, ...]:
    """The paper's own objective: the sum of lost influence for every task."""
    return default_goals(table, by, forms={objective.task: "sum" for objective in table.objectives})


def mean_goal(goals: Sequence[Goal], weights: Mapping[str, float] | None = None, name: str = "mean") -> Goal:
    """One goal out of several: their mean, or the mean weighted by goal name (default weight 1)."""
    total: dict[str, float] = {}
    for goal in goals:
        for objective, share in goal.shares.items():
            total[objective] = total.get(objective, 0.0) + share * (weights or {}).get(goal.name, 1.0)
    return Goal(name, total)


def _default_form(table: LossTable, task: str) -> Form:
    held = [objective.form for objective in table.objectives if objective.task == task]
    preferred: Form = "all_or_nothing" if task == QUESTIONS else "sum"
    return preferred if preferred in held else held[0]


def _refuse_unknown(argument: str, given: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{argument}: {unknown[0]!r} is not in the table; it holds {sorted(known)}")


@dataclass(frozen=True)
class GoalSet:
    """Goals that span one epsilon-constraint front; `name` becomes its points' origin."""

    name: str
    goals: tuple[Goal, ...]


def goal_sets(table: LossTable) -> tuple[GoalSet, ...]:
    """The default goals and the alternatives that `search` names, where the table holds their forms; a single task is split by length."""
    tasks = {objective.task for objective in table.objectives}
    held = {objective.form for objective in table.objectives}
    by: Any = "task" if len(tasks) > 1 else "task_length"
    worst: Form = "worst_distance"
    sets = [GoalSet("default", default_goals(table, by))]
    if "sum" in held:
        sets.append(GoalSet("paper", paper_goals(table, by)))
    if worst in held:
        others = {task: worst for task in tasks if task != QUESTIONS}
        if QUESTIONS in tasks:
            sets.append(GoalSet("worst-questions", default_goals(table, by, forms={QUESTIONS: worst})))
        if others:
            sets.append(GoalSet("worst-others", default_goals(table, by, forms=others)))
    return tuple(sets)


def weighings(goal_set: GoalSet) -> list[Goal]:
    """Weighted means of two goals; of more, or of one, their mean."""
    if len(goal_set.goals) != 2:
        return [mean_goal(goal_set.goals, name=f"{goal_set.name} mean")]
    first, second = goal_set.goals
    return [
        mean_goal(goal_set.goals, {first.name: share, second.name: 1 - share}, name=f"{goal_set.name} {share:g}") for share in BUDGET_SHARES
    ]
