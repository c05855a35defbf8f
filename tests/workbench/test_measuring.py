"""Measuring on a tiny model: rows, history, generation, stopping."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import small_plan

from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan
from moa_lab.records import Measurements
from moa_lab.workbench.jobs import Cancelled, Handle
from moa_lab.workbench.measuring import Measuring

N = 448


@pytest.fixture
def measuring() -> Measuring:
    return Measuring(tiny_model("llama", tie_word_embeddings=False), tiny_tokenizer())


def handle(told: list[tuple[int, int]] | None = None, stop_after: int | None = None) -> Handle:
    stop, heard = threading.Event(), [] if told is None else told

    def tell(done: int, total: int) -> None:
        heard.append((done, total))
        if stop_after is not None and len(heard) >= stop_after:
            stop.set()

    return Handle(stop, tell)


def test_every_plan_is_measured_by_every_kind_and_the_history_forgets_nothing(measuring: Measuring, tmp_path: Path) -> None:
    plans = [dense_plan(geometry_of(measuring.model)), small_plan(measuring.model).renamed("small")]
    told: list[tuple[int, int]] = []
    rows = measuring.measure(plans, ["retrieval", "memory"], N, 2, 0, handle(told))
    measured = {(entry.row.plan, entry.row.metric) for entry in rows}
    assert measured == {(plan.name, metric) for plan in plans for metric in ("retrieval", "kv_bytes_allocated")}
    assert told[0] == (0, 8)
    assert told[-1] == (8, 8)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    again = measuring.measure(plans[:1], ["retrieval"], N, 2, 0, handle())
    first = [entry.row for entry in rows if (entry.row.plan, entry.row.metric) == ("dense", "retrieval")]
    assert [entry.row for entry in again] == first
    table = measuring.table()
    assert len(table) == len(rows) + len(again)
    assert list(table.iloc[0][["plan", "metric"]]) == ["dense", "retrieval"]
    assert table["when"].notna().all()
    assert {(entry.row.plan, entry.row.detail["plan"]) for entry in measuring.history} == {(plan.name, plan.identity()) for plan in plans}
    found = Measurements.load(measuring.save(tmp_path / "history.json"))
    assert list(found) == [entry.row for entry in measuring.history]
    assert len(found.settings["when"]) == len(found.rows)


def test_what_was_measured_before_a_stop_stays(measuring: Measuring) -> None:
    plans = [dense_plan(geometry_of(measuring.model)), small_plan(measuring.model).renamed("small")]
    with pytest.raises(Cancelled):
        measuring.measure(plans, ["retrieval"], N, 2, 0, handle(stop_after=4))
    assert [entry.row.plan for entry in measuring.history] == ["dense"]


def test_plans_speak_side_by_side(measuring: Measuring) -> None:
    plans = [dense_plan(geometry_of(measuring.model)), small_plan(measuring.model).renamed("small")]
    said = measuring.generate("We have met again.", plans, 8, handle())
    assert list(said) == ["dense", "small"]
    assert said["small"].kv_bytes_allocated == said["small"].kv_bytes_predicted < said["dense"].kv_bytes_allocated
    assert [entry.row.detail["kv_bytes_allocated"] for entry in measuring.history] == [found.kv_bytes_allocated for found in said.values()]


@pytest.mark.parametrize(("count", "kinds"), [(0, ["retrieval"]), (1, []), (1, ["speed"])])
def test_nothing_to_measure_is_refused(count: int, kinds: list[str], measuring: Measuring) -> None:
    with pytest.raises(ValueError, match="at least one plan"):
        measuring.measure([small_plan(measuring.model)] * count, kinds, N, 2, 0, handle())
