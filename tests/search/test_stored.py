"""Tables whose choices are spans and bits: every solver on them, and the bytes of their plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_lab.cache import allocated_kv_bytes
from moa_lab.plan import DENSE, SpanRule, uniform_plan
from moa_lab.records import LossTable
from moa_lab.records.loss_table import interpolated
from moa_lab.search import BudgetSolver, InfeasibleError, evolve, mean_goal, ranked_plan, solve_milp
from moa_lab.search.spend import spend
from tests.search.tables import FLOOR, all_choices, goal_values, keeps, random_table, small_geometry, stored_table, task_goals

RULES = (FLOOR, SpanRule(0.0, 0.5), DENSE)
TARGETS = st.dictionaries(st.sampled_from([512, 1024, 2048]), st.floats(0.15, 0.7), min_size=1, max_size=2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), targets=TARGETS, mixes=st.sampled_from([((16, 16), (8, 8)), ((8, 8), (8, 4))]))
def test_exact_and_relaxed_answers_are_those_of_trying_every_span_in_all_bits(
    seed: int, targets: dict[int, float], mixes: tuple[tuple[int, int], ...]
) -> None:
    table = stored_table(seed, mixes, rules=RULES)
    choices = all_choices(table)
    choices = choices[keeps(table, choices, targets)]
    goal = mean_goal(task_goals(table))
    if not len(choices):
        with pytest.raises(InfeasibleError):
            solve_milp(table, targets, goal=goal)
        return
    best = goal_values(table, goal, choices).min()
    exact = solve_milp(table, targets, goal=goal, mip_gap=0.0)
    assert exact.value == pytest.approx(best, rel=1e-5, abs=1e-7)
    relaxed = BudgetSolver(table, goal, targets).solve(targets)
    assert relaxed.bound <= best + 1e-7 <= relaxed.value + 2e-7
    for answer in (exact, relaxed):
        assert (choices == answer.choice).all(axis=(1, 2)).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(200, 4000))
def test_the_bytes_of_a_choice_are_those_of_its_plan_and_of_the_rings_that_hold_it(seed: int, n_tokens: int) -> None:
    table = stored_table(seed, ((16, 16), (8, 8), (8, 4), (4, 4)))
    choice = np.random.default_rng(seed).integers(0, len(table.rules), (2, 2))
    plan = table.plan(choice, "chosen")
    cost = int(np.take_along_axis(table.slot_cost(n_tokens), choice, axis=1).sum())
    assert cost == plan.kv_bytes(n_tokens) == allocated_kv_bytes(plan, n_tokens)
    assert table.density(choice, n_tokens) == pytest.approx(plan.density(n_tokens))
    np.testing.assert_array_equal(table.choice(plan), choice)


def test_a_table_comes_back_with_its_bits_and_one_of_one_mix_is_the_file_it_was(tmp_path: Path) -> None:
    table = stored_table(1)
    found = LossTable.load(table.save(tmp_path / "table.safetensors"))
    assert found.choices == table.choices
    np.testing.assert_array_equal(found.losses, table.losses)
    random_table(1).save(tmp_path / "plain.safetensors")
    assert b'"stored"' not in (tmp_path / "plain.safetensors").read_bytes()
    with pytest.raises(ValueError, match="bits must be 1 layers x"):
        replace(table, stored=table.stored[1:])


def test_spans_between_those_of_a_table_lose_what_lies_between_in_the_same_bits() -> None:
    table = stored_table(2, rules=(FLOOR, SpanRule(0.0, 0.5), DENSE))
    plan = table.plan(np.array([[4, 4], [4, 4]]), "half")
    assert plan.bits[0][0] == (8, 4)
    rule = SpanRule(0.0, 0.25)
    between = replace(plan, rules=((rule,) * 2,) * 2)
    wide = table.with_plans(between)
    assert wide.choices[len(table.rules) :] == ((rule, (8, 4)),)
    share = (512 - 128) / (1024 - 128)
    expected = table.losses[..., 3] * (1 - share) + table.losses[..., 4] * share
    np.testing.assert_allclose(wide.losses[..., -1], expected)
    assert len(table.with_rules([rule]).rules) == len(table.rules) + 2
    with pytest.raises(ValueError, match="knows no losses of 16 bits, only of 8, 8\\+4"):
        table.with_plans(uniform_plan(table.geometry, 0.3))
    with pytest.raises(ValueError, match="stored in 16 bits, which is not among"):
        table.choice(uniform_plan(table.geometry, 0.5))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_all_heads_at_once_are_interpolated_as_numpy_does_each(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    known, wanted = np.sort(random.integers(64, 100, count)), random.integers(50, 120, 9)
    values = random.lognormal(0.0, 2.0, (3, 2, count))
    found = interpolated(wanted, known, values)
    for row, head in np.ndindex(3, 2):
        np.testing.assert_array_equal(found[row, head], np.interp(wanted, known, values[row, head]))


def test_evolved_plans_keep_the_bytes_and_predict_what_the_table_does() -> None:
    table = stored_table(3, geometry=small_geometry(3, 2))
    front = evolve(table, {1024: 0.2, 2048: 0.2}, generations=8, population=12)
    assert any(len(np.unique(point.plan.widths().reshape(-1, 2), axis=0)) > 1 for point in front)
    for point in front:
        assert max(point.plan.density(n) for n in (1024, 2048)) <= 0.2 + 1e-9
        assert table.predict(table.choice(point.plan)).items() <= point.predicted.items()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.6))
def test_ranked_heads_are_whole_in_the_one_mix_and_at_the_floor_in_the_other(seed: int, density: float) -> None:
    table = stored_table(seed, geometry=small_geometry(3, 4))
    targets = {1024: density, 4096: density}
    plan = ranked_plan(table, targets, floor_tokens=128, mixes=((8, 8), (8, 4)))
    choice = table.choice(plan)
    floor, dense = table.choices.index((FLOOR, (8, 4))), table.choices.index((DENSE, (8, 8)))
    assert set(choice.ravel().tolist()) <= {floor, dense}
    for head in zip(*(choice == floor).nonzero(), strict=True):
        more = choice.copy()
        more[head] = dense
        assert not keeps(table, more[None], targets).all()
    with pytest.raises(ValueError, match="the table lacks"):
        ranked_plan(table, targets, floor_tokens=128, mixes=((8, 8), (4, 4)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_what_a_plan_of_mixed_bits_leaves_of_its_bytes_is_spent_and_never_more(seed: int, density: float) -> None:
    table = stored_table(seed, ((16, 16), (8, 4)), geometry=small_geometry(6, 2))
    choice = np.random.default_rng(seed).choice([0, 5], size=(6, 2))
    plan, targets = table.plan(choice, "low"), dict.fromkeys((1024, 2048, 4096), density)
    grown, whole = spend(plan, targets), replace(plan, rules=((DENSE,) * 2,) * 6)
    if any(plan.density(n) > most for n, most in targets.items()):
        assert grown == plan
        return
    for n in targets:
        assert grown.density(n) <= density + 1e-9
        assert grown.density(n) > 0.98 * min(density, whole.density(n))
    assert grown.bits == plan.bits
