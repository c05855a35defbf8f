"""A front by NSGA-II (pymoo) over rule indices, seeded with the other solvers' plans."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.callback import Callback
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.operators.crossover.ux import UniformCrossover

from moa_lab.plan import Plan
from moa_lab.records import Front, FrontPoint, LossTable
from moa_lab.search.budget import BudgetSolver
from moa_lab.search.front import DENSITY, non_dominated, point, undominated
from moa_lab.search.goals import Goal, default_goals, mean_goal
from moa_lab.search.problem import Density, InfeasibleError, Limits, Usage, check_feasible, densities, limit_lengths, terms
from moa_lab.search.ranked import FLOORS, ranked_plan

MUTATED_HEADS = 2.0
"""Heads that a mutation changes on average."""


def evolve(
    table: LossTable,
    density: Density | None,
    *,
    goals: Sequence[Goal] | None = None,
    lengths: Iterable[int] | None = None,
    generations: int = 50,
    population: int = 40,
    seed: int = 0,
    seeds: Iterable[Plan | np.ndarray] | None = None,
    callback: Callable[[int, np.ndarray], None] | None = None,
    cancel: threading.Event | None = None,
) -> Front:
    """The non-dominated set of all plans that NSGA-II evaluates, seeds included: its hypervolume is never below theirs.

    `density`: a limit that every plan keeps (by repair), or None to make the mean density over the limit lengths one more
    objective, "density". `goals` default to one per task. `seeds` are plans or choices (layers, kv_heads); by default the
    budget answers per goal and for their mean, and the ranked plans. `callback(generation, values)` gets the archive's
    values (points, objectives). When `cancel` is set, the front so far is returned. Equal arguments give equal fronts.
    Raises InfeasibleError for an infeasible density, ValueError for a seed of another table.
    """
    if generations < 1 or population < 4:
        raise ValueError(f"generations must be at least 1 and population at least 4, got {generations} and {population}")
    goals = default_goals(table) if goals is None else tuple(goals)
    problem = PlanProblem(table, density, goals, lengths)
    starts = default_seeds(table, density, goals, lengths) if seeds is None else [_as_choice(table, given) for given in seeds]
    rng = np.random.default_rng(seed)
    first = problem.repaired(_first_population(starts, population, problem, rng))
    # Seeds that keep the limits enter the archive as they are, also where the population is smaller than their number.
    archive = _Archive(problem, [start.ravel() for start in starts if problem.keeps_limits(start.ravel())], callback)
    algorithm = NSGA2(
        pop_size=population,
        sampling=first,
        crossover=UniformCrossover(),
        mutation=_StepMutation(len(table.rules)),
        repair=_DensityRepair(problem),
    )
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed, callback=archive)
    # Not pymoo's `minimize`: a termination that its callback asks for comes one generation late.
    while algorithm.has_next() and not (cancel is not None and cancel.is_set()):
        algorithm.next()
    return _front(table, problem, archive, {"generations": generations, "population": population, "seed": seed})


def default_seeds(
    table: LossTable, density: Density | None, goals: Sequence[Goal], lengths: Iterable[int] | None = None
) -> list[np.ndarray]:
    """Budget answers for every goal and their mean, and the ranked plans; without a density limit, over a few densities."""
    found: list[np.ndarray] = []
    lengths = None if lengths is None else tuple(lengths)
    for level in (0.2, 0.35, 0.5, 0.75, 1.0) if density is None else (density,):
        for goal in (*goals, mean_goal(goals)):
            try:
                found.append(BudgetSolver(table, goal, lengths).solve(level).choice)
            except InfeasibleError:
                if density is not None:
                    raise
        for floor in FLOORS:
            try:
                found.append(table.choice(ranked_plan(table, level, floor_tokens=floor, lengths=lengths)))
            except ValueError:
                # A floor that is not in the table, or too high for this density: one seed less.
                continue
    return found


class PlanProblem(Problem):
    """pymoo problem: x (heads,) are rule indices; objectives are the goals, then the mean density when it is not limited."""

    def __init__(self, table: LossTable, density: Density | None, goals: Sequence[Goal], lengths: Iterable[int] | None = None) -> None:
        self.table, self.goals = table, tuple(goals)
        self.targets = dict.fromkeys(limit_lengths(table, lengths), 1.0) if density is None else densities(table, density, lengths)
        self.limits: Limits = Usage(table, self.targets).limits(self.targets)
        check_feasible(table, self.limits)
        self.free_density = density is None
        self._terms = [terms(table, goal) for goal in self.goals]
        self._heads = np.arange(table.geometry.layers * table.geometry.kv_heads)
        self._mean_cost = np.mean(
            [goal.linear + sum((t.weight * t.rows.mean(axis=0) for t in goal.worst), 0.0) for goal in self._terms], axis=0
        )
        objectives = len(self.goals) + self.free_density
        super().__init__(n_var=len(self._heads), n_obj=objectives, xl=0, xu=len(table.rules) - 1, vtype=int)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objectives, in order."""
        return (*(goal.name for goal in self.goals), *((DENSITY,) if self.free_density else ()))

    def values(self, choices: np.ndarray) -> np.ndarray:
        """(points, objectives) of choices (points, heads)."""
        rows = [[goal.value(choice) for goal in self._terms] for choice in choices]
        if self.free_density:
            rows = [[*row, self.mean_density(choice)] for row, choice in zip(rows, choices, strict=True)]
        return np.array(rows).reshape(len(choices), self.n_obj)

    def mean_density(self, choice: np.ndarray) -> float:
        """Mean density over the limit lengths."""
        return float(self.limits.usage[:, self._heads, choice].sum(axis=1).mean())

    def keeps_limits(self, choice: np.ndarray) -> bool:
        """True when the choice (heads,) keeps every density limit."""
        return self.limits.met_by(choice)

    def repaired(self, choices: np.ndarray) -> np.ndarray:
        """The choices (points, heads), lowered where they exceed a limit: first the heads that lose least per saved token."""
        return np.stack([self._lowered(choice.copy()) for choice in choices])

    def _lowered(self, choice: np.ndarray) -> np.ndarray:
        usage = self.limits.usage
        for _ in range(usage.shape[0] * usage.shape[2]):
            used = usage[:, self._heads, choice]
            over = used.sum(axis=1) - self.limits.limit - self.limits.slack
            if (over <= 0).all():
                return choice
            binding = int(over.argmax())
            saved = used[binding][:, None] - usage[binding]
            lost = self._mean_cost - self._mean_cost[self._heads, choice][:, None]
            # Only rules that are nowhere longer, so that a repaired length stays repaired.
            fits = (saved > 0) & (usage <= used[:, :, None]).all(axis=0)
            rate = np.where(fits, lost / np.maximum(saved, 1e-300), np.inf)
            best = rate.argmin(axis=1)
            order = np.argsort(rate[self._heads, best], kind="stable")
            order = order[np.isfinite(rate[order, best[order]])]
            if not len(order):
                break
            needed = int(np.searchsorted(np.cumsum(saved[order, best[order]]), over[binding])) + 1
            choice[order[:needed]] = best[order[:needed]]
        # Stuck, as the rules left save at one length and cost at another: every head takes its shortest rule.
        return self.limits.usage.max(axis=0).argmin(axis=1)

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = self.values(x.astype(np.int64))


class _DensityRepair(Repair):
    def __init__(self, problem: PlanProblem) -> None:
        super().__init__()
        self._problem = problem

    def _do(self, problem: Problem, X: np.ndarray, **kwargs: Any) -> np.ndarray:
        return self._problem.repaired(X.astype(np.int64))


class _StepMutation(Mutation):
    """Some heads move to a rule nearby in cost, or to any rule."""

    def __init__(self, rules: int) -> None:
        super().__init__()
        self._rules = rules

    def _do(self, problem: Problem, X: np.ndarray, *args: Any, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        hit = random_state.random(X.shape) < min(MUTATED_HEADS / X.shape[1], 0.5)
        near = np.clip(X + random_state.integers(-3, 4, X.shape), 0, self._rules - 1)
        anywhere = random_state.integers(0, self._rules, X.shape)
        moved = np.where(random_state.random(X.shape) < 0.5, near, anywhere)
        return np.where(hit, moved, X)


class _Archive(Callback):
    """Keeps every non-dominated choice so far; NSGA-II drops some when its front outgrows the population."""

    def __init__(
        self,
        problem: PlanProblem,
        first: list[np.ndarray],
        callback: Callable[[int, np.ndarray], None] | None,
    ) -> None:
        super().__init__()
        self._problem, self._tell = problem, callback
        self.choices = np.array(first, dtype=np.int64).reshape(len(first), problem.n_var)
        self.values = problem.values(self.choices)
        self._prune()

    def notify(self, algorithm: Any) -> None:
        """Called by pymoo after every generation."""
        self.choices = np.concatenate([self.choices, algorithm.pop.get("X").astype(np.int64)])
        self.values = np.concatenate([self.values, algorithm.pop.get("F")])
        self._prune()
        if self._tell is not None:
            self._tell(algorithm.n_gen, self.values)

    def _prune(self) -> None:
        _, first = np.unique(self.values, axis=0, return_index=True)
        keep = np.sort(first)
        keep = keep[non_dominated(self.values[keep])]
        self.choices, self.values = self.choices[keep], self.values[keep]


def _first_population(starts: Sequence[np.ndarray], population: int, problem: PlanProblem, rng: np.random.Generator) -> np.ndarray:
    """The starts, then crossings of two of them with some heads drawn at random; without starts, random choices."""
    rules = len(problem.table.rules)
    pool = [start.ravel().astype(np.int64) for start in starts][:population]
    parents = list(pool)
    while len(pool) < population:
        fresh = rng.integers(0, rules, size=(problem.n_var,))
        if not parents:
            pool.append(fresh)
            continue
        one, other = (parents[int(index)] for index in rng.integers(0, len(parents), 2))
        mixed = np.where(rng.random(problem.n_var) < 0.5, one, other)
        pool.append(np.where(rng.random(problem.n_var) < 0.05, fresh, mixed))
    return np.stack(pool)


def _as_choice(table: LossTable, given: Plan | np.ndarray) -> np.ndarray:
    choice = table.choice(given) if isinstance(given, Plan) else np.asarray(given, dtype=np.int64)
    expected = (table.geometry.layers, table.geometry.kv_heads)
    if choice.shape != expected or choice.min() < 0 or choice.max() >= len(table.rules):
        raise ValueError(f"seeds must be plans or rule indices below {len(table.rules)} of shape {expected}, got shape {choice.shape}")
    return choice


def _front(table: LossTable, problem: PlanProblem, archive: _Archive, settings: dict[str, Any]) -> Front:
    points: list[FrontPoint] = []
    for index, choice in enumerate(archive.choices, start=1):
        rows = choice.reshape(table.geometry.layers, -1)
        points.append(
            point(table, rows, name=f"evolve-{index}", origin="evolve", lengths=problem.targets, goals=problem.goals, search=settings)
        )
    asked = None if problem.free_density else {str(n): value for n, value in problem.targets.items()}
    goals = {goal.name: dict(goal.weights) for goal in problem.goals}
    return Front(
        tuple(undominated(points, problem.names)),
        problem.names,
        {"solver": "evolve", "density": asked, "goals": goals, **settings},
        table.provenance,
    )
