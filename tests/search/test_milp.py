"""The exact answer against every choice; its limits, its speed, and stopping it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.search import InfeasibleError, mean_goal, milp, solve_milp
from moa_lab.search.reduction import worth_keeping
from tests.search.tables import all_choices, goal_values, keeps, large_table, random_table, rules_per_layer, task_goals

MIXED = (("questions", 1024, "all_or_nothing"), ("summaries", 2048, "sum"), ("summaries", 2048, "worst_distance"))
TARGETS = st.dictionaries(st.sampled_from([512, 1024, 2048, 3000, 4096]), st.floats(0.3, 1.0), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000), targets=TARGETS, monotone=st.booleans(), which=st.sampled_from([0, 1, 2, None]),
    most=st.sampled_from([None, 1, 2]), pin=st.booleans(), capped=st.sampled_from([None, 0, 1, 2]), share=st.floats(0.0, 0.9),
)  # fmt: skip
def test_milp_equals_trying_every_choice_under_any_mix_of_limits(
    seed: int, targets: dict[int, float], monotone: bool, which: int | None, most: int | None, pin: bool, capped: int | None, share: float
) -> None:
    table = random_table(seed, objectives=MIXED, monotone=monotone)
    goals = task_goals(table)
    goal = mean_goal(goals) if which is None else goals[which]
    choices = all_choices(table)
    choices = choices[keeps(table, choices, targets)]
    pinned = {(0, 1): seed % len(table.rules)} if pin else {}
    for head, rule in pinned.items():
        choices = choices[choices[:, head[0], head[1]] == rule]
    if most is not None:
        choices = choices[rules_per_layer(choices) <= most] if len(choices) else choices
    limits = None
    if capped is not None and len(choices):
        limited = goal_values(table, goals[capped], choices)
        levels = np.unique(limited.round(6))
        at = int(share * (len(levels) - 1))
        # Half-way between two values, so that no rounding decides; below all of them when there is no further one.
        level = float(levels[at : at + 2].mean()) if len(levels) > 1 else 0.5 * float(levels[0]) - 1e-3
        limits = [(goals[capped], level)]
        choices = choices[limited <= level]
    ask = {"goal": goal, "limits": limits, "max_rules_per_layer": most, "pinned": pinned, "mip_gap": 0.0}
    if not len(choices):
        with pytest.raises(InfeasibleError):
            solve_milp(table, targets, **ask)  # type: ignore[arg-type]
        return
    answer = solve_milp(table, targets, **ask)  # type: ignore[arg-type]
    best = goal_values(table, goal, choices).min()
    assert answer.status == "optimal"
    assert answer.value == pytest.approx(best, rel=1e-5, abs=1e-7)
    assert answer.bound <= best + 1e-7
    assert (choices == answer.choice).all(axis=(1, 2)).any()


def test_a_feasible_model_that_presolve_calls_infeasible_is_solved_all_the_same() -> None:
    table = random_table(181, objectives=MIXED)
    first, _, last = task_goals(table)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, {1024: 0.5625}) & (rules_per_layer(choices) <= 1)]
    levels = np.unique(goal_values(table, first, choices).round(6))
    at = (len(levels) - 1) // 2
    level = float(levels[at : at + 2].mean())
    best = goal_values(table, last, choices[goal_values(table, first, choices) <= level]).min()
    answer = solve_milp(table, {1024: 0.5625}, goal=last, limits=[(first, level)], max_rules_per_layer=1, mip_gap=0.0)
    assert answer.status == "optimal"
    assert answer.value == pytest.approx(best)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2), st.sampled_from([1e-12, 0.5, 0.99]))
def test_a_limit_below_every_choice_is_infeasible_and_not_a_lack_of_time(seed: int, which: int, share: float) -> None:
    table = random_table(seed, objectives=MIXED)
    choices = all_choices(table)
    goal = task_goals(table)[which]
    least = goal_values(table, goal, choices[keeps(table, choices, {1024: 0.4})]).min()
    for other in task_goals(table):
        with pytest.raises(InfeasibleError, match="with 1 limits on goals is infeasible"):
            solve_milp(table, {1024: 0.4}, goal=other, limits={goal.name: share * least})


def test_a_limit_at_the_very_optimum_is_met() -> None:
    for seed in range(3):
        table = random_table(seed, objectives=MIXED)
        for goal in task_goals(table):
            best = solve_milp(table, 0.5, goal=goal, mip_gap=0.0).value
            answer = solve_milp(table, 0.5, limits={goal.name: best})
            assert answer.status == "optimal"
            assert table.predict(answer.choice)[goal.name] == pytest.approx(best, rel=2e-6, abs=2e-7)


@pytest.mark.alone
def test_a_cancelled_program_returns_its_best_plan_promptly() -> None:
    table = large_table(layers=16, kv_heads=16, worst=True)
    cancel = threading.Event()
    timer = threading.Timer(2.5, cancel.set)
    timer.start()
    began = time.perf_counter()
    answer = solve_milp(table, 0.3, mip_gap=0.0, max_rules_per_layer=3, time_limit_s=60, cancel=cancel)
    elapsed = time.perf_counter() - began
    timer.join()
    assert answer.status == "cancelled"
    # The relaxation is not interrupted; the solver, which runs apart, is.
    assert elapsed < 15
    assert rules_per_layer(answer.choice[None])[0] <= 3
    assert answer.bound <= answer.value


@pytest.mark.alone
@pytest.mark.parametrize("before", [True, False])
def test_a_program_in_its_own_process_ends_within_a_second_of_cancel(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from moa_lab.search import highs

    table = large_table(layers=16, kv_heads=16, worst=True)
    monkeypatch.setattr(highs, "IN_PROCESS_S", 0.05)
    cancel = threading.Event()
    set_at: list[float] = []

    def stop() -> None:
        set_at.append(time.perf_counter())
        cancel.set()

    apart = highs._solve_apart
    timers: list[threading.Timer] = []

    def started(*args: object) -> highs.Outcome:
        timers.append(threading.Timer(0.0 if before else 1.0, stop))
        timers[-1].start()
        return apart(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(highs, "_solve_apart", started)
    answer = solve_milp(table, 0.3, mip_gap=0.0, time_limit_s=60, cancel=cancel)
    assert answer.status == "cancelled"
    assert time.perf_counter() - set_at[0] < 1.0


@pytest.mark.alone
def test_1024_heads_and_45_rules_are_solved_within_ten_seconds() -> None:
    table = large_table()
    began = time.perf_counter()
    answer = solve_milp(table, 0.4)
    assert time.perf_counter() - began <= 10
    assert answer.status == "optimal"
    assert answer.gap <= 1e-4


def test_where_no_entry_of_a_head_can_better_the_known_choice_that_one_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def nothing_left(*given: Any) -> np.ndarray:
        keep = np.array(worth_keeping(*given))
        keep[0] = False
        asked.append(True)
        return keep

    monkeypatch.setattr(milp, "worth_keeping", nothing_left)
    for seed in range(20):
        table = random_table(seed, objectives=MIXED, monotone=True)
        answer = solve_milp(table, {2048: 0.6}, goal=mean_goal(task_goals(table)), mip_gap=0.0)
        assert answer.status == "optimal"
        assert keeps(table, answer.choice[None], {2048: 0.6}).all()
    assert asked
