from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moa_lab.calibration.samples import Sample
from moa_lab.evaluate.intervals import Interval
from moa_lab.pipeline import Run
from moa_lab.plan import SINK_TOKENS, Plan, SpanRule
from moa_lab.presets import RunSettings
from moa_lab.records import Measurement
from moa_lab.search import InfeasibleError, head_scores
from moa_lab.studies import StudyRecord, scale_of
from moa_lab.studies.densities.low_density import FLOORS, SINKS, comparisons, low_density, low_density_answer, settings_at, variant
from moa_lab.studies.densities.whole_heads import (
    Cliff,
    counts,
    cut,
    cut_changes,
    find_cliff,
    fitted,
    floor_of,
    floored,
    ranked_heads,
    whole_of,
)
from moa_lab.studies.gains import Gain
from tests.search.tables import random_table, small_geometry

GEOMETRY = small_geometry(layers=10, kv_heads=3)
RANKING = [(layer, head) for head in (2, 0, 1) for layer in range(10)]


@pytest.fixture(scope="module")
def record(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    settings = RunSettings(
        model=str(inputs[0]), preset="sketch", source=str(inputs[1]), columns="text=text,summary=summary", lengths=(512,),
        test_lengths=(512,),
    )  # fmt: skip
    # Four heads, floors of 1/4 and 3/8: 0.6 pays for one whole head.
    return low_density(Run(tmp_path_factory.mktemp("low"), settings), replace(scale_of("sketch"), low=(0.2, 0.6)))


def scored(plan: Plan, task: str, length: int, values: Sequence[float]) -> Measurement:
    metric = "retrieval" if task == "needles" else "cross_entropy"
    detail = {"per_sample": list(values)}
    return Measurement(plan.name, metric, task, length, float(np.mean(values)), len(values), 0.0, 1.0, plan.density(length), detail)


def test_heads_are_ranked_by_what_they_lose_at_the_floor() -> None:
    table = random_table(3)
    ranking, scores = ranked_heads(table), head_scores(table, floor_tokens=128).reshape(2, 2)
    assert sorted(ranking) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [scores[head] for head in ranking] == sorted(scores.ravel(), reverse=True)


def test_few_counts_lie_close_and_none_exceeds_the_heads() -> None:
    assert counts(90) == [0, 4, 8, 12, 16, 24, 32]
    assert counts(4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("sink", SINKS)
def test_a_fitted_plan_has_the_first_heads_whole_and_one_more_would_be_too_many(floor: int, sink: int) -> None:
    plan = fitted(GEOMETRY, RANKING, 0.2, 2048, floor=floor, sink=sink, name="a")
    whole = whole_of(plan)
    assert 0 < len(whole) < len(RANKING)
    assert set(whole) == set(RANKING[: len(whole)])
    assert plan.density(2048) <= 0.2 < floored(GEOMETRY, RANKING[: len(whole) + 1], floor, sink, "b").density(2048)
    assert (plan.sink_tokens, floor_of(plan)) == (sink, floor)
    # Sinks lie inside the span: bytes do not depend on them.
    assert plan.density(2048) == fitted(GEOMETRY, RANKING, 0.2, 2048, floor=floor, sink=SINK_TOKENS, name="c").density(2048)


def test_a_density_below_the_floor_is_refused_in_words() -> None:
    with pytest.raises(InfeasibleError, match=r"floor of 192 tokens takes 0\.09375"):
        fitted(GEOMETRY, RANKING, 0.09, 2048, floor=192, sink=64, name="a")


def dense_rows(n: int) -> list[Measurement]:
    """Of a dense model that finds all."""
    return [scored(floored(GEOMETRY, RANKING, 128, 64, "dense"), "needles", length, [1] * n) for length in (1024, 2048)]


@pytest.mark.parametrize(("needed", "enough", "short"), [(0, 0, None), (3, 3, 2), (5, 6, 4)])
def test_the_cliff_is_the_first_count_that_finds_what_dense_finds(needed: int, enough: int, short: int | None) -> None:
    asked: list[int] = []

    def measure(plan: Plan) -> list[Measurement]:
        asked.append(len(whole_of(plan)))
        found = 1 if asked[-1] >= needed else 0
        return [scored(plan, "needles", length, [found] * 100) for length in (1024, 2048)]

    cliff, rows = find_cliff(GEOMETRY, RANKING, 128, (1024, 2048), dense_rows(100), "needles", measure)
    assert (cliff.enough, cliff.short, cliff.decided) == (enough, short, True)
    assert asked[-1] == enough
    assert len(rows) == 2 * len(asked)
    assert cliff.density == pytest.approx((enough * 1024 + (30 - enough) * 128) / (30 * 1024))


def test_a_cliff_may_be_undecided_or_not_be_reached() -> None:
    dense = dense_rows(20)

    def nearly(plan: Plan) -> list[Measurement]:
        return [scored(plan, "needles", length, [1] * 19 + [0]) for length in (1024, 2048)]

    def never(plan: Plan) -> list[Measurement]:
        return [scored(plan, "needles", length, [0] * 20) for length in (1024, 2048)]

    cliff, _ = find_cliff(GEOMETRY, RANKING, 128, (1024, 2048), dense, "needles", nearly)
    assert (cliff.enough, cliff.decided) == (0, False)
    cliff, _ = find_cliff(GEOMETRY, RANKING, 128, (1024, 2048), dense, "needles", never)
    assert (cliff.enough, cliff.short, cliff.decided) == (None, counts(30)[-1], True)


def test_cutting_one_head_leaves_all_others_and_its_change_is_paired() -> None:
    plan = floored(GEOMETRY, RANKING[:2], 192, 64, "low")
    changed = cut(plan, RANKING[0], 192)
    assert whole_of(changed) == [RANKING[1]]
    assert changed.rules[RANKING[0][0]][RANKING[0][1]] == SpanRule(192.0, 0.0)

    def losses(one: Plan, _: Sequence[Sample]) -> list[Measurement]:
        # Each sample has a level of its own; the first head is worth 0.5 nats to all, the second nothing.
        worse = 0.5 if RANKING[0] not in whole_of(one) else 0.0
        return [scored(one, "questions", n, [level + worse for level in (1.0, 3.0, 9.0)]) for n in (1024, 2048)]

    rows = cut_changes(plan, [], losses)
    assert {row.task: (row.value, row.low, row.high) for row in rows} == {
        "layer 0 head 2": pytest.approx((0.5, 0.5, 0.5)), "layer 1 head 2": pytest.approx((0.0, 0.0, 0.0)),
    }  # fmt: skip
    assert all(row.n == 6 for row in rows)


def test_settings_are_compared_one_at_a_time_where_both_were_measured() -> None:
    assert len(settings_at(0.1, (0.1, 0.15))) == len(FLOORS)
    assert {sink for _, sink in settings_at(0.15, (0.1, 0.15))} == set(SINKS)
    usual, small = (floored(GEOMETRY, [], floor, 64, variant(0.15, floor, 64)) for floor in (128, 96))
    rows = [scored(usual, "needles", n, [1, 0, 1]) for n in (1024, 2048)] + [scored(small, "needles", 2048, [1, 1, 1])]
    (found,) = comparisons(rows, (0.1, 0.15), (1024, 2048))
    assert (found.plan, found.against, found.lengths) == (small.name, usual.name, (2048,))
    assert found.found.value == pytest.approx(1 / 3)


def test_learned_spans_are_held_against_whole_heads_of_equal_bytes() -> None:
    learned, fitted_one = floored(GEOMETRY, [], 128, 64, "learned-15"), floored(GEOMETRY, [], 128, 64, variant(0.15, 128, 64))
    rows = [scored(plan, "needles", 2048, hits) for plan, hits in ((learned, [1, 1, 1]), (fitted_one, [1, 0, 1]))]
    (found,) = comparisons(rows, (0.1, 0.15), (2048,))
    assert (found.plan, found.against) == ("learned-15", fitted_one.name)


def better(plan: str, against: str, low: float, high: float) -> Gain:
    return Gain(plan, against, "needles_gained", "needles", (2048,), Interval((low + high) / 2, 9, low, high), 0.15, 0.15)


def test_the_answer_names_the_cliff_what_moves_it_and_what_does_not() -> None:
    usual = variant(0.15, 128, 64)
    compared = [
        better(variant(0.15, 96, 64), usual, 0.1, 0.2), better(variant(0.15, 128, 4), usual, -0.1, 0.2),
        better("learned-15", usual, -0.3, -0.1),
    ]  # fmt: skip
    changes = [
        Measurement("learned-15", "loss_change", f"layer {n} head 0", 0, v, 9, v - 0.2, v + 0.2, 0.15) for n, v in ((1, 0.3), (2, 0.1))
    ]
    text = low_density_answer([Cliff(128, 12, 8, 0.176, True), Cliff(256, None, 48, 0.6, False)], compared, changes, 0.15, 90, (2048, 4096))
    assert "over a floor of 128 tokens 12 whole heads of 90 (17.6% kept) are enough, 8 are not;" in text
    assert "over a floor of 256 tokens 48 whole heads of 90 are not enough (not decided)" in text
    assert (
        "a floor other than 128 tokens changes this (1 of 1 comparisons decided): needles better with ranked-15-floor-96-sink-64 (+0.150"
        in text
    )
    assert "a sink other than 64 tokens changes nothing that these samples decide" in text
    assert "instead of whole heads over a floor, changes this (1 of 1 comparisons decided): needles worse with learned-15" in text
    assert "1 of the 2 whole heads of learned-15 raises the loss of calibration questions" in text
    assert "layer 1 head 0, +0.300 nats [0.100, 0.500], 75% of all increases" in text
    one = low_density_answer([Cliff(128, 2, 1, 0.1, True), Cliff(256, None, 1, 0.6, True)], compared[1:2], changes[:1], 0.15, 4, (2048,))
    assert "2 whole heads of 4 (10.0% kept) are enough, 1 is not; over a floor of 256 tokens 1 whole head of 4 is not enough." in one
    assert "that these samples decide (1 comparison)." in one
    assert "1 of the 1 whole head of learned-15 raises the loss" in one
    nothing = low_density_answer([], [], [], 0.15, 90, (2048,))
    assert "no cliff can be seen" in nothing
    assert "could not be compared" in nothing
    assert "No plan had whole heads" in nothing


def test_the_study_measures_what_is_feasible_and_says_what_is_not(record: StudyRecord) -> None:
    assert all(f"{variant(0.2, floor, 64)} at 512" in record.settings["left_out"] for floor in (128, 192, 256))
    assert record.select(plan=variant(0.2, 96, 64), metric="retrieval")
    for row in record.select(metric="retrieval"):
        if row.plan.startswith(("ranked-60", "learned-60")):
            assert row.density <= 0.6 + 1e-9
    assert record.select(plan="learned-60", task="documents")
    assert len(record.select(metric="loss_change")) == 1
    assert {row.task for row in record.select(plan="whole-0-floor-128")} == {"needles", "summaries"}
    assert record.select(metric="nats_saved", plan=variant(0.6, 128, 4))
