"""The union of several searches, thinned to the few candidates that measured validation will choose from."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moa_lab.engines import Engine, check_stored, engine_of, meets
from moa_lab.plan import WHOLE_BITS, Bits, Plan, mixes_of, read_mixes
from moa_lab.records import Front, FrontPoint, InfluenceProfile, LossTable
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.evolve import evolve
from moa_lab.search.front import DENSITY, Progress, epsilon_front, plan_point, point, spent_point, undominated
from moa_lab.search.goals import Goal, GoalSet, default_goals, goal_sets, mean_goal, paper_goals, weighings
from moa_lab.search.holding import front_for_all_heads, held_table, told_front
from moa_lab.search.losses import tables_of
from moa_lab.search.milp import solve_milp
from moa_lab.search.mixes import check_one_say, knows_rounding, named_front, over_mixes, stored_front, with_rounding
from moa_lab.search.plain import SIMPLE, simple_plans, whole_heads
from moa_lab.search.problem import Density, InfeasibleError, NoPlanError, densities, feasible
from moa_lab.search.thinning import renamed, thinned
from moa_lab.search.windows import windows_of

logger = logging.getLogger(__name__)

METHODS = ("simple", "ranked", "milp", "budget", "element", "evolve")
DEFAULT_METHODS = ("simple", "ranked", "milp", "budget", "element")
ALTERNATIVE_INTERVALS = 2
AT_ONCE = os.cpu_count() or 1
"""Exact solves at a time: the solver works outside Python's lock."""
GAP = 2e-3
WORST_GAP = 1e-2
"""Worst-distance programs close the last per cent of their gap slowly, and the prediction is not that exact."""


def search(
    profile_or_table: InfluenceProfile | LossTable,
    density: Density = 0.5,
    *,
    goals: Sequence[Goal] | None = None,
    lengths: Iterable[int] | None = None,
    intervals: int = 5,
    max_rules_per_layer: int | None = None,
    min_span: int | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    seed: int = 0,
    time_limit_s: float = 120.0,
    max_points: int = 16,
    keep: Sequence[str] = SIMPLE,
    bits: int | str = 16,
    engine: Engine | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Front:
    """Candidate plans at a density, found with several objectives and solvers, for measured validation to choose from.

    min_span: the floor in tokens (None: 128 for a profile, the table's own for a table, which allows no other).
    `methods`: "simple" (uniform, a span per layer, far-seeing heads: see `plain`), "ranked" (whole heads over floors), "milp" (for
    each goal set the mean of its goals, and its epsilon-constraint front: the default goals with `intervals`, the alternatives with
    two), "budget" (Lagrangian solves at several weights of the goals), "element" (plans by single values, the paper's estimator),
    "evolve" (NSGA-II). The alternatives to the default goals are the paper's sums, questions by worst distance, and the other tasks
    by worst distance; `goals` replace them all.

    Returned are points that no other of their bits dominates (in the table's objectives and the mean density over the limit lengths);
    those whose origin is in `keep` stay as references, dominated or not. What a plan leaves of the budget at any length is spent (see
    `spend`).
    Of more than `max_points` those of `keep` stay (a uniform plan, one with a span per layer, two of whole heads at least, all subsets
    of few far-seeing heads), and half of `max_points` at least are others: one of every origin and some more of the first goal set,
    then those furthest from one another in the objectives. `origin` is the goal set of an exact solve ("default", "paper", ...), the
    method, "uniform", "layers", "ranked" (whole heads) or "far". `progress(done, total, message)`; when `cancel`
    is set, what was found so far is returned. Results repeat unless `time_limit_s`, shared by all exact solves, runs out.

    bits: in how many keys and values may be stored (see `moa_lab.plan.read_mixes`). Density is one of bytes: every mix buys spans of its
    own, which are searched in an equal part of the time and of `max_points`. Of several, where the profile knows what rounding costs each
    head, a last part goes to plans whose heads differ in bits as well ("ranked", and all but "simple"), named `...@per-head`; then all
    predicted losses count the rounding, else none do. A table of several mixes is searched head by head alone.

    engine: limits of a serving engine, or the name of one of `moa_lab.engines.ENGINES`. Every plan is one that it holds as it is, and
    the density is of what it allocates, at the limit lengths. Exact solves have these limits as constraints; "budget", "element" and
    "evolve" search among the windows that a heuristic chooses first, with gaps to the bound that holds without a limit of windows.

    Raises InfeasibleError (a ValueError) naming the length that binds and the least feasible density there, and ValueError for an
    unknown engine, bits that it cannot store, or bits beside those of a table.
    """
    _check_methods(methods, max_points)
    if not time_limit_s >= 0:  # NaN too, under which no solve would end
        raise ValueError(f"time_limit_s must be 0 or more seconds, got {time_limit_s}")
    lengths = None if lengths is None else tuple(lengths)
    mixes, limits = read_mixes(bits), None if engine is None else engine_of(engine)
    whole, element = tables_of(profile_or_table, min_span, density, lengths)
    check_one_say(whole, mixes)
    asked = densities(whole, density, lengths)
    of_bits = tables_of(profile_or_table, min_span, density, lengths, mixes) if knows_rounding(profile_or_table, mixes) else None
    parts = len(mixes) + (of_bits is not None)

    def found(
        tables: tuple[LossTable, LossTable | None], store: Callable[[Front], Front], mix: Bits, methods: Sequence[str], mixed: bool = False
    ) -> Front:
        table, element = (None if one is None else held_table(one, limits) for one in tables)
        assert table is not None
        front = _found(
            table, element, feasible(table, asked, max_rules_per_layer, mix=mix), goals=goals, intervals=intervals,
            max_rules=max_rules_per_layer, methods=methods, seed=seed, time_limit_s=time_limit_s / parts,
            max_points=-(-max_points // parts), keep=keep, progress=progress, cancel=cancel, mixed=mixed,
        )  # fmt: skip
        return store(front) if limits is None else told_front(store(front_for_all_heads(front, whole)), limits)

    if limits is not None:
        for mix in (*mixes, *whole.mixes):
            check_stored(limits, mix)
    by_head = tuple(method for method in methods if method != "simple")
    if whole.stored:
        return found((whole, element), partial(named_front, mixes=whole.mixes), WHOLE_BITS, by_head)
    front = over_mixes(
        lambda mix: found((whole, element), partial(stored_front, mix=mix), mix, methods), mixes,
        partial(found, of_bits, partial(named_front, mixes=mixes), WHOLE_BITS, by_head, mixed=True) if of_bits and by_head else None,
    )  # fmt: skip
    return with_rounding(front, of_bits[0], goals or goal_sets(whole)[0].goals) if of_bits else front


def _found(
    table: LossTable, element: LossTable | None, targets: dict[int, float], *, goals: Sequence[Goal] | None, intervals: int,
    max_rules: int | None, methods: Sequence[str], seed: int, time_limit_s: float, max_points: int, keep: Sequence[str],
    progress: Progress | None, cancel: threading.Event | None, mixed: bool,
) -> Front:  # fmt: skip
    """`search` of plans that keep the shares `targets` of the tokens (by length). mixed: of those alone whose heads differ in bits."""
    sets = goal_sets(table) if goals is None else (GoalSet("given", tuple(goals)),)
    deadline = time.perf_counter() + time_limit_s
    work = _Search(table, element, targets, sets, intervals, max_rules, seed, deadline, cancel)
    stages = {method: work.stages(method) for method in METHODS if method in methods}
    points: list[FrontPoint] = []
    done = 0
    for method, steps in stages.items():
        with work.pool() as pool:
            # A step that is alone stays in this thread, where an interrupt ends it at once.
            side_by_side = map if len(steps) == 1 else pool.map
            for found in side_by_side(lambda step: [] if cancel is not None and cancel.is_set() else step(), steps):
                points += found
                done += 1
                if progress is not None:
                    progress(done, sum(map(len, stages.values())), f"search: {method}, {len(points)} plans")
    names = (*(objective.name for objective in table.objectives), DENSITY)
    points = [each for each in points if table.engine is None or meets(each.plan, table.engine, targets)]
    points = [spent_point(table, each, targets, sets[0].goals) for each in points if not mixed or len(mixes_of(each.plan)) > 1]
    chosen = thinned(undominated(points, names, keep), names, max_points, keep, sets[0].name)
    settings = {
        "solver": "search", "methods": list(methods), "density": {str(n): value for n, value in targets.items()},
        "goals": {goal.name: dict(goal.weights) for goal in sets[0].goals}, "goal_sets": [goal_set.name for goal_set in sets],
        "intervals": intervals, "max_rules_per_layer": max_rules, "seed": seed, "found": len(points), "kept_origins": list(keep),
    }  # fmt: skip
    return Front(tuple(renamed(chosen)), names, settings, table.provenance)


class _Search:
    """The stages of one search; each returns points."""

    def __init__(
        self, table: LossTable, element: LossTable | None, targets: dict[int, float], sets: Sequence[GoalSet],
        intervals: int, max_rules: int | None,
        seed: int, deadline: float, cancel: threading.Event | None,
    ) -> None:  # fmt: skip
        self._table, self._element_table, self._targets, self._sets, self._intervals = table, element, targets, sets, intervals
        self._max_rules, self._seed, self._deadline, self._cancel = max_rules, seed, deadline, cancel
        self._exact_left, self._lock, self._failed = len(sets), threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        """Threads for steps. Where one fails or the caller is interrupted, the others end after the solve that they are at."""
        with ThreadPoolExecutor(AT_ONCE, "moa-lab search") as pool:
            try:
                yield pool
            except BaseException:
                self._failed.set()
                raise

    def _go_on(self, *_: object) -> None:
        """Raise CancelledError in a step whose points nobody waits for any more."""
        if self._failed.is_set():
            raise CancelledError

    def stages(self, method: str) -> list[Callable[[], list[FrontPoint]]]:
        """The steps of a method, none of which needs another's result."""
        if method == "milp":
            return [partial(self._exact, index) for index in range(len(self._sets))]
        others = {"simple": self._simple, "ranked": self._ranked, "budget": self._budget, "element": self._element, "evolve": self._evolve}
        return [others[method] if method in ("simple", "ranked") else partial(self._if_found, others[method])]

    def _if_found(self, step: Callable[[], list[FrontPoint]]) -> list[FrontPoint]:
        """What a step finds; nothing where its heuristic finds no windows that an engine holds: exact solves may."""
        try:
            return step()
        except InfeasibleError as error:
            if windows_of(self._table, self._targets) is None:
                raise
            logger.info("%s", error)
            return []

    def _exact(self, index: int) -> list[FrontPoint]:
        goal_set = self._sets[index]
        forms = {objective.name: objective.form for objective in self._table.objectives}
        worst = any(forms.get(name) == "worst_distance" for goal in goal_set.goals for name in goal.shares)
        shared: dict[str, Any] = {
            "max_rules_per_layer": self._max_rules, "mip_gap": WORST_GAP if worst else GAP, "cancel": self._cancel,
        }  # fmt: skip
        budget_s = self._seconds()
        points = []
        mean = mean_goal(goal_set.goals)
        try:
            answer = solve_milp(self._table, self._targets, goal=mean, time_limit_s=budget_s / 4, **shared)
            points.append(self._point(answer.choice, goal_set.name, mean, answer.gap))
        except NoPlanError as error:
            logger.info("goal set %s: %s", goal_set.name, error)
        self._go_on()
        if len(goal_set.goals) > 1:
            intervals = self._intervals if index == 0 else min(self._intervals, ALTERNATIVE_INTERVALS)
            front = epsilon_front(
                self._table, self._targets, goals=goal_set.goals, intervals=intervals, time_limit_s=budget_s * 3 / 4,
                label=goal_set.name, progress=self._go_on, **shared,
            )  # fmt: skip
            points += [self._with_common_goals(found) for found in front]
        return points

    def _seconds(self) -> float:
        """What an exact step may take that begins now: its part of the time left, which `AT_ONCE` of the steps left share."""
        with self._lock:
            steps, self._exact_left = self._exact_left, self._exact_left - 1
        return max((self._deadline - time.perf_counter()) * min(1.0, AT_ONCE / steps), 0.5)

    def _simple(self) -> list[FrontPoint]:
        seconds = max(self._deadline - time.perf_counter(), 0.5) / 6
        return self._plain(simple_plans(self._table, self._targets, seconds, self._cancel))

    def _ranked(self) -> list[FrontPoint]:
        return self._plain(whole_heads(self._table, self._targets))

    def _plain(self, plans: Iterable[Plan]) -> list[FrontPoint]:
        return [
            plan_point(self._table, plan, origin=plan.search["origin"], lengths=self._targets, goals=self._sets[0].goals)
            for plan in plans
            if self._max_rules is None or max(len(set(row)) for row in plan.rules) <= self._max_rules
        ]

    def _budget(self) -> list[FrontPoint]:
        found = []
        for goal_set in self._sets:
            for goal in weighings(goal_set):
                answer = BudgetSolver(self._table, goal, self._targets).solve(self._targets)
                if self._few_rules(answer.choice):
                    found.append(self._point(answer.choice, "budget", goal, answer.gap))
        return found

    def _element(self) -> list[FrontPoint]:
        if self._element_table is None:
            return []
        found = []
        for goals in (default_goals(self._element_table), paper_goals(self._element_table)):
            choice = BudgetSolver(self._element_table, mean_goal(goals), self._targets).solve(self._targets).choice
            if self._few_rules(choice):
                found.append(self._point(choice, "element", None, None))
        return found

    def _few_rules(self, choice: np.ndarray) -> bool:
        return self._max_rules is None or max(len(set(row)) for row in choice.tolist()) <= self._max_rules

    def _evolve(self) -> list[FrontPoint]:
        table = self._table
        if windows_of(table, self._targets) is not None:
            best = BudgetSolver(table, mean_goal(self._sets[0].goals), self._targets).solve(self._targets)
            table = table.only(np.unique(best.choice))
        front = evolve(table, self._targets, goals=self._sets[0].goals, seed=self._seed, cancel=self._cancel)
        return [found for found in front if self._max_rules is None or max(len(set(row)) for row in found.plan.rules) <= self._max_rules]

    def _point(self, choice: np.ndarray, origin: str, goal: Goal | None, gap: float | None) -> FrontPoint:
        search = {} if goal is None else {"goal": goal.name, "weights": dict(goal.weights)}
        return point(
            self._table, choice, name=origin, origin=origin, lengths=self._targets, goals=self._sets[0].goals, gap=gap, search=search
        )

    def _with_common_goals(self, found: FrontPoint) -> FrontPoint:
        """The point with the predicted values of the first goal set as well, so that all points compare."""
        predicted = self._table.predict(self._table.choice(found.plan))
        return replace(found, predicted={**predicted, **{goal.name: goal.value(predicted) for goal in self._sets[0].goals}})


def _check_methods(methods: Sequence[str], max_points: int) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods must be some of {METHODS}, got {tuple(methods)}")
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
