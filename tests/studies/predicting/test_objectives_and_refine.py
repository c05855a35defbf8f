"""The studies `search` and `refine`: end to end on a tiny model, and sentences that follow their numbers."""

from __future__ import annotations

import pytest

from moa_lab.records import Measurement
from moa_lab.studies import StudyRecord
from moa_lab.studies.predicting.objectives import search_answer, search_goals
from moa_lab.studies.searching.refine import STAGES, refine_answer, refine_goals

LENGTH = 2048


def needles(plan: str, hits: list[int], length: int = LENGTH, task: str = "needles") -> Measurement:
    mean = sum(hits) / len(hits)
    return Measurement(plan, "retrieval", task, length, mean, len(hits), 0.0, 1.0, 0.25, {"per_sample": hits})


def nats(plan: str, loss: float, task: str, length: int = LENGTH) -> Measurement:
    return Measurement(plan, "cross_entropy", task, length, loss, 2, loss, loss, 0.25, {"per_sample": [loss - 0.01, loss + 0.01]})


def test_search_measures_every_objective_every_solver_and_every_predictor(records: dict[str, StudyRecord]) -> None:
    record = records["search"]
    plans = {row.plan for row in record.rows if row.metric == "retrieval"}
    assert {"dense", "uniform", "element, sum", "ranked", "gates", "epsilon", "pymoo", "budget", "search"} <= plans
    assert {row.plan for row in record.select(metric="hypervolume")} == {"epsilon", "pymoo", "budget", "search"}
    assert all(0 <= row.value <= 1 for row in record.select(metric="hypervolume"))
    correlations = record.select(metric="rank_correlation")
    assert all(-1 <= row.low <= row.value <= row.high <= 1 for row in correlations)
    assert {"span under plans, sum", "regression on measured plans"} <= {row.plan for row in correlations}
    lower = {name: min(row.value for row in correlations if row.plan == name) for name in {row.plan for row in correlations}}
    assert record.goals[0].value == max(lower.values())
    limit = 0.5
    assert all(row.density <= limit + 1e-9 for row in record.rows if row.plan not in ("dense",) and row.length)


def test_refine_measures_a_plan_of_every_stage(records: dict[str, StudyRecord]) -> None:
    record = records["refine"]
    plans = {row.plan for row in record.rows}
    assert {"dense", "uniform-50", *(f"{stage}-50" for stage in STAGES if stage != "ranked")} <= plans
    assert record.goals
    assert "50% kept" in record.answer


def rows_of(refined: list[int], search_hits: list[int]) -> list[Measurement]:
    dense = [1] * len(refined)
    return [
        needles("dense", dense), needles("refined-25", refined), needles("search-25", search_hits), needles("uniform-25", [0] * len(dense)),
        *(nats(plan, loss, "summaries") for plan, loss in (("dense", 1.0), ("refined-25", 1.2), ("uniform-25", 1.8))),
    ]  # fmt: skip


def test_the_sentence_says_whether_measuring_helped() -> None:
    better = refine_answer(rows_of([1] * 40, [1, 0] * 20), [0.25], [LENGTH])
    assert "refined 1.00 (more than the search alone)" in better
    worse = refine_answer(rows_of([1, 0] * 20, [1] * 40), [0.25], [LENGTH])
    assert "fewer than the search alone" in worse
    same = refine_answer(rows_of([1] * 40, [1] * 40), [0.25], [LENGTH])
    assert "no difference decided" in same
    assert refine_answer([], [], [LENGTH]) == "No density was feasible."


def test_goals_are_missed_when_needles_are_lost_and_met_when_they_are_not() -> None:
    lost, half_way = refine_goals(rows_of([1, 0] * 20, [1] * 40), [0.25], [LENGTH], [LENGTH])
    assert not lost.meets
    assert lost.value == lost.low < lost.high
    assert half_way.value == pytest.approx(0.25)
    assert half_way.low == pytest.approx(0.25) == half_way.high
    assert half_way.meets
    assert refine_goals(rows_of([1] * 40, [1] * 40), [0.25], [LENGTH], [LENGTH])[0].meets


def test_noise_at_one_length_does_not_hide_a_sure_loss_at_another() -> None:
    rows = rows_of([0] * 6 + [1] * 34, [1] * 40)
    rows += [needles("dense", [1] * 20 + [0] * 20, 4096), needles("refined-25", [0] * 14 + [1] * 12 + [0] * 14, 4096)]
    rows += [nats(plan, 1.0, "summaries", 4096) for plan in ("dense", "refined-25", "uniform-25")]
    assert refine_goals(rows, [0.25], [4096], [4096])[0].meets
    assert not refine_goals(rows, [0.25], [LENGTH, 4096], [LENGTH, 4096])[0].meets


def test_a_predictor_is_as_good_as_at_its_worse_density() -> None:
    def row(plan: str, task: str, value: float) -> Measurement:
        return Measurement(plan, "rank_correlation", task, 0, value, 80, value - 0.1, value + 0.1, 0.25)

    rows = [row("lucky", "25%", 0.99), row("steady", "25%", 0.9), row("lucky", "50%", 0.5), row("steady", "50%", 0.85)]
    (goal,) = search_goals(rows)
    assert (goal.value, goal.low, goal.n) == (0.85, 0.75, 80)
    assert "steady" in goal.name


def test_the_sentence_names_the_best_objective_and_says_when_it_is_not_decided() -> None:
    volumes = [
        Measurement(name, "hypervolume", "front", 0, value, 3, value, value, 0.0) for name, value in (("epsilon", 0.9), ("pymoo", 0.8))
    ]
    correlations = [
        Measurement(name, "rank_correlation", "random plans", 0, value, 9, 0.0, 1.0, 0.0) for name, value in (("good", 0.9), ("bad", 0.1))
    ]
    rows = [needles("element, sum", [1, 0] * 20), needles("ranked", [1] * 40), *volumes]
    told = search_answer(["element, sum", "ranked"], rows, correlations)
    assert "plan of ranked (1.00)" in told
    assert "not decided" not in told
    assert "epsilon covers most" in told
    assert "good predicts best (rank correlation 0.90, random plans), bad worst (0.10, random plans)" in told
    close = [needles("element, sum", [1] * 39 + [0]), needles("ranked", [1] * 40), *volumes]
    assert "not decided" in search_answer(["element, sum", "ranked"], close, correlations)


def test_the_sentence_says_so_where_the_best_objectives_are_equal_or_find_nothing() -> None:
    rows = [Measurement("epsilon", "hypervolume", "front", 0, 0.9, 3, 0.9, 0.9, 0.0)]
    correlations = [Measurement("good", "rank_correlation", "random plans", 0, 0.9, 9, 0.0, 1.0, 0.0)]
    names = ["element, sum", "ranked"]
    equal = search_answer(names, [*(needles(name, [1, 0]) for name in names), *rows], correlations)
    assert equal.startswith("Most needles are found by the plan of element, sum (0.50, as many as by ranked), which is the paper's own; at")
    nothing = search_answer(names, [*(needles(name, [0, 0]) for name in names), *rows], correlations)
    assert nothing.startswith("No objective's plan finds a needle; at equal time")
