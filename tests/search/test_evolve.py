"""NSGA-II over rule indices, over many random tables."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.records import LossTable
from moa_lab.search import (
    InfeasibleError,
    PlanProblem,
    default_goals,
    evolve,
    front_values,
    hypervolume,
)
from tests.search.instances import small_tables
from tests.search.tables import all_choices, dominated, keeps, random_table, task_goals

TARGETS = {1024: 0.5, 3000: 0.45}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_no_point_is_dominated_and_no_hypervolume_of_the_seeds_is_lost(seed: int, limited: bool, monotone: bool) -> None:
    table = random_table(seed, monotone=monotone)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, TARGETS)]
    # More seeds than the population has room for.
    seeds = [choices[index] for index in np.random.default_rng(seed).integers(0, len(choices), 9)]
    density = TARGETS if limited else None
    front = evolve(table, density, generations=3, population=6, seed=seed, seeds=seeds)
    problem = PlanProblem(table, density, task_goals(table))
    start = problem.values(np.stack([choice.ravel() for choice in seeds]))
    reference = np.full(problem.n_obj, 1.5)
    found = front_values(front)
    assert not dominated(found)
    assert hypervolume(found, reference) >= hypervolume(start, reference) - 1e-12
    if limited:
        assert all(keeps(table, table.choice(point.plan)[None], TARGETS).all() for point in front)
    else:
        assert front.objectives[-1] == "density"


def test_the_same_arguments_give_the_same_front() -> None:
    table = random_table(1)
    fronts = [evolve(table, 0.5, generations=4, population=8, seed=seed) for seed in (5, 5)]
    assert [point.plan.identity() for point in fronts[0]] == [point.plan.identity() for point in fronts[1]]


def test_a_cancelled_evolution_keeps_its_seeds_and_runs_no_further_generation() -> None:
    table = random_table(1)
    cancel = threading.Event()
    cancel.set()
    seen: list[int] = []
    best = np.zeros((2, 2), dtype=int)
    front = evolve(table, 0.5, seeds=[best], cancel=cancel, callback=lambda generation, values: seen.append(generation))
    assert seen == []
    assert [table.choice(point.plan).tolist() for point in front] == [best.tolist()]


def test_without_a_seed_a_cancelled_evolution_has_an_empty_front() -> None:
    cancel = threading.Event()
    cancel.set()
    assert len(evolve(random_table(1), 0.5, seeds=[], cancel=cancel)) == 0


def test_an_infeasible_density_and_too_small_a_population_are_refused() -> None:
    with pytest.raises(InfeasibleError, match="at length 2048 is infeasible"):
        evolve(random_table(0), 0.01)
    with pytest.raises(ValueError, match="population at least 4"):
        evolve(random_table(0), 0.5, population=2)


@settings(max_examples=20, deadline=None)
@given(small_tables(rules=None), st.floats(0.5, 1.0), st.integers(0, 1000))
def test_repair_keeps_every_limit_and_leaves_feasible_choices_alone(table: LossTable, density: float, seed: int) -> None:
    problem = PlanProblem(table, density, default_goals(table))
    choices = np.random.default_rng(seed).integers(0, len(table.rules), (5, problem.n_var))
    repaired = problem.repaired(choices)
    for before, after in zip(choices, repaired, strict=True):
        assert problem.keeps_limits(after)
        if problem.keeps_limits(before):
            assert (before == after).all()


def test_evolve_refuses_seeds_of_another_table(table: LossTable) -> None:
    with pytest.raises(ValueError, match="seeds must be plans or rule indices"):
        evolve(table, 0.5, seeds=[np.zeros((1, 1), dtype=int)])
