"""Measuring on a tiny model: rows, history, generation, stopping."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from figure_records import make_plan
from tiny import tiny_model, tiny_tokenizer
from tiny_plans import small_plan

from moa_lab.geometry import ModelGeometry
from moa_lab.models import geometry_of
from moa_lab.plan import dense_plan
from moa_lab.provenance import Provenance
from moa_lab.records import Measurement, Measurements
from moa_lab.workbench.jobs import Cancelled, Handle
from moa_lab.workbench.measuring import Measuring, Plans, history_table, recorded
from moa_lab.workbench.state import State

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


def test_the_throughput_is_of_the_chosen_length_and_texts_under_each_plan(measuring: Measuring) -> None:
    plans = [dense_plan(geometry_of(measuring.model)), small_plan(measuring.model).renamed("small")]
    dense, small = (entry.row for entry in measuring.measure(plans, ["throughput"], N, 3, 0, handle()))
    assert (dense.metric, dense.n) == ("decode_tokens_per_s", 3)
    assert dense.value > 0
    assert abs(dense.length - N) <= 8, "a text that is cut between tokens may be read as other tokens"
    assert small.detail["kv_bytes_allocated"] == small.detail["kv_bytes_predicted"] < dense.detail["kv_bytes_allocated"]


def test_a_text_before_the_prompt_makes_it_longer(measuring: Measuring) -> None:
    plan = small_plan(measuring.model).renamed("small")
    short = measuring.generate("What is this?", [plan], 4, handle())["small"]
    long = measuring.generate("What is this?", [plan], 4, handle(), text_tokens=200)["small"]
    assert long.prompt_tokens[0] > short.prompt_tokens[0] + 150


def test_rows_of_a_run_stand_in_the_history_with_their_origin(measuring: Measuring) -> None:
    row = Measurement("moa", "retrieval", "needles", 2048, 0.9, 16, 0.7, 1.0, 0.5)
    before = recorded(Measurements((row,), {}, Provenance(model="smollm2", device="a GPU", created="2026-01-01T00:00:00+00:00")))
    measuring.measure([dense_plan(geometry_of(measuring.model))], ["memory"], N, 1, 0, handle())
    table = history_table([*before, *measuring.history])
    assert list(table["plan"]) == ["dense", "moa"]
    assert list(table.iloc[1][["when", "device", "model"]]) == ["2026-01-01T00:00:00+00:00", "a GPU", "smollm2"]


def test_every_plan_is_offered_once_and_under_a_name_of_its_own(tmp_path: Path) -> None:
    state = State(plan=make_plan(name="budget"))
    plans = Plans(state)
    assert [plan.name for plan in plans.offered(0.5)] == ["budget", "dense", "uniform"]
    state.set(other=state.plan.renamed("again"))
    assert [plan.name for plan in plans.offered(0.5)] == ["budget", "dense", "uniform"], "the same plan under another name"
    second = make_plan(name="budget", seed=5)
    second.save(tmp_path / "plan.json")
    assert plans.load(tmp_path) == second
    names = [plan.name for plan in plans.offered(0.5)]
    assert names == ["budget", f"budget {second.identity()[:6]}", "dense", "uniform"]
    assert plans.offered(0.25)[-1].density(2048) == pytest.approx(0.25, abs=0.01)


def test_a_plan_of_another_model_or_no_plan_is_not_offered(tmp_path: Path) -> None:
    plans = Plans(State(plan=make_plan()))
    make_plan(ModelGeometry(2, 4, 2, 16, 4096)).save(tmp_path / "foreign.json")
    with pytest.raises(ValueError, match="another geometry"):
        plans.load(tmp_path / "foreign.json")
    for path in ("", tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(FileNotFoundError, match="no plan at"):
            plans.load(path)
    assert plans.state.plans == ()
    assert Plans(State()).offered(0.5) == []


@pytest.mark.parametrize(("count", "kinds"), [(0, ["retrieval"]), (1, []), (1, ["speed"])])
def test_nothing_to_measure_is_refused(count: int, kinds: list[str], measuring: Measuring) -> None:
    with pytest.raises(ValueError, match="at least one plan"):
        measuring.measure([small_plan(measuring.model)] * count, kinds, N, 2, 0, handle())
