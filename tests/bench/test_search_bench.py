"""The bench of the search on a tiny table: every row, right or wrong solvers, the table of losses, the record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moa_lab.bench import search as bench
from moa_lab.bench.lifelike import lifelike_table
from moa_lab.bench.record import BenchRecord
from moa_lab.bench.search import SearchBench, bench_search, exact_row, front_row, open_search, search_table, slider_rows
from moa_lab.commands.app import app
from moa_lab.records import Front, FrontPoint, LossTable
from moa_lab.search import BudgetAnswer, BudgetSolver, Goal, limit_lengths, search, solve_milp

DENSITY = 0.5


@pytest.fixture(scope="module")
def table() -> LossTable:
    return lifelike_table(quick=True)


@pytest.fixture
def trusting(table: LossTable) -> SearchBench:
    """One whose times count although its table is tiny, to see what else keeps a row from its goal."""
    return SearchBench(table, (DENSITY, 0.6))


@pytest.fixture(scope="module")
def front(table: LossTable) -> Front:
    """Some seconds of searching, once."""
    return search(table, DENSITY)


@pytest.fixture(scope="module")
def record(front: Front) -> BenchRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "search", lambda *_: front)
        return bench_search(quick=True)


def whole(table: LossTable) -> np.ndarray:
    """Every head keeps everything, whatever the density."""
    lengths = [sum(rule.span_tokens(n, table.min_span) for n in limit_lengths(table)) for rule in table.rules]
    return np.full((table.geometry.layers, table.geometry.kv_heads), int(np.argmax(lengths)))


def greedy_answer(table: LossTable, goal: Goal) -> BudgetAnswer:
    """An answer that loses nothing at a density that it does not keep."""
    value = goal.value(table.predict(whole(table)))
    return BudgetAnswer(choice=whole(table), value=value, bound=value, gap=0.0, density={}, seconds=0.0)


# --- the whole path


def test_a_quick_run_has_every_row_right_and_none_meets(record: BenchRecord) -> None:
    asked = [row.shape["asked"] for row in record]
    assert asked == ["slider, first", "slider, median", "slider, worst"] * 4 + ["exact"] * 12 + ["front"]
    assert [row.shape["goal"] for row in record][:12:3] == ["mean", "paper", "worst-questions", "worst-others"]
    assert {row.id for row in record} == {"S1"}
    assert all(row.detail["right"] for row in record)
    assert not any(row.meets for row in record)
    assert all(row.ratio is not None and row.at_most and row.ours > 0 for row in record)


def test_the_record_comes_back_and_has_a_line_for_every_row(record: BenchRecord, tmp_path: Path) -> None:
    assert BenchRecord.load(record.save(tmp_path / "search.json")) == record
    lines = search_table(record).splitlines()
    assert len(lines) == len(record.rows) + 2
    assert "4 layers x 4 KV heads x 8 rules" in lines[-1]


def test_the_command_writes_the_record_and_does_not_replace_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, front: Front) -> None:
    monkeypatch.setattr(bench, "search", lambda *_: front)
    out = tmp_path / "search.json"
    result = CliRunner().invoke(app, ["bench", "search", "--out", str(out), "--quick"])
    assert result.exit_code == 0, result.output
    assert BenchRecord.load(out).settings["quick"]
    again = CliRunner().invoke(app, ["bench", "search", "--out", str(out), "--quick"])
    assert again.exit_code != 0


def test_progress_ends_at_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_steps", lambda found: [lambda: [], lambda: []])
    seen: list[tuple[int, int]] = []
    bench_search(lambda done, total: seen.append((done, total)), quick=True)
    assert seen == [(0, 2), (1, 2), (2, 2)]


# --- the table


def test_no_rule_loses_less_than_one_that_keeps_more(table: LossTable) -> None:
    for objective in table.objectives:
        if objective.form != "worst_distance":
            spans = table.span_tokens(objective.length)[0]
            losses = table.losses[objective.rows[0]][..., spans.argsort(kind="stable")]
            assert (np.diff(losses, axis=-1) <= 1e-12).all()


def test_a_tenth_of_the_heads_holds_a_third_of_the_losses_and_more() -> None:
    table = lifelike_table()
    assert table.losses.shape[1:] == (32, 32, 48)
    assert table.lengths == (2048, 4096)
    assert len({tuple(rule.span_tokens(n) for n in limit_lengths(table)) for rule in table.rules}) == 48
    for objective in table.objectives:
        if objective.form == "sum":
            heads = np.sort(table.losses[objective.rows[0]].max(axis=-1).ravel())[::-1]
            assert heads[:102].sum() > 0.33 * heads.sum()


# --- right and wrong


def test_right_answers_meet_their_goals(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench, front: Front) -> None:
    goal = trusting.goals[0]
    exact = exact_row(trusting, goal, DENSITY)
    # Sixteen heads leave a gap that a thousand do not: the goal for it is not what is tested here.
    monkeypatch.setattr(bench, "MOST_GAP", 1.0)
    monkeypatch.setattr(bench, "LEAST_PLANS", 1)
    monkeypatch.setattr(bench, "search", lambda *_: front)
    slider = slider_rows(trusting, goal)
    assert [row.meets for row in (exact, *slider, front_row(trusting))] == [True] * 5


def test_a_slider_whose_gap_is_too_wide_does_not_meet(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench) -> None:
    goal = trusting.goals[0]
    exact_row(trusting, goal, DENSITY)
    monkeypatch.setattr(bench, "MOST_GAP", -1.0)
    assert not any(row.meets for row in slider_rows(trusting, goal))


def test_a_slider_that_ignores_the_budget_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench) -> None:
    goal = trusting.goals[0]
    exact_row(trusting, goal, DENSITY)
    monkeypatch.setattr(BudgetSolver, "solve", lambda *_: greedy_answer(trusting.table, goal))
    rows = slider_rows(trusting, goal)
    assert [(row.meets, row.detail["right"]) for row in rows] == [(False, False)] * 3
    assert all(row.ratio is not None and row.ratio < 1 for row in rows)


def test_a_slider_that_states_too_small_a_gap_or_loss_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench) -> None:
    goal, solve = trusting.goals[0], BudgetSolver.solve
    exact_row(trusting, goal, DENSITY)

    def short(self: BudgetSolver, density: float) -> BudgetAnswer:
        """The plan of a smaller density, said to be the best."""
        found = solve(self, 0.7 * density)
        return replace(found, bound=found.value, gap=0.0)

    monkeypatch.setattr(BudgetSolver, "solve", short)
    assert not any(row.meets for row in slider_rows(trusting, goal))
    monkeypatch.setattr(BudgetSolver, "solve", lambda self, density: replace(solve(self, density), value=0.0, bound=0.0, gap=0.0))
    assert not any(row.meets for row in slider_rows(trusting, goal))


def test_a_slider_that_no_exact_answer_vouches_for_never_meets(trusting: SearchBench) -> None:
    assert not any(row.meets for row in slider_rows(trusting, trusting.goals[0]))


def test_an_exact_program_that_ignores_the_budget_or_runs_out_of_time_never_meets(
    monkeypatch: pytest.MonkeyPatch, trusting: SearchBench
) -> None:
    goal = trusting.goals[0]

    def ignoring(table: LossTable, density: float, **given: Any) -> Any:
        return solve_milp(table, 1.0, **given)

    monkeypatch.setattr(bench, "solve_milp", ignoring)
    assert not exact_row(trusting, goal, DENSITY).meets
    monkeypatch.setattr(bench, "solve_milp", lambda *args, **given: replace(solve_milp(*args, **given), status="time_limit"))
    assert not exact_row(trusting, goal, DENSITY).meets


def test_a_front_with_one_plan_beyond_the_density_never_meets(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench, front: Front) -> None:
    table = trusting.table
    greedy = FrontPoint(table.plan(whole(table), "whole"), table.predict(whole(table)), front.points[0].density, "broken")
    monkeypatch.setattr(bench, "LEAST_PLANS", 1)
    monkeypatch.setattr(bench, "search", lambda *_: replace(front, points=(*front.points, greedy)))
    row = front_row(trusting)
    assert (row.meets, row.detail["right"]) == (False, False)


def test_a_front_of_too_few_plans_does_not_meet(monkeypatch: pytest.MonkeyPatch, trusting: SearchBench, front: Front) -> None:
    monkeypatch.setattr(bench, "search", lambda *_: replace(front, points=front.points[:4]))
    row = front_row(trusting)
    assert (row.meets, row.detail["right"]) == (False, True)


def test_a_density_is_kept_to_the_token() -> None:
    found = open_search(quick=True)
    assert bench.keeps(found.table, whole(found.table), 1.0)
    assert not bench.keeps(found.table, whole(found.table), 1.0 - 1e-4)
