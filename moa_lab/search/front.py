"""Fronts: the paper's epsilon-constraint enumeration, the non-dominated set, and the hypervolume that compares fronts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from pymoo.indicators.hv import HV

from moa_lab.plan import Plan
from moa_lab.records import Front, FrontPoint, LossTable
from moa_lab.search.goals import Goal, default_goals
from moa_lab.search.milp import MilpAnswer, solve_milp
from moa_lab.search.problem import Density, InfeasibleError, NoPlanError, Pinned, densities
from moa_lab.search.spend import spend

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, message)."""

TIE_BREAK = 1e-3
"""Weight of the other goals in each solve, so that of equally good plans a non-dominated one is found."""
MAX_GRID_GOALS = 3
DENSITY = "density"


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Boolean (points,): which rows of `values` (points, objectives; less is better) no other row dominates.

    A row dominates another when it is nowhere worse and somewhere better; equal rows do not dominate each other.
    """
    values = np.asarray(values, dtype=np.float64)
    no_worse = (values[:, None, :] <= values[None, :, :]).all(axis=2)
    better = (values[:, None, :] < values[None, :, :]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))


def hypervolume(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Volume between the points (points, objectives; less is better) and `reference`; points beyond it count nothing."""
    points = np.asarray(points, dtype=np.float64)
    return float(HV(ref_point=np.asarray(reference, dtype=np.float64))(points)) if len(points) else 0.0


def front_values(front: Front | Sequence[FrontPoint], names: Sequence[str] | None = None) -> np.ndarray:
    """Values (points, objectives) of a front in its own objectives or in `names`; "density" is the mean over the point's lengths."""
    names = front.objectives if names is None and isinstance(front, Front) else (names or ())
    return np.array([_values(point, names) for point in front], dtype=np.float64).reshape(len(front), -1)


def point(
    table: LossTable,
    choice: np.ndarray,
    *,
    name: str,
    origin: str,
    lengths: Iterable[int],
    goals: Sequence[Goal] = (),
    gap: float | None = None,
    search: Mapping[str, Any] | None = None,
) -> FrontPoint:
    """The point of a choice of the table's rules: its plan is called `name`. See `plan_point`."""
    lengths = tuple(lengths)
    plan = table.plan(choice, name, lengths=lengths, search={**(search or {}), "origin": origin})
    return plan_point(table, plan, origin=origin, lengths=lengths, goals=goals, gap=gap)


def plan_point(
    table: LossTable, plan: Plan, *, origin: str, lengths: Iterable[int], goals: Sequence[Goal] = (), gap: float | None = None
) -> FrontPoint:
    """A front point: the plan, every objective's and goal's predicted value (also of rules that the table lacks), its density at
    `lengths`."""
    wide = table.with_plans(plan)
    predicted = wide.predict(wide.choice(plan))
    predicted = {**predicted, **{goal.name: goal.value(predicted) for goal in goals}}
    lengths = tuple(lengths)
    return FrontPoint(replace(plan, lengths=lengths), predicted, {str(n): plan.density(n) for n in lengths}, origin, gap)


def spent_point(table: LossTable, found: FrontPoint, targets: Mapping[int, float], goals: Sequence[Goal] = ()) -> FrontPoint:
    """The point with what its plan leaves of the budget `targets` (density by length) spent; the same where it leaves nothing."""
    plan = spend(found.plan, targets, engine=table.engine)
    return found if plan is found.plan else plan_point(table, plan, origin=found.origin, lengths=targets, goals=goals, gap=found.gap)


def distinct(points: Iterable[FrontPoint]) -> list[FrontPoint]:
    """The points without equal plans (by `Plan.identity`); the first of each stays."""
    seen: dict[str, FrontPoint] = {}
    for candidate in points:
        seen.setdefault(candidate.plan.identity(), candidate)
    return list(seen.values())


def undominated(points: Iterable[FrontPoint], names: Sequence[str], keep: Sequence[str] = ()) -> list[FrontPoint]:
    """The distinct points that no other dominates in `names`; points whose origin is in `keep` stay as they are."""
    candidates = distinct(points)
    if not candidates:
        return []
    good = non_dominated(front_values(candidates, names))
    return [candidate for candidate, fine in zip(candidates, good, strict=True) if fine or candidate.origin in keep]


def epsilon_front(
    table: LossTable,
    density: Density,
    *,
    goals: Sequence[Goal] | None = None,
    intervals: int = 5,
    lengths: Iterable[int] | None = None,
    max_rules_per_layer: int | None = None,
    pinned: Pinned | None = None,
    time_limit_s: float = 300.0,
    mip_gap: float = 1e-3,
    label: str = "milp",
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Front:
    """The front of `goals` (default: one per task) at a density limit, by epsilon constraints (arXiv 2406.14909, sec. 4.3).

    Each goal is minimised alone, which gives its range; then each in turn is minimised while the others may not exceed the
    levels that divide their ranges into `intervals`: the full grid for up to three goals, one limited goal at a time for
    more. Distinct plans that no other dominates in the goals stay, cheapest in the first goal first. `time_limit_s` is for
    the whole front (solves that no time is left for are counted in `settings["unsolved"]`, and results then depend on the
    machine). When `cancel` is set, what was found so far is returned. Raises InfeasibleError for an infeasible density.
    """
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1, got {intervals}")
    goals = default_goals(table) if goals is None else tuple(goals)
    _check_goals(goals)
    targets = densities(table, density, lengths)
    run = _Run(table, targets, goals, max_rules_per_layer, pinned, mip_gap, label, time.perf_counter() + time_limit_s, cancel)
    total = len(goals) + _grid_size(len(goals), intervals)
    for done, goal in enumerate(goals):
        run.solve(goal, {}, remaining=total - done)
        _tell(progress, done + 1, total, f"{label}: least {goal.name}")
    if len(goals) > 1 and run.points:
        levels = _levels(front_values(run.points, [goal.name for goal in goals]), goals, intervals)
        for done, (goal, limits) in enumerate(_grid(goals, levels), start=len(goals)):
            run.solve(goal, limits, remaining=total - done)
            _tell(progress, done + 1, total, f"{label}: {goal.name} within limits")
    names = tuple(goal.name for goal in goals)
    points = sorted(undominated(run.points, names), key=lambda p: tuple(p.predicted[name] for name in names))
    settings = {
        "solver": "epsilon", "density": {str(n): value for n, value in targets.items()}, "intervals": intervals,
        "goals": {goal.name: dict(goal.weights) for goal in goals}, "max_rules_per_layer": max_rules_per_layer,
        "mip_gap": mip_gap, "solves": run.solves, "unsolved": run.unsolved,
    }  # fmt: skip
    return Front(tuple(points), names, settings, table.provenance)


class _Run:
    """The solves of one epsilon front and what they found."""

    def __init__(
        self, table: LossTable, targets: dict[int, float], goals: Sequence[Goal], max_rules: int | None, pinned: Pinned | None,
        mip_gap: float, label: str, deadline: float, cancel: threading.Event | None,
    ) -> None:  # fmt: skip
        self._table, self._targets, self._goals = table, targets, goals
        self._settings: dict[str, Any] = {"max_rules_per_layer": max_rules, "pinned": pinned, "mip_gap": mip_gap, "cancel": cancel}
        self._label, self._deadline, self._cancel = label, deadline, cancel
        self.points: list[FrontPoint] = []
        self.solves = self.unsolved = 0

    def solve(self, goal: Goal, limits: dict[str, float], remaining: int) -> None:
        """Minimise one goal (with a little of the others) under limits on the others; infeasible limits add no point."""
        left = self._deadline - time.perf_counter()
        if left <= 0 or (self._cancel is not None and self._cancel.is_set()):
            self.unsolved += 1
            return
        answer = self._answer(goal, limits, max(left / remaining, min(left, 1.0)))
        if answer is None:
            return
        search = {"goal": goal.name, "limits": limits, "status": answer.status, "density": {str(n): d for n, d in self._targets.items()}}
        name = f"{self._label}-{len(self.points) + 1}"
        self.points.append(
            point(
                self._table,
                answer.choice,
                name=name,
                origin=self._label,
                lengths=self._targets,
                goals=self._goals,
                gap=answer.gap,
                search=search,
            )
        )

    def _answer(self, goal: Goal, limits: dict[str, float], time_limit_s: float) -> MilpAnswer | None:
        capped = [(other, limits[other.name]) for other in self._goals if other.name in limits]
        try:
            answer = solve_milp(
                self._table,
                self._targets,
                goal=_with_tie_break(goal, self._goals),
                limits=capped,
                time_limit_s=time_limit_s,
                **self._settings,
            )
        except InfeasibleError:
            if not limits:
                raise
            self.solves += 1
            return None
        except NoPlanError:
            self.unsolved += 1
            return None
        self.solves += 1
        return answer


def _with_tie_break(goal: Goal, goals: Sequence[Goal]) -> Goal:
    weights = dict(goal.shares)
    for other in goals:
        if other is not goal:
            for name, share in other.shares.items():
                weights[name] = weights.get(name, 0.0) + TIE_BREAK * share
    return Goal(goal.name, weights)


def _levels(values: np.ndarray, goals: Sequence[Goal], intervals: int) -> dict[str, list[float]]:
    """Per goal the inner levels that divide its range over the single-goal optima into `intervals`."""
    low, high = values.min(axis=0), values.max(axis=0)
    return {goal.name: list(np.linspace(low[i], high[i], intervals + 1)[1:-1]) for i, goal in enumerate(goals)}


def _grid(goals: Sequence[Goal], levels: dict[str, list[float]]) -> Iterator[tuple[Goal, dict[str, float]]]:
    for goal in goals:
        others = [other.name for other in goals if other is not goal]
        if len(goals) <= MAX_GRID_GOALS:
            for combination in product(*(levels[name] for name in others)):
                yield goal, {name: float(level) for name, level in zip(others, combination, strict=True)}
        else:
            for name in others:
                for level in levels[name]:
                    yield goal, {name: float(level)}


def _grid_size(goals: int, intervals: int) -> int:
    if goals < 2:
        return 0
    return goals * (intervals - 1) ** (goals - 1) if goals <= MAX_GRID_GOALS else goals * (goals - 1) * (intervals - 1)


def _values(candidate: FrontPoint, names: Sequence[str]) -> list[float]:
    return [float(np.mean(list(candidate.density.values()))) if name == DENSITY else candidate.predicted[name] for name in names]


def _check_goals(goals: Sequence[Goal]) -> None:
    names = [goal.name for goal in goals]
    if not goals or len(set(names)) < len(names):
        raise ValueError(f"goals must be one or more goals of different names, got {names}")


def _tell(progress: Progress | None, done: int, total: int, message: str) -> None:
    if progress is not None:
        progress(done, total, message)
