"""The union of searches on profiles with span effects."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from moa_lab.plan import Plan
from moa_lab.records import InfluenceProfile, LossTable
from moa_lab.search import InfeasibleError, MilpAnswer, candidates, front_values, loss_table, mean_goal, paper_goals, search
from moa_lab.search import front as fronts
from moa_lab.search.plain import SIMPLE
from tests.search.instances import skewed_profile
from tests.search.tables import dominated, random_profile, small_geometry

KEYS = (("questions", 512), ("questions", 1024), ("summaries", 1024))


@pytest.fixture(scope="module")
def profile() -> InfluenceProfile:
    return random_profile(geometry=small_geometry(4, 2), keys=KEYS)


def test_no_candidate_is_dominated_but_the_references_and_all_keep_the_density(profile: InfluenceProfile) -> None:
    front = search(profile, 0.6, intervals=2, time_limit_s=4)
    rest = [point for point in front if point.origin not in SIMPLE]
    assert not dominated(front_values(rest, front.objectives))
    assert all(kept <= 0.6 + 1e-9 for point in front for kept in point.density.values())
    assert len({point.plan.name for point in front}) == len(front)


def test_few_points_are_as_many_as_asked_for(profile: InfluenceProfile) -> None:
    front = search(profile, 0.6, methods=("budget", "evolve"), max_points=3)
    assert len(front) == 3
    with pytest.raises(ValueError, match="max_points must be at least 1"):
        search(profile, 0.6, max_points=0)
    with pytest.raises(ValueError, match="time_limit_s must be 0 or more seconds, got nan"):
        search(profile, 0.6, time_limit_s=float("nan"))


def test_searches_repeat(profile: InfluenceProfile) -> None:
    fronts = [search(profile, 0.6, methods=("ranked", "budget", "evolve"), seed=2) for _ in range(2)]
    assert [point.plan.identity() for point in fronts[0]] == [point.plan.identity() for point in fronts[1]]


def test_exact_solves_side_by_side_give_what_they_give_in_turn(profile: InfluenceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (1, 3):
        monkeypatch.setattr(candidates, "AT_ONCE", at_once)
        front = search(profile, 0.6, methods=("ranked", "milp"), intervals=2, time_limit_s=60)
        found.append([(point.origin, point.plan.identity()) for point in front])
    assert found[0] == found[1]
    assert len({origin for origin, _ in found[0]}) > 2


def test_where_one_exact_step_fails_the_others_end_after_their_solve(profile: InfluenceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    original, began, failed, solves = candidates.solve_milp, threading.Event(), threading.Event(), list[int]()

    def mean(*given: Any, **settings: Any) -> MilpAnswer:
        if settings["goal"].name == "first":
            began.wait(10)
            failed.set()
            raise RuntimeError("a broken solver")
        began.set()
        failed.wait(10)
        return original(*given, **settings)

    def one_of_many(*given: Any, **settings: Any) -> MilpAnswer:
        time.sleep(0.2)
        solves.append(1)
        return original(*given, **settings)

    names = iter(("first", "second", "third"))
    monkeypatch.setattr(candidates, "AT_ONCE", 2)
    monkeypatch.setattr(candidates, "mean_goal", lambda goals: replace(mean_goal(goals), name=next(names)))
    monkeypatch.setattr(candidates, "solve_milp", mean)
    monkeypatch.setattr(fronts, "solve_milp", one_of_many)
    with pytest.raises(RuntimeError, match="a broken solver"):
        search(profile, 0.6, methods=("milp",), intervals=4, time_limit_s=60)
    assert len(solves) <= 1


def test_a_step_that_is_alone_can_be_interrupted(profile: InfluenceProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def watched(*given: Any) -> list[Plan]:
        threads.append(threading.current_thread())
        return []

    monkeypatch.setattr(candidates, "whole_heads", watched)
    search(profile, 0.6, methods=("simple", "ranked"))
    assert threads == [threading.current_thread()]


def test_a_cancelled_search_returns_what_it_found(profile: InfluenceProfile) -> None:
    cancel = threading.Event()

    def stop(done: int, total: int, message: str) -> None:
        cancel.set()

    front = search(profile, 0.6, methods=("ranked", "evolve"), progress=stop, cancel=cancel)
    assert {point.origin for point in front} == {"ranked"}


def test_a_search_that_found_nothing_gives_an_empty_front(profile: InfluenceProfile) -> None:
    cancel = threading.Event()
    cancel.set()
    assert len(search(profile, 0.6, cancel=cancel)) == 0
    assert len(search(loss_table(profile), 0.6, methods=("element",))) == 0, "a table has no single values"


def test_an_infeasible_density_names_its_length(profile: InfluenceProfile) -> None:
    with pytest.raises(InfeasibleError, match=r"density 0\.1 at length 512 is infeasible: min_span 128 needs at least 0\.25"):
        search(profile, 0.1)


def test_search_joins_diverse_candidates_and_says_where_each_came_from(table: LossTable) -> None:
    told: list[tuple[int, int]] = []
    front = search(table, 0.6, intervals=3, time_limit_s=6, progress=lambda done, total, message: told.append((done, total)))
    origins = {point.origin for point in front}
    assert {"default", "ranked", "uniform", "layers"} <= origins
    assert origins & {"paper", "worst-questions", "worst-others"}
    assert 6 <= len(front) <= 16
    names = [point.plan.name for point in front]
    assert len(set(names)) == len(names)
    assert {"ranked-128", "ranked-192", "ranked-256"} <= set(names)
    assert all(value <= 0.6 for point in front for value in point.density.values())
    assert told[-1][0] == told[-1][1]
    # Only the simple plans, which stay as references, may be dominated.
    rest = replace(front, points=tuple(point for point in front if point.origin not in SIMPLE))
    assert not dominated(front_values(rest))
    assert all({"questions", "summaries"} <= set(point.predicted) for point in front)


def test_search_takes_a_profile_own_goals_and_a_rule_limit() -> None:
    profile = skewed_profile(4, 4, 2, (512,))
    table = loss_table(profile)
    front = search(profile, 0.6, goals=paper_goals(table), max_rules_per_layer=1, intervals=2)
    assert len(front) >= 1
    assert all(len(set(row)) == 1 for point in front for row in point.plan.rules)
    assert {point.origin for point in front} <= {"given", "uniform", "layers", "ranked", "budget"}


def test_search_of_one_task_spans_its_lengths() -> None:
    front = search(skewed_profile(4, 4, 2, (512, 1024), tasks=("questions",)), 0.5, intervals=2, time_limit_s=4)
    assert set(front.settings["goals"]) == {f"questions@{n}/all_or_nothing" for n in (512, 1024, 2048)}
