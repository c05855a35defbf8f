"""Speed against accuracy: what is timed, which density the answer speaks of, and when it says that nothing is decided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import t

from moa_lab.pipeline import Run
from moa_lab.records import ALLOCATED, Measurement
from moa_lab.studies import StudyRecord, scale_of
from moa_lab.studies.densities import speed as module
from moa_lab.studies.densities.speed import (
    CPU_ROWS,
    DECODE,
    DECODE_ONE,
    PREFILL,
    REPEATS,
    TOKENS_PER_S,
    TRANSFORMERS,
    speed,
    speed_answer,
    speedup,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def record(records: dict[str, StudyRecord]) -> StudyRecord:
    return records["speed"]


def rate(plan: str, task: str, *rates: float, batch: int = 8, over: float = 1.25) -> Measurement:
    detail = {"repeats": list(rates), "batch": batch, "over_roofline": over}
    return Measurement(plan, TOKENS_PER_S, task, 4096, sum(rates) / len(rates), len(rates), min(rates), max(rates), 0.5, detail)


def needles(plan: str, hits: int, of: int = 40) -> Measurement:
    found = [1] * hits + [0] * (of - hits)
    return Measurement(plan, "retrieval", "needles", 4096, hits / of, of, 0.0, 1.0, 0.5, {"per_sample": found})


def rows_of(hits: dict[str, int], **rates: tuple[float, ...]) -> list[Measurement]:
    """Rows of plans named as in `hits`; rates["moa_25"] are those of moa-25."""
    timed = {name.replace("_", "-"): found for name, found in rates.items()}
    return [*(needles(name, found) for name, found in hits.items()), *(rate(name, DECODE, *found) for name, found in timed.items())]


def test_every_plan_is_timed_in_both_batches_and_on_prompts_and_its_needles_are_counted(record: StudyRecord) -> None:
    plans = ("dense", "moa-50", "uniform-50")
    length = record.settings["length"]
    assert not record.settings["failed"]
    for task, batch in ((DECODE, CPU_ROWS), (DECODE_ONE, 1), (PREFILL, 1)):
        found = {row.plan: row for row in record.select(metric=TOKENS_PER_S, task=task, length=length)}
        assert set(found) == {*plans, TRANSFORMERS}
        for row in found.values():
            assert row.detail["batch"] == batch
            assert row.n == REPEATS == len(row.detail["repeats"])
            assert 0 < row.low <= row.value <= row.high
            assert row.value == pytest.approx(math.prod(row.detail["repeats"]) ** (1 / REPEATS))
    assert {row.plan for row in record.select(metric="retrieval", task="needles", length=length)} == set(plans)


def test_allocated_bytes_are_those_predicted_and_those_of_the_timed_cache(run: Run, record: StudyRecord) -> None:
    length = record.settings["length"]
    for row in record.select(metric=ALLOCATED):
        assert row.value == row.detail["predicted"]
        decoded = record.select(plan=row.plan, metric=TOKENS_PER_S, task=DECODE)[0]
        # Timed in the model's own numbers, told at two bytes a number.
        assert decoded.detail["allocated_bytes"] == CPU_ROWS * row.value * run.model.dtype.itemsize / 2
    assert record.select(plan="moa-50", metric=ALLOCATED)[0].value <= 0.5 * record.select(plan="dense", metric=ALLOCATED)[0].value
    assert length == max(run.lengths)


def test_a_model_that_finds_nothing_loses_nothing_and_the_answer_says_so(record: StudyRecord) -> None:
    assert record.answer.startswith("The dense model finds no needle at 512 tokens")
    assert "Times on a CPU say little" in record.answer


def test_a_record_keeps_all_of_it(record: StudyRecord, tmp_path: Path) -> None:
    assert StudyRecord.load(record.save(tmp_path / "speed.json")).rows == record.rows


def test_a_side_that_does_not_run_is_told_and_the_others_are_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, plan: Any, side: str, batch: int, *_: Any) -> dict[str, Any]:
        return {"failed": "no such kernel"} if side == "ours dense" else {"rate": 1.0, "ms": 1.0, "batch": batch, "roofline_ms": 1.0}

    monkeypatch.setattr(module, "measured_side", broken)
    found = speed(run, scale_of("sketch"))
    assert found.settings["failed"] == {f"dense, {task}": "no such kernel" for task in (DECODE, DECODE_ONE)}
    assert found.select(plan="moa-50", task=DECODE)
    assert found.answer == "The dense model could not be timed, so there is nothing to compare with."


def test_repeats_are_of_one_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def shrinks(model: Any, plan: Any, side: str, batch: int, *_: Any) -> dict[str, Any]:
        asked.append(batch)
        # The second try finds less room than the first, as another process might leave.
        fits = batch if len(asked) != 2 else 1
        return {"ms": 1.0, "rate": 1e3 * fits, "batch": fits, "roofline_ms": 1.0, "kept_bytes": 1}

    monkeypatch.setattr(module, "measured_side", shrinks)
    first = next(module._decoded(run.model, run.at(0.5).plan(), 640, 12, 1e9, {}))
    assert asked == [CPU_ROWS, CPU_ROWS, 1, 1]
    assert first.detail["repeats"] == [1e3] * 3


def test_a_speedup_is_the_ratio_of_geometric_means_with_welchs_interval() -> None:
    found = speedup(rate("moa-25", DECODE, 300.0, 310.0, 290.0), rate("dense", DECODE, 100.0, 101.0, 99.0))
    assert found.value == pytest.approx((300 * 310 * 290 / (100 * 101 * 99)) ** (1 / 3))
    # Welch (1947) by hand.
    a, b = ([math.log(x) for x in xs] for xs in ((300, 310, 290), (100, 101, 99)))
    va, vb = (sum((x - sum(xs) / 3) ** 2 for x in xs) / 2 / 3 for xs in (a, b))
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    half = t.ppf(0.975, freedom) * math.sqrt(va + vb)
    assert math.log(found.high / found.value) == pytest.approx(half)
    assert math.log(found.value / found.low) == pytest.approx(half)


@pytest.mark.parametrize("repeats", [1, 2])
def test_repeats_that_are_all_alike_or_single_do_not_say_how_far_off_they_are(repeats: int) -> None:
    found = speedup(rate("moa-25", DECODE, *[200.0] * repeats), rate("dense", DECODE, *[100.0] * repeats))
    assert found == (pytest.approx(2.0), repeats, -math.inf, math.inf)


RATES = {"dense": (100.0, 101.0, 99.0), "moa_25": (300.0, 303.0, 297.0), "moa_50": (200.0, 202.0, 198.0)}


def test_the_answer_speaks_of_the_fastest_plan_that_still_finds_what_dense_finds() -> None:
    hits = {"dense": 40, "moa-50": 40, "moa-25": 40, "moa-15": 4, "uniform-25": 6}
    rows = rows_of(hits, **RATES, moa_15=(500.0, 505.0, 495.0), uniform_25=(310.0, 312.0, 308.0))
    answer = speed_answer(rows, 4096, "H100")
    assert answer.startswith(
        "moa-25 finds 100% [100%, 100%] of the needles that the dense model finds at 4,096 tokens and decodes 3.00 times"
    )
    assert "uniform spans of the same bytes decode 3.10 times as many and find 15% of the needles" in answer
    assert "not decided" not in answer
    assert "CPU" not in answer


def test_a_plan_between_the_levels_is_named_with_the_safer_one_and_its_doubt() -> None:
    rows = rows_of({"dense": 40, "moa-50": 40, "moa-25": 37}, **RATES)
    answer = speed_answer(rows, 4096, "H100")
    assert answer.startswith("moa-25 finds 92%")
    assert "(not decided: below 90% lies within the interval)" in answer
    assert "(moa-50: 100% [100%, 100%], 2.00 times as many tokens per second)" in answer


def test_where_no_plan_finds_enough_the_answer_is_no() -> None:
    answer = speed_answer(rows_of({"dense": 40, "moa-50": 20, "moa-25": 4}, **RATES), 4096, "H100")
    assert answer.startswith("No density that was timed keeps 90% of the needles")
    assert "moa-50, the nearest, keeps 50%" in answer


def test_a_gain_within_the_noise_is_not_decided() -> None:
    rows = rows_of({"dense": 40, "moa-50": 40}, dense=(100.0, 150.0, 60.0), moa_50=(120.0, 70.0, 160.0))
    assert "(not decided: 1 lies within the interval)" in speed_answer(rows, 4096, "H100")


def test_a_row_alone_is_told_with_what_its_step_waits_for() -> None:
    rows = rows_of({"dense": 40, "moa-25": 40}, dense=RATES["dense"], moa_25=RATES["moa_25"])
    rows += [rate("dense", DECODE_ONE, 10.0, 10.1, over=4.0, batch=1), rate("moa-25", DECODE_ONE, 11.0, 11.1, over=5.0, batch=1)]
    answer = speed_answer(rows, 4096, "H100")
    assert "A single row decodes 1.10 times" in answer
    assert "reading weights and cache is 20% of such a step, and 80% of one at the largest batch" in answer


def test_nothing_feasible_is_said() -> None:
    assert speed_answer(rows_of({"dense": 40}, dense=(1.0, 1.0)), 4096, "H100") == "No density was both feasible and timed."
